"""The checkpoints of a run: order, rotation, damage, and contents that are not to be trusted."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from src.checkpoint import catalog
from src.checkpoint.__main__ import main as command_line
from src.checkpoint.catalog import Catalog, verify
from src.checkpoint.checksum import verify_file
from src.checkpoint.manifest import CorruptCheckpoint, FileEntry, Manifest, parse_manifest, read_manifest
from src.checkpoint.policy import EverySteps
from src.checkpoint.resume import load_checkpoint, newest_good
from src.checkpoint.writer import write_checkpoint
from src.errors import CheckpointError
from tests.conftest import resummed


def write(directory: Path, step: int, **manifest: Any) -> Path:
    state = {"global_step": step, "weights": torch.arange(10_000.0)}
    return write_checkpoint(Catalog(directory), state, Manifest(global_step=step, epoch=1, files={}, **manifest))[0]


def edit_manifest(path: Path, **changes: Any) -> None:
    file = path / "manifest.json"
    file.write_text(resummed(json.dumps(json.loads(file.read_text()) | changes)))


def clear(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "one bit of the state": lambda path: flip_a_bit(path / "state.pt"),
    "truncated state": lambda path: os.truncate(path / "state.pt", 1000),
    "empty state": lambda path: os.truncate(path / "state.pt", 0),
    "no state": lambda path: (path / "state.pt").unlink(),
    "truncated manifest": lambda path: os.truncate(path / "manifest.json", 50),
    "empty manifest": lambda path: os.truncate(path / "manifest.json", 0),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "empty folder": clear,
    "another step's manifest": lambda path: edit_manifest(path, global_step=1),
    "manifest of another shape": lambda path: (path / "manifest.json").write_text("[1, 2]"),
    "binary manifest": lambda path: (path / "manifest.json").write_bytes(b"\xff\x00\xfe"),
    "manifest without files": lambda path: edit_manifest(path, files={}),
}


def test_invariant_2_order_is_by_step_whatever_the_modification_times_say(tmp_path: Path) -> None:
    for step in (99_999_999, 300, 100_000_000, 200):
        write(tmp_path, step)
    for age, path in enumerate(sorted(tmp_path.iterdir())):
        os.utime(path, (age, 1e9 - age))
        os.utime(path / "manifest.json", (age, 1e9 - age))
    steps = [manifest.global_step for _, manifest in Catalog(tmp_path).readable()]
    assert steps == [200, 300, 99_999_999, 100_000_000]
    newest = newest_good(Catalog(tmp_path))
    assert newest is not None
    assert newest[1].global_step == 100_000_000


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_invariant_5_a_damaged_newest_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 100)
    damage(write(tmp_path, 200))
    left = sorted((tmp_path / "step_00000200").iterdir())
    found = newest_good(Catalog(tmp_path))
    assert found is not None
    assert found[1].global_step == 100
    assert "damaged checkpoint" in caplog.text
    aside = tmp_path / "step_00000200.corrupt"
    assert sorted(path.name for path in aside.iterdir()) == [path.name for path in left], "kept"
    assert Catalog(tmp_path).paths() == [tmp_path / "step_00000100"]


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_invariant_5_checkpoints_that_all_fail_are_an_error_every_time(
    tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    damage(write(tmp_path, 100))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"none can be read.*step_00000100.*resume=never"):
            newest_good(Catalog(tmp_path))
    assert Catalog(tmp_path).paths() == [tmp_path / "step_00000100"], "left where it is"


def test_invariant_5_what_was_set_aside_earlier_still_forbids_starting_over(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    catalog.set_aside(write(tmp_path, 100), "corrupt")
    with pytest.raises(CheckpointError, match="set aside earlier"):
        newest_good(catalog)


def test_what_is_set_aside_again_gets_another_label(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    aside = catalog.set_aside(write(tmp_path, 100), "corrupt")
    assert catalog.set_aside(aside, "old").name == "step_00000100.old"
    assert catalog.were_set_aside("corrupt") == []
    assert newest_good(catalog) is None


def test_setting_aside_the_same_step_twice_keeps_both(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    names = [catalog.set_aside(write(tmp_path, 100), "corrupt").name for _ in range(3)]
    assert names == ["step_00000100.corrupt", "step_00000100.corrupt2", "step_00000100.corrupt3"]
    assert all((tmp_path / name / "state.pt").exists() for name in names)


def test_invariant_6_rotation_deletes_what_the_policy_lets_go_and_nothing_else(tmp_path: Path) -> None:
    for step, accuracy in ((100, 0.5), (200, 0.9), (300, 0.7), (400, 0.6)):
        write(tmp_path, step, metrics={"val/accuracy": accuracy})
    (tmp_path / "notes.txt").write_text("mine")
    Catalog(tmp_path).rotate(EverySteps(keep=2, keep_best=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt",
        "step_00000200",
        "step_00000300",
        "step_00000400",
    ]


def test_invariant_6_a_checkpoint_that_cannot_be_deleted_costs_space_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (100, 200):
        write(tmp_path, step)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    Catalog(tmp_path).rotate(EverySteps(keep=1, keep_best=0))
    assert "could not delete old checkpoints" in caplog.text
    assert verify(tmp_path / "step_00000200")


def test_leftovers_of_a_kill_are_cleared(tmp_path: Path) -> None:
    write(tmp_path, 100)
    for name in (".tmp_step_00000200", ".trash_step_00000050"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.pt").write_bytes(b"half")
    Catalog(tmp_path).clear_leftovers()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000100"]


@pytest.mark.parametrize("replaces", [False, True])
def test_a_commit_that_the_disk_refuses_at_the_last_moment_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaces: bool
) -> None:
    """And what it would have replaced is still there; the next try is like the first."""
    older = write(tmp_path, 100).rename(tmp_path / "older")
    folder = write(tmp_path, 100).rename(tmp_path / ".tmp_step_00000100")
    if replaces:
        older.rename(tmp_path / "step_00000100")
    before = sorted(path.name for path in tmp_path.iterdir())

    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(catalog, "fsync_directory", refuse)
        Catalog(tmp_path).adopt(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert verify(Catalog(tmp_path).adopt(folder)).global_step == 100


class Malicious:
    """Unpickling it creates the file `executed`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_invariant_9_a_malicious_state_is_refused_unexecuted(tmp_path: Path, how: str) -> None:
    marker = tmp_path / "executed"
    path = write(tmp_path / "checkpoints", 100)
    if how == "pickle":
        (path / "state.pt").write_bytes(pickle.dumps(Malicious(marker)))
    else:
        torch.save({"global_step": 100, "weights": Malicious(marker)}, path / "state.pt")
    data = (path / "state.pt").read_bytes()
    from awscrt.checksums import crc64nvme

    # Whoever can write the state can write a manifest that matches it.
    entry = {"size": len(data), "checksum": f"crc64nvme:{crc64nvme(data):016x}"}
    edit_manifest(path, files={"state.pt": entry})
    verify(path)
    with pytest.raises(CorruptCheckpoint, match="cannot be loaded"):
        load_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/b", "..", "", ".hidden", "a\\b", "a\x00b"])
