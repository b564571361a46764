"""A model of which each rank has a piece (FSDP2): the same promises, under the same manifest."""

import os
import pickle
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from src.checkpoint.__main__ import main
from src.checkpoint.catalog import verify
from src.checkpoint.manifest import CorruptCheckpoint, FileEntry, Manifest
from src.checkpoint.resume import load_checkpoint, open_checkpoint
from src.checkpoint.sharded import METADATA_NAME, Pieces
from src.distributed import World
from src.errors import ConfigError
from src.trainer import Trainer
from tests.conftest import LAST, LONG, TINY_DATA, Result, Training
from tests.ranks import kill, torchrun, two_nodes, workers_of
from tests.store import Store
from tests.test_resume import differences
from tests.test_training import curves, newest_step

SHARDED = (*LONG, "trainer=fsdp")


def final_state(run: Path) -> Any:
    return load_checkpoint(run / "checkpoints" / LAST)[1]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a sharded run that was left alone."""
    training = Training(tmp_path_factory.mktemp("undisturbed_shards"), [])
    result = training.finish(torchrun(training, 2, *SHARDED))
    assert result.status == 0, result.output
    return training.run


def test_each_rank_writes_its_piece_under_one_manifest(undisturbed: Path) -> None:
    path = undisturbed / "checkpoints" / LAST
    manifest = verify(path)
    assert set(manifest.files) == {"state.pt", METADATA_NAME, "__0_0.distcp", "__1_0.distcp"}
    assert manifest.world_size == 2
    rest = torch.load(path / "state.pt", weights_only=True)
    assert rest["global_step"] == 104
    assert all(tensor.is_meta for tensor in rest["model_state_dict"].values() if tensor.dim() > 1)
    assert len(curves(undisturbed)["train/loss"]) == 104


def test_invariant_4_killed_and_its_disk_lost_it_ends_with_the_same_bits(
    training: Training, undisturbed: Path, store: Store, bucket: str
) -> None:
    command = (*SHARDED, "storage=s3", f"storage.bucket={bucket}", f"storage.endpoint_url={store.endpoint}")
    agent = torchrun(training, 2, *command, restarts=3)
    training.wait_until(agent, lambda: newest_step(training.checkpoints) >= 20)
    kill(workers_of(agent)[1])
    training.wait_until(agent, lambda: newest_step(training.checkpoints) >= 50)
    os.kill(agent.pid, signal.SIGTERM)
    result = training.finish(agent)
    assert "stopped by SIGTERM after step" in result.output, result.output
    assert "resumed from" in result.output
    shutil.rmtree(training.run)
    result = training.finish(torchrun(training, 2, *command))
    assert result.status == 0, result.output
    assert "fetched s3://" in result.output
    assert differences(final_state(undisturbed), final_state(training.run)) == []
    assert curves(training.run) == curves(undisturbed)


def test_it_goes_on_with_other_numbers_of_ranks_and_other_strategies(
    train: Callable[..., Result], training: Training, tmp_path: Path
) -> None:
    """Without dropout and BatchNorm, all of them take the same steps but for rounding."""
    model = ("model=vit_b_16", "model.patch_size=4", "model.layers=2", "model.heads=2", "model.width=16")
    command = (*TINY_DATA, *model, "scheduler=none", "trainer.accumulate=3")
    assert train(*command, "trainer.epochs=5", "run=alone").status == 0
    for epochs, (strategy, ranks) in enumerate([("fsdp", 2), ("fsdp", 3), ("ddp", 2), ("", 1), ("fsdp", 2)], start=1):
        options = (*command, f"trainer.epochs={epochs}", *([f"trainer={strategy}"] if strategy else []))
        result = training.finish(torchrun(training, ranks, *options)) if strategy else train(*options)
        assert result.status == 0, result.output
        assert epochs == 1 or f"step {13 * (epochs - 1)}, epoch {epochs - 1}" in result.output
    alone = load_checkpoint(tmp_path / "outputs/alone/checkpoints/step_00000065")[1]
    together = load_checkpoint(training.checkpoints / "step_00000065")[1]
    for key, weights in alone["model_state_dict"].items():
        assert torch.allclose(weights, together["model_state_dict"][key], atol=1e-4), key
    target = tmp_path / "weights.safetensors"
    assert main(["export", str(training.run), str(target)]) == 0
    assert (
        differences(dict(sorted(together["model_state_dict"].items())), dict(sorted(load_file(target).items()))) == []
    )


def test_two_nodes_that_share_a_disk_end_like_two_ranks_of_one(training: Training, undisturbed: Path) -> None:
    for result in map(training.finish, two_nodes(training, [training.directory] * 2, *SHARDED)):
        assert result.status == 0, result.output
    assert differences(final_state(undisturbed), final_state(training.run)) == []


def test_nodes_that_share_no_disk_are_refused_before_the_first_step(training: Training, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("hiding a directory from a process needs the right to mount")
    nodes = two_nodes(training, [tmp_path / "one", tmp_path / "two"], *SHARDED, hidden=tmp_path / "one")
    results = [training.finish(node) for node in nodes]
    assert all(result.status for result in results)
    assert re.search(r"error: hydra\.run\.dir=.*/one/outputs/tiny: rank 1 has no such folder", results[0].output)
    assert not list(tmp_path.rglob("step_*"))
    assert not list(tmp_path.rglob(".tmp_*"))


class Malicious:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def metadata(kind: Any, file: str, size: int) -> bytes:
    places = {MetadataIndex("weight"): _StorageInfo(file, 0, size)}
    return pickle.dumps(Metadata(state_dict_metadata={"weight": kind}, storage_data=places))


@pytest.mark.parametrize("how", ["a class", "nothing", "nonsense", "no metadata", "bytes", "another file"])
def test_invariant_9_reading_the_metadata_executes_nothing_and_reads_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.chdir(tmp_path)
    piece, elsewhere = tmp_path / "__0_0.distcp", tmp_path / "elsewhere"
    torch.save(Malicious(), piece)
    torch.save(torch.ones(2), elsewhere)
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([2]), [chunk])
    content = {
        "a class": pickle.dumps(Malicious()),
        "nothing": b"",
        "nonsense": b"nonsense",
        "no metadata": pickle.dumps({}),
        "bytes": metadata(BytesStorageMetadata(), piece.name, piece.stat().st_size),
        "another file": metadata(tensor, str(elsewhere), elsewhere.stat().st_size),
    }[how]
    (tmp_path / METADATA_NAME).write_bytes(content)
    files = {name: FileEntry(1, "") for name in ("state.pt", METADATA_NAME, piece.name)}
    (tmp_path / "manifest.json").write_text(Manifest(1, 0, files).to_json())
    with pytest.raises(CorruptCheckpoint):
        Pieces(tmp_path).read(("weight",), torch.empty(2, device="meta"))
    assert not Path("executed").exists()


def test_invariant_5_a_checkpoint_of_which_pieces_are_missing_is_damaged(undisturbed: Path, tmp_path: Path) -> None:
    path = undisturbed / "checkpoints" / LAST
    state = open_checkpoint(path)[1]["model_state_dict"]
    name, outline = next((name, tensor) for name, tensor in state.items() if tensor.is_meta)
    Pieces(path).check({"model_state_dict": {name: outline}})
    for other in ({"another": outline}, {name: torch.empty(1, device="meta")}):
        with pytest.raises(CorruptCheckpoint, match="has no model_state_dict"):
            Pieces(path).check({"model_state_dict": other})
    known = pickle.loads((path / METADATA_NAME).read_bytes())
    known.state_dict_metadata[f"model_state_dict.{name}"].chunks.pop()
    copy = shutil.copytree(path, tmp_path / path.name)
    (copy / METADATA_NAME).write_bytes(pickle.dumps(known))
    with pytest.raises(CorruptCheckpoint, match="has not all pieces of model_state_dict"):
        Pieces(copy).check({"model_state_dict": {name: outline}})


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error"), MemoryError()])
def test_invariant_5_what_is_no_damage_is_not_taken_for_it(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def refuse(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(FileSystemReader, "read_data", refuse)
    with pytest.raises(type(error)):
        load_checkpoint(undisturbed / "checkpoints" / LAST)


class Two(World):
    size = 2


@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"compile": True}])
def test_what_does_not_go_together_is_refused(settings: dict[str, Any]) -> None:
    trainer = Trainer(epochs=1, device="cpu", strategy="fsdp", **settings)
    with pytest.raises(ConfigError, match=rf"^trainer\.{next(iter(settings))}=.* does not go with trainer=fsdp"):
        trainer.set_up(Two())
