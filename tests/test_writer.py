"""Invariant 1, commit: a checkpoint is there completely or not at all, whatever kills the writer when."""

import errno
import fcntl
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.serialization import get_crc32_options

from src.checkpoint.catalog import Catalog, verify
from src.checkpoint.checksum import verify_file
from src.checkpoint.direct import DirectFile
from src.checkpoint.manifest import Manifest
from src.checkpoint.policy import EverySteps
from src.checkpoint.resume import load_checkpoint, newest_good
from src.checkpoint.writer import write_checkpoint

OPERATIONS = ("mkdir", "open", "write", "ftruncate", "fsync", "rename", "rmdir", "unlink")


def state_of(step: int, numbers: int = 1000) -> dict[str, Any]:
    return {"global_step": step, "weights": torch.full((numbers,), float(step))}


def write(directory: Path, step: int, numbers: int = 1000, **manifest: Any) -> Path:
    return write_checkpoint(Catalog(directory), state_of(step, numbers), Manifest(step, 0, {}, **manifest))[0]


def save_and_rotate(directory: Path) -> None:
    write(directory, 300, numbers=2_000_000)  # several blocks
    Catalog(directory).rotate(EverySteps(keep=2, keep_best=0))


def call_before(hook: Callable[[str, Any], None]) -> None:
    """Call `hook(name, first argument)` before each file operation of this process."""
    for name in OPERATIONS:
        original = getattr(os, name)

        def wrapped(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            hook(_name, args[0])
            return _original(*args, **kwargs)

        setattr(os, name, wrapped)


def in_a_process(work: Callable[..., None], *arguments: Any) -> int | None:
    """Run `work` in a process of its own. Returns its exit code, negative if a signal ended it.

    From a fork server, not forked from here: threads that earlier tests left behind would deadlock it.
    """
    process = multiprocessing.get_context("forkserver").Process(target=work, args=arguments)
    process.start()
    process.join(60)
    process.kill()  # if it still runs
    return process.exitcode


def die_at_operation(directory: Path, number: int, work: Callable[[Path], None]) -> None:
    count = 0

    def kill(_name: str, _path: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    call_before(kill)
    work(directory)


def killed_at_every_operation(tmp_path: Path, work: Callable[[Path], None]) -> Iterator[Path]:
    """For each file operation of `work`: a folder in which it was killed before that one. At last, one in which it came
    to its end."""
    for number in range(1, 200):
        directory = tmp_path / str(number)
        write(directory, 100)
        write(directory, 200)
        died = in_a_process(die_at_operation, directory, number, work) == -signal.SIGKILL
        yield directory
        if not died:
            assert number > 10
            return
    pytest.fail("it never ran to its end")


def check_the_order_of_syncs(directory: Path) -> None:
    synced: list[str] = []

    def note(name: str, argument: Any) -> None:
        if name == "fsync":
            synced.append(Path(f"/proc/self/fd/{argument}").readlink().name)
        if name == "rename":
            assert synced == ["state.pt", "manifest.json", ".tmp_step_00000300"]
            assert sorted(path.name for path in Path(argument).iterdir()) == ["manifest.json", "state.pt"]
            synced.append("renamed")

    call_before(note)
    write(directory, 300)
    assert synced[3:] == ["renamed", directory.name]


def write_more_than_the_limit(directory: Path, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(OSError, match="File too large"):
        write(directory, 200, numbers=10_000_000)


def test_what_is_written_verifies_and_loads_back(tmp_path: Path) -> None:
    path = write(tmp_path, 42)
    assert path.name == "step_00000042"
    manifest, state = load_checkpoint(path)
    assert manifest.global_step == 42
    assert torch.equal(state["weights"], torch.full((1000,), 42.0))


@pytest.mark.parametrize("mmap", [False, True])
def test_plain_torch_reads_it(tmp_path: Path, mmap: bool) -> None:
    state = torch.load(write(tmp_path, 7) / "state.pt", weights_only=True, mmap=mmap)
    assert torch.equal(state["weights"], torch.full((1000,), 7.0))


@pytest.mark.parametrize("size", [0, 1, 4096, 2**21 - 1, 2**21, 2**21 + 1, 2**22 - 1, 2**22, 2**22 + 1, 20_000_003])
def test_a_file_is_what_was_written_and_so_is_its_checksum(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    with DirectFile(tmp_path / "file") as file:
        for start in range(0, size, 7_000_001):
            file.write(content[start : start + 7_000_001])
        entry = file.commit()
    assert (tmp_path / "file").read_bytes() == content
    verify_file(tmp_path / "file", entry)


@pytest.mark.parametrize("refused", ["open", "write"])
def test_where_direct_io_is_refused_it_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """Some file systems refuse the flag, some the first write."""
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system refuses O_DIRECT by itself")
    original: Callable[..., Any] = getattr(os, refused)
    refusals = 0

    def refuse(target: Any, argument: Any, *rest: Any) -> Any:
        nonlocal refusals
        flags = argument if refused == "open" else fcntl.fcntl(target, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            refusals += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(target, argument, *rest)

    content = os.urandom(20_000_003)
    with monkeypatch.context() as patch:
        patch.setattr(os, refused, refuse)
        with DirectFile(tmp_path / "file") as file:
            file.write(content)
            entry = file.commit()
    assert refusals == 1
    assert (tmp_path / "file").read_bytes() == content
    verify_file(tmp_path / "file", entry)


def test_a_file_that_was_refused_does_not_spoil_the_next(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), DirectFile(Path("/dev/full")) as refused:
        refused.write(os.urandom(20_000_003))
    content = os.urandom(20_000_003)
    with DirectFile(tmp_path / "file") as file:
        file.write(content)
        file.commit()
    assert (tmp_path / "file").read_bytes() == content


def test_the_members_checksums_of_torch_save_are_as_before_after_a_save(tmp_path: Path) -> None:
    assert get_crc32_options()
    write(tmp_path, 1)
    assert get_crc32_options()


def test_invariant_1_a_sigkill_before_any_operation_leaves_older_checkpoints_and_no_half_one(tmp_path: Path) -> None:
    seen = set()
    for directory in killed_at_every_operation(tmp_path, save_and_rotate):
        found = Catalog(directory)
        steps = [verify(path).global_step for path in found.paths()]  # none is half there
        seen.add(tuple(steps))
        newest = newest_good(found)
        assert newest is not None
        assert newest[1].global_step >= 200
        # The process that follows tidies up and goes on.
        found.clear_leftovers()
        if 300 not in steps:
            save_and_rotate(directory)
        found.rotate(EverySteps(keep=2, keep_best=0))
        assert sorted(path.name for path in directory.iterdir()) == ["step_00000200", "step_00000300"]
    assert seen == {(100, 200), (100, 200, 300), (200, 300)}, "before the commit, before the rotation, and after both"


def test_invariant_1_everything_is_synced_before_it_becomes_visible(tmp_path: Path) -> None:
    assert in_a_process(check_the_order_of_syncs, tmp_path) == 0


def test_a_committed_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    before = (path / "state.pt").read_bytes()
    with pytest.raises(FileExistsError):
        write(tmp_path, 5, numbers=2)
    assert (path / "state.pt").read_bytes() == before


def replace(directory: Path) -> None:
    write(directory, 200, metrics={"val/accuracy": 0.5})


def test_invariant_1_a_sigkill_while_one_is_replaced_leaves_the_one_or_the_other(tmp_path: Path) -> None:
    """One from before the evaluation of its state, for which there was no time then, by one from after it."""
    seen = set()
    for directory in killed_at_every_operation(tmp_path, replace):
        Catalog(directory).clear_leftovers()
        assert sorted(path.name for path in directory.iterdir()) == ["step_00000100", "step_00000200"]
        seen.add(bool(verify(directory / "step_00000200").metrics))
    assert seen == {False, True}
    with pytest.raises(FileExistsError):
        replace(directory)  # once is enough


@pytest.mark.parametrize("limit", [100_000, 20_000_000, 40_000_000])
def test_a_full_disk_leaves_nothing_behind_and_the_older_checkpoint_whole(tmp_path: Path, limit: int) -> None:
    """Full at the first block, at one that is written while the next is filled, and at the very last one."""
    write(tmp_path, 100)
    assert in_a_process(write_more_than_the_limit, tmp_path, limit) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000100"]
    assert verify(tmp_path / "step_00000100").global_step == 100


def test_an_old_half_written_folder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".tmp_step_00000009").mkdir(parents=True)
    (tmp_path / ".tmp_step_00000009" / "state.pt").write_bytes(b"half")
    assert verify(write(tmp_path, 9)).global_step == 9