def test_invariant_9_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 100)
    files = json.loads((path / "manifest.json").read_text())["files"]
    edit_manifest(path, files=files | {name: {"size": 1, "checksum": "crc64nvme:0"}})
    with pytest.raises(CorruptCheckpoint):
        read_manifest(path / "manifest.json")


@pytest.mark.parametrize(
    "changes",
    [{"format": "1"}, {"global_step": "100"}, {"epoch": None}, {"metrics": {"a": "b"}}, {"files": [1]}]
    + [{"files": {"state.pt": {"size": -1, "checksum": "x"}}}, {"files": {"state.pt": 5}}, {"config": 3}],
)
def test_invariant_9_a_manifest_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write(tmp_path, 100)
    edit_manifest(path, **changes)
    with pytest.raises(CorruptCheckpoint):
        read_manifest(path / "manifest.json")


def test_a_manifest_of_a_newer_format_is_no_damage(tmp_path: Path) -> None:
    edit_manifest(write(tmp_path, 100), format=3)
    with pytest.raises(CheckpointError, match="format 3, this code reads 2"):
        newest_good(Catalog(tmp_path))
    assert Catalog(tmp_path).paths() == [tmp_path / "step_00000100"]


def test_nor_is_one_of_the_first_format_which_had_no_checksum_of_its_own(tmp_path: Path) -> None:
    file = write(tmp_path, 100) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1}))
    with pytest.raises(CheckpointError, match="format 1, this code reads 2"):
        newest_good(Catalog(tmp_path))
    assert Catalog(tmp_path).paths() == [tmp_path / "step_00000100"]


