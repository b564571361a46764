"""From the bucket: resume by URL, and what is done about damage there. The machine itself goes in test_mirror.py."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from awscrt.checksums import crc64nvme

from src.checkpoint.checkpointer import Checkpointer
from src.checkpoint.manifest import CorruptCheckpoint
from src.checkpoint.remote import RemoteCatalog
from src.checkpoint.run_files import RunFiles
from src.storage.bucket import Bucket
from tests.conftest import TINY, Result, resummed
from tests.store import ROOT, RUN, Network, Store, damage, on_s3, steps_here, steps_there
from tests.test_resume import differences, state

Train = Callable[..., Result]


def fetched(store: Store, bucket: str, step: int) -> Any:
    """The state of a checkpoint as it is in the bucket."""
    body = store.read(bucket, f"{ROOT}/checkpoints/step_{step:08d}/state.pt")
    return torch.load(io.BytesIO(body), weights_only=True)


def test_resume_and_init_from_take_urls(train: Train, store: Store, bucket: str) -> None:
    options = (*TINY, *on_s3(store, bucket))
    train(*options, "trainer.epochs=2", "checkpoint.every=5")
    root = f"s3://{bucket}/{ROOT}"
    there = steps_there(store, bucket)
    urls = {root: 26, f"{root}/checkpoints/": 26, f"{root}/checkpoints/step_{there[0]:08d}": there[0]}
    for number, (url, step) in enumerate(urls.items()):
        result = train(*options, f"resume={url}", f"run=other{number}", "trainer.epochs=3")
        assert result.status == 0, result.output
        assert f"step {step}, epoch" in result.output
    result = train(*options, f"init_from={root}", "run=warm", "trainer.epochs=1")
    assert f"init_from={root}: loaded " in result.output
    url = f"{root}/checkpoints/step_00000026/state.pt"
    assert f"init_from={url}: loaded " in train(*options, f"init_from={url}", "run=warm2", "trainer.epochs=1").output
    assert not list(Path("outputs").rglob(".tmp_*"))


def test_resume_from_a_url_goes_back_once(train: Train, store: Store, bucket: str) -> None:
    options = (*TINY, *on_s3(store, bucket))
    train(*options, "trainer.epochs=1")
    command = (*options, f"resume=s3://{bucket}/{ROOT}", "run=other", "trainer.epochs=2")
    train(*command)
    assert "already done" in train(*command).output
    shutil.rmtree("outputs/other")
    assert "already done" in train(*command).output


@pytest.mark.parametrize("url", ["/nothing/here", "/holdfast/tiny/checkpoints/step_00000099", "/no.pt"])
def test_a_url_that_leads_nowhere(train: Train, store: Store, bucket: str, url: str) -> None:
    for key in ("resume", "init_from"):
        result = train(*TINY, *on_s3(store, bucket), f"{key}=s3://{bucket}{url}")
        assert result.status == 2, result.output
        assert f"error: {key}=s3://{bucket}{url}: " in result.output


def test_going_back_on_purpose_retires_what_lies_above_in_the_bucket_too(
    train: Train, store: Store, bucket: str
) -> None:
    options = (*TINY, *on_s3(store, bucket), "checkpoint.every=5", "checkpoint.keep=9")
    train(*options, "trainer.epochs=2")
    result = train(*options, f"resume={RUN}/checkpoints/step_00000010", "trainer.epochs=1")
    assert result.status == 0, result.output
    assert steps_there(store, bucket) == [5, 10, 13]
    assert f"{ROOT}/checkpoints/step_00000020/manifest.json.retired" in store.keys(bucket)


def test_starting_over_on_purpose_retires_all_of_the_bucket(train: Train, store: Store, bucket: str) -> None:
    options = (*TINY, *on_s3(store, bucket), "checkpoint.every=5")
    train(*options, "trainer.epochs=2")
    shutil.rmtree(RUN)
    result = train(*options, "resume=never", "trainer.epochs=1")
    assert result.status == 0, result.output
    assert steps_there(store, bucket) == [5, 10, 13]


def test_going_back_where_the_bucket_could_not_see_it_counts_all_the_same(
    train: Train, store: Store, bucket: str
) -> None:
    """Else the abandoned future would be the newest checkpoint as soon as the mirror is there again."""
    options = (*TINY, "checkpoint.every=5", "checkpoint.keep=9")
    train(*options, *on_s3(store, bucket), "trainer.epochs=2")
    train(*options, f"resume={RUN}/checkpoints/step_00000010", "trainer.epochs=1")
    assert steps_here() == [5, 10, 13]
    result = train(*options, *on_s3(store, bucket), "trainer.epochs=1")
    assert "gone back to step 10 on purpose" in result.output
    assert "step 13, epoch 1" in result.output
    assert steps_there(store, bucket) == [5, 10, 13]


def test_going_back_on_another_machine_counts_on_this_one(train: Train, store: Store, bucket: str) -> None:
    options = (*TINY, *on_s3(store, bucket), "checkpoint.every=5", "checkpoint.keep=9")
    train(*options, "trainer.epochs=2")
    RUN.rename("asleep")
    train(*options, f"resume=s3://{bucket}/{ROOT}/checkpoints/step_00000010", "trainer.epochs=1")
    shutil.rmtree(RUN)
    Path("asleep").rename(RUN)
    result = train(*options, "trainer.epochs=1")
    assert result.status == 0, result.output
    assert "step 13, epoch 1" in result.output
    assert "step_00000026 is retired" in result.output
    assert steps_here() == [5, 10, 13]
    assert differences(state(13), fetched(store, bucket, 13)) == []


def test_starting_over_where_the_bucket_could_not_see_it_counts_all_the_same(
    train: Train, store: Store, bucket: str
) -> None:
    options = (*TINY, "checkpoint.every=5", "checkpoint.keep=9")
    train(*options, *on_s3(store, bucket), "trainer.epochs=2")
    train(*options, "resume=never", "trainer.epochs=1")
    result = train(*options, *on_s3(store, bucket), "trainer.epochs=1")
    assert "begun anew on purpose" in result.output
    assert "step 13, epoch 1" in result.output
    assert steps_there(store, bucket) == [5, 10, 13]


def test_of_two_goings_back_both_count(train: Train, store: Store, bucket: str) -> None:
    """Else what lies below the second would be taken for the same in both histories."""
    options = (*TINY, "checkpoint.every=5", "checkpoint.keep=9")
    train(*options, *on_s3(store, bucket), "trainer.epochs=1")
    RUN.rename("asleep")
    train(*options, *on_s3(store, bucket), "resume=never", "init_from=asleep", "trainer.epochs=1")
    train(*options, *on_s3(store, bucket), f"resume={RUN}/checkpoints/step_00000010", "trainer.epochs=1")
    good = {step: fetched(store, bucket, step) for step in steps_there(store, bucket)}
    shutil.rmtree(RUN)
    Path("asleep").rename(RUN)
    result = train(*options, *on_s3(store, bucket), "trainer.epochs=1")
    assert result.status == 0, result.output
    assert "begun anew on purpose" in result.output
    assert sorted(good) == [5, 10, 13] == steps_there(store, bucket)
    for step, saved in good.items():
        assert differences(fetched(store, bucket, step), saved) == []


def test_going_back_to_a_url_of_the_run_itself_can_be_killed_before_anything_is_saved(
    train: Train, store: Store, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*TINY, *on_s3(store, bucket), "checkpoint.every=5", "checkpoint.keep=9")
    train(*options, "trainer.epochs=1")
    shutil.rmtree(RUN)
    command = (*options, f"resume=s3://{bucket}/{ROOT}/checkpoints/step_00000010", "trainer.epochs=1")

    def die(*arguments: object) -> None:
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "_save_at_last", die)
        assert train(*command).status == 137
    assert steps_there(store, bucket) == [5, 10]
    result = train(*command)
    assert result.status == 0, result.output
    assert steps_there(store, bucket) == [5, 10, 13]


def test_starting_over_because_the_mirror_was_forgotten_abandons_nothing(
    train: Train, store: Store, bucket: str
) -> None:
    options = (*TINY, "checkpoint.every=5", "checkpoint.keep=9")
    train(*options, *on_s3(store, bucket), "trainer.epochs=2")
    shutil.rmtree(RUN)
    train(*options, "trainer.epochs=1")
    result = train(*options, *on_s3(store, bucket), "trainer.epochs=2")
    assert "step 26, epoch 2" in result.output
    assert 26 in steps_there(store, bucket)


def test_going_back_to_a_path_is_done_once_also_if_the_project_lies_elsewhere_now(
    train: Train, store: Store, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(*TINY, "run=base", "trainer.epochs=1")
    command = (*TINY, *on_s3(store, bucket), "resume=outputs/base", "trainer.epochs=2")
    train(*command)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # another machine: base is not here, nor is the run
    result = train(*command)
    assert result.status == 0, result.output
    assert "resume=outputs/base: already done" in result.output
    assert "step 26, epoch 2" in result.output
    assert steps_there(store, bucket) == [13, 26]


# --- damage in the bucket ---


@pytest.mark.parametrize("how", ["a flipped bit", "truncated", "missing", "no manifest of ours"])
def test_what_was_damaged_in_the_bucket_and_is_whole_here_is_uploaded_again(
    train: Train, store: Store, bucket: str, how: str
) -> None:
    options = (*TINY, *on_s3(store, bucket), "checkpoint.every=5")
    train(*options, "trainer.epochs=1")
    damage(store, bucket, 10, how)
    result = train(*options, "trainer.epochs=1")
    assert result.status == 0, result.output
    assert differences(fetched(store, bucket, 10), state(10)) == []
    assert RemoteCatalog(Bucket(bucket, endpoint_url=store.endpoint), f"{ROOT}/checkpoints").verify(10)


@pytest.mark.parametrize("how", ["a flipped bit", "truncated", "missing", "no manifest of ours"])
def test_a_damaged_checkpoint_in_the_bucket_is_skipped_and_the_one_before_is_used(
    train: Train, store: Store, bucket: str, how: str
) -> None:
    options = (*TINY, "scheduler=none", "checkpoint.every=5", "checkpoint.keep=9")
    train(*options, "trainer.epochs=2", "run=whole")
    train(*options, *on_s3(store, bucket), "trainer.epochs=1")
    shutil.rmtree(RUN)
    damage(store, bucket, 13, how)
    result = train(*options, *on_s3(store, bucket), "trainer.epochs=2")
    assert result.status == 0, result.output
    assert f"damaged checkpoint of step 13 in s3://{bucket}/{ROOT}" in result.output
    assert "step 10, epoch 0" in result.output
    assert differences(state(26), state(26, Path("outputs/whole"))) == []
    assert steps_here() == [10, 13, 15, 20, 25, 26]
    assert steps_there(store, bucket) == [5, *steps_here()]


def test_if_none_is_good_training_does_not_start_over(train: Train, store: Store, bucket: str) -> None:
    options = (*TINY, *on_s3(store, bucket))
    train(*options, "trainer.epochs=1")
    shutil.rmtree(RUN)
    damage(store, bucket, 13, "a flipped bit")
    result = train(*options, "trainer.epochs=1")
    assert result.status == 3
    assert "none can be read (step 13 in s3://" in result.output
    assert steps_there(store, bucket) == [13]


def test_a_bit_flipped_on_the_way_down_is_no_damage(
    train: Train, store: Store, network: Network, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*TINY, "checkpoint.every=5", "model.width=64")
    train(*options, *on_s3(store, bucket), "trainer.epochs=1")
    shutil.rmtree(RUN)
    network.corrupt_downloads = 1
    result = train(*options, *on_s3(network, bucket), "trainer.epochs=1")
    assert network.corrupt_downloads == 0
    assert result.status == 0, result.output
    assert "arrived damaged" in result.output
    assert "step 13, epoch 1" in result.output


def test_what_was_abandoned_is_not_forgotten_before_its_successor_has_arrived(
    train: Train, store: Store, bucket: str
) -> None:
    options = (*TINY, *on_s3(store, bucket))
    train(*options, "trainer.epochs=1")
    key = f"{ROOT}/checkpoints/step_00000013/manifest.json"
    store.write(bucket, f"{key}.retired", store.read(bucket, key))  # as `resume=PATH` does; then the disk is lost
    store.client().delete_object(Bucket=bucket, Key=key)
    shutil.rmtree(RUN)
    result = train(*options, "trainer.epochs=1")
    assert result.status == 3
    assert "step 13 in s3://" in result.output
    assert "retired earlier" in result.output
    assert train(*options, "resume=never", "trainer.epochs=1").status == 0


def test_a_checkpoint_that_was_saved_broken_does_not_block_the_one_before(
    train: Train, store: Store, bucket: str
) -> None:
    options = (*TINY, *on_s3(store, bucket), "checkpoint.every=5", "checkpoint.keep=9")
    train(*options, "trainer.epochs=1")
    folder = RUN / "checkpoints/step_00000013"
    torch.save({"global_step": 99}, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    body = (folder / "state.pt").read_bytes()
    manifest["files"]["state.pt"] = {"size": len(body), "checksum": f"crc64nvme:{crc64nvme(body):016x}"}
    store.write(bucket, f"{ROOT}/checkpoints/step_00000013/state.pt", body)
    store.write(bucket, f"{ROOT}/checkpoints/step_00000013/manifest.json", resummed(json.dumps(manifest)).encode())
    shutil.rmtree(RUN)
    result = train(*options, "trainer.epochs=1")
    assert result.status == 0, result.output
    assert "step 10, epoch 0" in result.output


def test_a_damaged_local_checkpoint_is_replaced_from_the_bucket(train: Train, store: Store, bucket: str) -> None:
    options = (*TINY, *on_s3(store, bucket))
    train(*options, "trainer.epochs=1")
    (RUN / "checkpoints/step_00000013/state.pt").write_bytes(b"rubbish")
    result = train(*options, "trainer.epochs=2")
    assert result.status == 0, result.output
    assert "set aside as step_00000013.corrupt" in result.output
    assert "step 13, epoch 1" in result.output


def test_a_damaged_local_checkpoint_is_not_mirrored(train: Train, store: Store, bucket: str) -> None:
    train(*TINY, "trainer.epochs=1", "checkpoint.every=5")
    (RUN / "checkpoints/step_00000005/state.pt").write_bytes(b"rubbish")
    result = train(*TINY, *on_s3(store, bucket), "trainer.epochs=1", "checkpoint.every=5")
    assert result.status == 0, result.output
    assert "step_00000005 is damaged and is not mirrored" in result.output
    assert steps_there(store, bucket) == [10, 13]


def test_names_in_a_bucket_lead_nowhere_else(
    store: Store, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = [
        "tensorboard/../../evil",
        "tensorboard/.ssh",
        "tensorboard//etc/passwd",
        ".hydra/../evil.yaml",
        "train.log.d/x",
        "checkpoints/step_00000001/../../step_00000002/manifest.json",
        "checkpoints/step_000000001/manifest.json",
        "checkpoints/step_00000001/manifest.json/",
    ]
    good = ["tensorboard/events.1", "tensorboard/deep/events.2", ".hydra/config.yaml", "train.log"]
    for name in good:
        store.write(bucket, f"{ROOT}/{name}", b"x")
    # This server refuses most of them; another may not.
    keys = [(f"{ROOT}/{name}", 1) for name in [*hostile, *good]]
    monkeypatch.setattr(Bucket, "keys", lambda self, prefix: [(key, size) for key, size in keys if prefix in key])
    client = Bucket(bucket, endpoint_url=store.endpoint)
    inner = tmp_path / "a" / "b"
    RunFiles(client, ROOT, inner).fetch_all()
    assert sorted(path.relative_to(inner).as_posix() for path in inner.rglob("*") if path.is_file()) == sorted(good)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert RemoteCatalog(client, f"{ROOT}/checkpoints").steps() == []


def test_a_thousand_checkpoints_are_two_requests_to_list_and_one_to_resume_from(
    network: Network, store: Store, bucket: str
) -> None:
    s3 = store.client()
    for step in range(1, 1001):
        s3.put_object(Bucket=bucket, Key=f"{ROOT}/checkpoints/step_{step:08d}/manifest.json", Body=b"{}")
        s3.put_object(Bucket=bucket, Key=f"{ROOT}/checkpoints/step_{step:08d}/state.pt", Body=b"")
    remote = RemoteCatalog(Bucket(bucket, endpoint_url=network.endpoint), f"{ROOT}/checkpoints")
    assert remote.steps() == list(range(1, 1001))
    assert len(network.requests) <= 3
    assert isinstance(remote.manifests([1, 2])[1], CorruptCheckpoint)
