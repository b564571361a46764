"""Input that somebody, or a broken disk, made up: an error that says so, never anything else."""

import contextlib
import json
import math
import pickle
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from awscrt.checksums import crc64nvme
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hypothesis import assume, example, given
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from src.checkpoint.catalog import Catalog, verify
from src.checkpoint.checksum import format_checksum
from src.checkpoint.manifest import FORMAT, CorruptCheckpoint, Manifest, parse_manifest, summed
from src.checkpoint.remote import RemoteCatalog
from src.checkpoint.resume import load_checkpoint
from src.checkpoint.run_files import RunFiles
from src.checkpoint.writer import write_checkpoint
from src.errors import CheckpointError, HoldfastError
from src.goodput import account_of, lives_of
from src.launch import build
from src.run import register_resolvers, run_name
from src.storage.bucket import Bucket, Stat
from tests.conftest import REPOSITORY

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


# --- manifests ---


def parsed(text: bytes) -> Manifest | None:
    try:
        return parse_manifest(text, "manifest.json")
    except (CorruptCheckpoint, CheckpointError):
        return None


@given(st.binary(max_size=300))
def test_any_bytes_as_a_manifest(text: bytes) -> None:
    parsed(text)


@given(json_values)
@example([[]] * 10)
def test_any_json_as_a_manifest(value: Any) -> None:
    parsed(json.dumps(value).encode())
    parsed(summed(json.dumps(value, indent=2)).encode())


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"format": 1e999}', b'{"format": ' + b"1" * 5000 + b"}"])
def test_json_that_breaks_parsers(text: bytes) -> None:
    assert parsed(text) is None


@given(st.data())
def test_a_manifest_with_one_thing_changed(data: st.DataObject) -> None:
    entry = {"size": 1, "checksum": "crc64nvme:0000000000000000"}
    empty: dict[str, Any] = {
        "best": None,
        "environment": {},
        "config": {},
        "created": "",
        "resumed_from": None,
        "forks": [],
    }
    files, metrics = {"state.pt": entry}, {"a": 1.0}
    manifest = empty | {"format": FORMAT, "global_step": 3, "epoch": 0, "files": files, "metrics": metrics, "loss": 0.5}
    place = data.draw(st.sampled_from([manifest, files, entry, metrics]))
    assert isinstance(place, dict)
    place[data.draw(st.sampled_from([*place, "../../evil", "/etc/passwd"]))] = data.draw(json_values)
    found = parsed(summed(json.dumps(manifest, indent=2)).encode())
    if found is not None:
        assert all("/" not in name and name not in (".", "..") for name in found.files)
        found.to_json()


# --- checkpoints ---


def checkpoint_of(directory: Path, content: bytes) -> Path:
    """A checkpoint whose manifest is good, and whose state is this: what only a malicious writer could make."""
    path = directory / "step_00000003"
    path.mkdir(exist_ok=True)
    (path / "state.pt").write_bytes(content)
    entry = {"size": len(content), "checksum": format_checksum(crc64nvme(content))}
    manifest = {"format": FORMAT, "global_step": 3, "epoch": 0, "files": {"state.pt": entry}}
    (path / "manifest.json").write_text(summed(json.dumps(manifest, indent=2)))
    assert verify(path)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("whole")
    state = {"global_step": 3, "weights": torch.arange(50.0), "more": [1, "two", None, {"three": torch.ones(2, 2)}]}
    path, _ = write_checkpoint(Catalog(directory), state, Manifest(3, 0, {}))
    return (path / "state.pt").read_bytes()


@given(data=st.data())
def test_a_state_with_some_bytes_changed_loads_or_is_damaged(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content)))
        change = data.draw(st.binary(min_size=0, max_size=8))
        content[position : position + data.draw(st.integers(0, 8))] = change
    with contextlib.suppress(CorruptCheckpoint):
        load_checkpoint(checkpoint_of(tmp_path, bytes(content)))