def test_a_manifest_in_which_any_bit_has_flipped_is_damaged(tmp_path: Path) -> None:
    """Most of them leave it JSON, some of another config or with other metrics."""
    text = (write(tmp_path, 100, config={"data": {"classes": 10}}) / "manifest.json").read_bytes()
    for place, byte in enumerate(text):
        for bit in range(8):
            with pytest.raises(CorruptCheckpoint):
                parse_manifest(text[:place] + bytes([byte ^ 1 << bit]) + text[place + 1 :], "manifest.json")


@pytest.mark.parametrize("file", ["manifest.json", "state.pt"])
def test_a_disk_that_cannot_be_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    for step in (100, 200):
        write(tmp_path, step)
    original = Path.open

    def fail(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == file:
            raise OSError(errno.EIO, "Input/output error")
        return original(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        with pytest.raises(CheckpointError, match=r"step_00000200 cannot be read \(Input/output error\)"):
            newest_good(Catalog(tmp_path))
    assert len(Catalog(tmp_path).paths()) == 2, "neither was set aside"


def test_a_manifest_comes_back_as_it_was_written_and_is_strict_json(tmp_path: Path) -> None:
    manifest = Manifest(
        global_step=3,
        epoch=1,
        files={"state.pt": FileEntry(5, "crc64nvme:0")},
        loss=float("nan"),
        metrics={"val/loss": 0.25, "val/accuracy": float("inf")},
        config={"a": {"b": [1, None, "x"]}},
    )
    file = tmp_path / "manifest.json"
    file.write_text(manifest.to_json())
    again = read_manifest(file)
    assert again.loss is None
    assert again.metrics == {"val/loss": 0.25, "val/accuracy": None}
    assert (again.files, again.config) == (manifest.files, manifest.config)
    assert "NaN" not in file.read_text()
    assert "Infinity" not in file.read_text()


def test_the_checksum_is_crc64nvme(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123456789")
    verify_file(tmp_path / "file", FileEntry(9, "crc64nvme:ae8b14860a799888"))  # the catalogue's check value


def test_ls_shows_every_checkpoint_and_verify_finds_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = {"metric": "val/accuracy", "value": 0.9, "global_step": 100}
    write(tmp_path / "checkpoints", 100, metrics={"val/accuracy": 0.9}, best=best)
    flip_a_bit(write(tmp_path / "checkpoints", 200, best=best) / "state.pt")
    assert command_line(["ls", str(tmp_path)]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == ["step", "100", "200"]
    assert "val/accuracy 0.9000" in listed[1]
    assert listed[1].endswith("best")
    assert command_line(["verify", str(tmp_path)]) == 1
    verified = capsys.readouterr().out.splitlines()
    assert "verified" in verified[1]
    assert "DAMAGED: state.pt has checksum" in verified[2]


def test_ls_of_something_else_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["ls", str(tmp_path)]) == 2
    assert "has no checkpoints" in capsys.readouterr().err