class Evil:
    def __init__(self, call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


@given(
    call=st.sampled_from([eval, exec, print, open, getattr, pickle.loads, __import__, Path, compile]),
    arguments=st.lists(st.text(max_size=10) | st.integers(), max_size=3),
    wrap=st.sampled_from([lambda evil: evil, lambda evil: {"global_step": 3, "x": [evil]}]),
    zipped=st.booleans(),
)
def test_nothing_in_a_state_is_called(tmp_path: Path, call: Any, arguments: list[Any], wrap: Any, zipped: bool) -> None:
    state = tmp_path / "made.pt"
    torch.save(wrap(Evil((call, tuple(arguments)))), state, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CorruptCheckpoint, match=r"cannot be loaded|is not the state"):
        load_checkpoint(checkpoint_of(tmp_path, state.read_bytes()))


@given(content=st.binary(max_size=200))
@example(b"PK\x03\x04")
@example(pickle.dumps({"global_step": 3}))
def test_any_bytes_as_a_state(tmp_path: Path, content: bytes) -> None:
    with contextlib.suppress(CorruptCheckpoint):
        load_checkpoint(checkpoint_of(tmp_path, content))


# --- names ---

keys = st.from_regex(r"[a-z]{1,8}(\.[a-z]{1,8}){0,2}", fullmatch=True)


@given(st.lists(st.tuples(keys, st.text(string.printable, max_size=60)), max_size=5), st.randoms())
def test_whatever_the_overrides_the_name_is_one_folder_whatever_their_order(
    overrides: list[tuple[str, str]], chance: Any
) -> None:
    given_ones = [f"{key}={value}" for key, value in dict(overrides).items()]
    try:
        name = run_name(None, given_ones)
    except HydraException:
        assume(False)
    assert 0 < len(name.encode()) <= 200
    assert not set(name) & set("/\\\0=, \n")
    assert not name.startswith(".")
    chance.shuffle(given_ones)
    assert run_name(None, given_ones) == name


@given(st.text(max_size=40))
def test_a_name_by_hand_is_one_folder_or_refused(name: str) -> None:
    try:
        assert run_name(name, []) == name
    except HoldfastError:
        return
    assert "/" not in name
    assert name.strip(".")


PIECES = ("..", ".", "", "tensorboard", "a", "/", "train.log", ".hydra", "goodput", "1-1.json")


@given(
    names=st.lists(
        st.lists(st.sampled_from(PIECES)).map("/".join) | st.text(max_size=30),
        max_size=5,
    )
)
def test_keys_in_a_bucket_never_lead_out_of_the_run_directory(tmp_path: Path, names: list[str]) -> None:
    class Hostile(Bucket):
        def __init__(self) -> None:
            self.name = "hostile"

        def keys(self, prefix: str) -> Any:
            return [(f"p/{name}", 0) for name in names if f"p/{name}".startswith(prefix)]

        def stat(self, key: str) -> Stat:
            return Stat(0, None)

        def ask(self, *arguments: Any, **parameters: Any) -> Any:
            raise AssertionError

    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True, exist_ok=True)
    for bring in (RunFiles(Hostile(), "p", inner).fetch_history, RunFiles(Hostile(), "p", inner).fetch_all):
        bring()
    assert list(tmp_path.iterdir()) == [tmp_path / "outer"]
    assert list((tmp_path / "outer").iterdir()) == [inner]
    assert all(step >= 0 for step in RemoteCatalog(Hostile(), "p").steps())


# --- accounts ---


@given(value=json_values)
@example({"began": 0, "starting": 0, "first_step": 0, "last_step": 0, "training": math.inf, "stalled": 0})
def test_any_json_as_an_entry_of_the_account(tmp_path: Path, value: Any) -> None:
    (tmp_path / "goodput").mkdir(exist_ok=True)
    (tmp_path / "goodput" / "1-1.json").write_text(json.dumps(value))
    str(account_of(lives_of(tmp_path)))


# --- settings ---


SMALL = ("data=synthetic", "model=small_cnn", "data.train_size=20", "data.batch_size=5")


@pytest.fixture(scope="module")
def configured() -> Any:
    register_resolvers()
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return compose("config", [*SMALL, "storage=s3", "storage.bucket=b", "preemption=ec2"])


values = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["${nothing}", "???", "-1", "1e-3", "nan"])
    | st.lists(st.integers(-1, 3), max_size=3)
    | st.dictionaries(st.text("ab", min_size=1, max_size=2), st.integers(0, 3), max_size=2)
)
GROUPS = ("trainer", "checkpoint", "storage", "preemption", "data", "model", "optimizer", "scheduler")


@pytest.mark.parametrize("group", GROUPS)
@given(data=st.data())
def test_any_value_of_any_setting_works_or_is_refused_by_name(configured: Any, group: str, data: st.DataObject) -> None:
    config = configured[group].copy()
    key = data.draw(st.sampled_from([name for name in config if not str(name).startswith("_")]))
    config[key] = data.draw(values)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments: dict[str, Any] = {"optimizer": (model.parameters(),), "scheduler": (optimizer, 10)}
    shape = {"num_classes": 10, "channels": 3, "image_size": 8} if group == "model" else {}
    try:
        build(group, config, *arguments.get(group, ()), **shape)
    except (HoldfastError, OmegaConfBaseException) as error:
        assert str(error)
