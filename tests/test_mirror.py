"""The mirror: what is committed reaches the bucket, whatever happens, and an empty machine goes on from there."""

import json
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from awscrt.checksums import crc64nvme

from src.checkpoint import mirror as mirror_module
from src.checkpoint.catalog import Catalog
from src.checkpoint.manifest import CorruptCheckpoint, Manifest
from src.checkpoint.mirror import BucketMirror
from src.checkpoint.policy import EverySteps
from src.checkpoint.remote import RemoteCatalog
from src.checkpoint.run_files import RunFiles
from src.checkpoint.writer import write_checkpoint
from src.storage.bucket import Bucket
from src.storage.failures import Refused
from src.storage.s3 import S3Storage
from tests.conftest import LAST, LONG, TINY, Result, Training
from tests.store import SECRET, Network, Store, error_answer
from tests.test_resume import differences, state
from tests.test_training import curves, final_state

Train = Callable[..., Result]
Fault = Callable[[Network], None]
RUN = Path("outputs/tiny")
ROOT = "holdfast/tiny"


def on_s3(place: Store | Network, bucket: str, *more: str) -> tuple[str, ...]:
    where = ("storage=s3", f"storage.bucket={bucket}", f"storage.endpoint_url={place.endpoint}")
    return (*where, "storage.lease_seconds=3", *more)


def steps_there(store: Store, bucket: str, root: str = ROOT) -> list[int]:
    manifests = re.findall(
        r"step_(\d{8})/manifest\.json\n", "\n".join(store.keys(bucket, f"{root}/checkpoints")) + "\n"
    )
    return sorted(map(int, manifests))


def steps_here(run: Path = RUN) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_????????"))


# --- all is well ---


def test_what_is_kept_here_is_there_byte_for_byte_and_the_log_with_it(train: Train, store: Store, bucket: str) -> None:
    result = train(*TINY, *on_s3(store, bucket), "trainer.epochs=2", "checkpoint.every=5")
    assert result.status == 0, result.output
    here = {path.relative_to(RUN).as_posix(): path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    del here[".lock"], here[".home"]
    assert sorted(store.keys(bucket)) == sorted(f"{ROOT}/{name}" for name in here)
    for name, content in here.items():
        assert store.read(bucket, f"{ROOT}/{name}") == content, name
    assert f"mirror         s3://{bucket}/{ROOT}, up to step 26" in result.output


def test_a_finished_run_that_is_run_again_finds_all_there(train: Train, store: Store, bucket: str) -> None:
    train(*TINY, *on_s3(store, bucket), "trainer.epochs=1")
    before = steps_there(store, bucket)
    again = train(*TINY, *on_s3(store, bucket), "trainer.epochs=1")
    assert again.status == 0
    assert "nothing left to train" in again.output
    assert steps_there(store, bucket) == before == [13]


def test_the_machine_is_gone_and_the_same_command_goes_on_with_the_same_bits(
    train: Train, store: Store, bucket: str
) -> None:
    options = (*TINY, "scheduler=none", "checkpoint.every=5")
    train(*options, "trainer.epochs=3", "run=whole")
    train(*options, *on_s3(store, bucket), "trainer.epochs=1")
    log = (RUN / "train.log").read_text()
    shutil.rmtree("outputs/tiny")
    result = train(*options, *on_s3(store, bucket), "trainer.epochs=3")
    assert result.status == 0, result.output
    assert f"fetched s3://{bucket}/{ROOT}/checkpoints/step_00000013" in result.output
    assert "step 13, epoch 1" in result.output
    assert differences(state(39), state(39, Path("outputs/whole"))) == []
    assert curves(RUN) == curves(Path("outputs/whole"))
    assert (RUN / "train.log").read_text().startswith(log)


def test_without_a_mirror_nothing_of_it_is_needed(train: Train) -> None:
    result = train(*TINY, "trainer.epochs=1")
    assert result.status == 0
    assert "s3://" not in result.output


def test_every_nth_checkpoint_and_the_last_and_no_more_than_are_kept(train: Train, store: Store, bucket: str) -> None:
    options = on_s3(store, bucket, "storage.every=1000", "storage.keep=1", "storage.prefix=''")
    train(*TINY, *options, "trainer.epochs=2", "checkpoint.every=2", "checkpoint.keep=5", "checkpoint.keep_best=0")
    assert steps_there(store, bucket, "tiny") == [26]
    assert len(steps_here()) == 5


def test_what_is_missing_there_is_uploaded_by_the_next_life(train: Train, store: Store, bucket: str) -> None:
    train(*TINY, "trainer.epochs=1", "checkpoint.every=5")
    result = train(*TINY, *on_s3(store, bucket), "trainer.epochs=1", "checkpoint.every=5")
    assert result.status == 0
    assert steps_there(store, bucket) == steps_here() == [5, 10, 13]


def test_another_run_of_the_same_bucket_is_left_alone(train: Train, store: Store, bucket: str) -> None:
    train(*TINY, *on_s3(store, bucket), "trainer.epochs=1")
    train(*TINY, *on_s3(store, bucket), "trainer.epochs=1", "run=tiny2")
    assert steps_there(store, bucket) == steps_there(store, bucket, "holdfast/tiny2") == [13]


def test_no_secret_is_left_anywhere(train: Train, store: Store, bucket: str) -> None:
    result = train(*TINY, *on_s3(store, bucket), "trainer.epochs=1")
    files = [path.read_bytes() for path in Path("outputs").rglob("*") if path.is_file()]
    there = [store.read(bucket, key) for key in store.keys(bucket)]
    assert files
    assert there
    assert all(SECRET.encode() not in content for content in [*files, *there, result.output.encode()])


def test_how_far_behind_the_bucket_is_is_shown(train: Train, store: Store, bucket: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(*TINY, *on_s3(store, bucket), "trainer.epochs=2")
    events = EventAccumulator(str(RUN / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert {event.step: event.value for event in events.Scalars("mirror/steps_at_risk")}[13] == 13.0
    for tag in ("mirror/checkpoints_waiting", "mirror/megabytes_waiting", "checkpoint/steps_at_risk"):
        assert len(events.Scalars(tag)) == 26


# --- resume from elsewhere ---


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


# --- damage in the bucket ---


def damage(store: Store, bucket: str, step: int, how: str) -> None:
    folder = f"{ROOT}/checkpoints/step_{step:08d}"
    if how == "a flipped bit":
        state = bytearray(store.read(bucket, f"{folder}/state.pt"))
        state[len(state) // 2] ^= 1
        store.write(bucket, f"{folder}/state.pt", bytes(state))
    elif how == "truncated":
        store.write(bucket, f"{folder}/state.pt", store.read(bucket, f"{folder}/state.pt")[:-1000])
    elif how == "missing":
        store.client().delete_object(Bucket=bucket, Key=f"{folder}/state.pt")
    elif how == "no manifest of ours":
        store.write(bucket, f"{folder}/manifest.json", b'{"format": 1, "files": {"../../../../evil": {}}}')


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
    store.write(bucket, f"{ROOT}/checkpoints/step_00000013/manifest.json", json.dumps(manifest).encode())
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


# --- kills ---


def started(training: Training, *options: str) -> subprocess.Popen[str]:
    return training.start(*LONG, *options)


def test_killed_at_any_moment_of_an_upload_or_a_download_nothing_is_lost(
    training: Training, uninterrupted: Path, store: Store, bucket: str
) -> None:
    options = on_s3(store, bucket, "storage.max_mb_per_second=1.5")
    kills = 0
    for step in (6, 30, 60):
        process = started(training, *options)

        def uploading(step: int = step) -> bool:
            uploads = store.keys(bucket, f"{ROOT}/checkpoints/step_{step:08d}/")
            return bool(uploads) or max(steps_here(training.run), default=0) > step + 9

        kills += training.kill_when(process, uploading)
        shutil.rmtree(training.run)
        process = started(training, *options)
        kills += training.kill_when(process, lambda: any(training.checkpoints.glob(".tmp_step_*/state.pt")))
        shutil.rmtree(training.run)
    assert kills == 6
    result = training.finish(started(training, *on_s3(store, bucket)))
    assert result.status == 0, result.output
    assert differences(final_state(training.run), final_state(uninterrupted)) == []
    assert curves(training.run) == curves(uninterrupted)
    assert steps_there(store, bucket) == steps_here(training.run)
    assert store.client().list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []


# --- outages ---


def test_a_server_that_freezes_dies_and_comes_back_never_holds_up_training(
    training: Training, uninterrupted: Path, credentials: None, tmp_path: Path
) -> None:
    store, bucket = Store(tmp_path / "own store"), "own-bucket"
    try:
        store.client().create_bucket(Bucket=bucket)
        process = started(training, *on_s3(store, bucket))
        training.wait_until(process, lambda: steps_here(training.run)[-1:] >= [6])
        store.freeze()
        training.wait_until(process, lambda: steps_here(training.run)[-1:] >= [30])
        store.thaw()
        store.kill()
        log = training.run / "train.log"
        training.wait_until(
            process, lambda: "Training goes on" in log.read_text() and (training.checkpoints / LAST).exists()
        )
        store.start()
        result = training.finish(process)
        assert result.status == 0, result.output
        assert "mirror: s3://own-bucket/" in result.output
        assert "mirror: works again" in result.output
        assert steps_there(store, bucket) == steps_here(training.run)
        assert differences(final_state(training.run), final_state(uninterrupted)) == []
    finally:
        store.kill()


def drop(network: Network) -> None:
    network.drop = True
    network.cut()


def busy(network: Network) -> None:
    network.answer = error_answer(503, "SlowDown")


def no_rights(network: Network) -> None:
    network.answer = error_answer(403, "AccessDenied")


def slow(network: Network) -> None:
    network.delay = 0.2


def corrupting(network: Network) -> None:
    network.corrupt_uploads = 10


def once_begun(patch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Let something happen as soon as a mirror has begun its work."""
    begin = BucketMirror.begin

    def begin_and(self: BucketMirror, above: int, label: str) -> None:
        begin(self, above, label)
        happens()

    patch.setattr(BucketMirror, "begin", begin_and)


@pytest.mark.parametrize("fault", [drop, busy, no_rights, slow, corrupting])
def test_whatever_the_network_does_training_ends_and_all_is_there(
    train: Train,
    store: Store,
    network: Network,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., None],
) -> None:
    def fail_for_a_while() -> None:
        fault(network)

        def recover() -> None:
            network.drop, network.answer, network.delay, network.corrupt_uploads = False, None, 0.0, 0

        threading.Timer(3, recover).start()

    once_begun(monkeypatch, fail_for_a_while)
    monkeypatch.setattr(mirror_module, "_PAUSES", (0.1, 1.0))
    result = train(*TINY, *on_s3(network, bucket), "trainer.epochs=2", "checkpoint.every=5", "storage.lease_seconds=60")
    assert result.status == 0, result.output
    assert steps_there(store, bucket) == steps_here()


def test_an_outage_at_the_end_is_waited_for_only_so_long_and_the_exit_status_tells(
    train: Train, store: Store, network: Network, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        once_begun(patch, lambda: drop(network))
        options = (*TINY, "trainer.epochs=1", "checkpoint.every=5", "storage.flush_timeout=1")
        result = train(*options, *on_s3(network, bucket, "storage.lease_seconds=60"))
    assert result.status == 4, result.output
    assert f"not in s3://{bucket}/{ROOT}: step_00000005, step_00000010, step_00000013" in result.output
    assert "error: the run is done and safe in its directory, but not all of it is in s3://" in result.output
    assert "run the same command again to upload the rest" in result.output
    network.drop = False
    result = train(*options, *on_s3(network, bucket), "storage.flush_timeout=60")
    assert result.status == 0, result.output
    assert steps_there(store, bucket) == [5, 10, 13]


def test_a_store_that_is_down_when_the_run_begins_is_an_error_not_a_fresh_start(
    train: Train, network: Network, bucket: str
) -> None:
    drop(network)
    result = train(*TINY, *on_s3(network, bucket))
    assert result.status == 2
    assert "error: storage.bucket=" in result.output
    assert steps_here() == []


# --- what happens in the mirror's own thread ---


@pytest.fixture
def make(tmp_path: Path, store: Store, bucket: str) -> Iterator[Callable[..., BucketMirror]]:
    made = []

    def build(home: str = "here", place: Store | Network = store, **settings: Any) -> BucketMirror:
        settings = {"lease_seconds": 3, "flush_timeout": 30, "min_free_gb": 0, **settings}
        storage = S3Storage(bucket, endpoint_url=place.endpoint, **settings)
        directory = tmp_path / home / "checkpoints"
        directory.mkdir(parents=True, exist_ok=True)
        made.append(BucketMirror(storage, "run", Catalog(directory), EverySteps(keep=2, keep_best=0)))
        return made[-1]

    yield build
    for mirror in made:
        mirror.close()


def save(tmp_path: Path, step: int, home: str = "here") -> Path:
    return write_checkpoint(tmp_path / home / "checkpoints", {"global_step": step}, Manifest(step, 0, {}))[0]


def test_the_newest_goes_first_and_what_is_rotated_away_is_forgotten(
    make: Callable[..., BucketMirror], tmp_path: Path, network: Network, store: Store, bucket: str
) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    mirror = make(place=network)
    mirror.open()
    mirror.begin(above=4)
    mirror.flush()
    mirror.insist()
    puts = [int(step) for step in re.findall(r"PUT \S*step_0*(\d+)/manifest\.json", "\n".join(network.requests))]
    assert puts == [4, 3]  # two are kept there, so 1 and 2 are not worth the way


def test_invariant_6_what_is_being_uploaded_is_not_rotated_away(
    make: Callable[..., BucketMirror], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1)
    uploading, go_on = threading.Event(), threading.Event()
    upload = RemoteCatalog.upload

    def upload_slowly(*arguments: Any) -> None:
        uploading.set()
        go_on.wait(60)
        upload(*arguments)

    monkeypatch.setattr(RemoteCatalog, "upload", upload_slowly)
    mirror = make()
    mirror.open()
    mirror.begin(above=1)
    assert uploading.wait(60)
    save(tmp_path, 2)
    mirror._catalog.rotate(EverySteps(keep=1, keep_best=0))
    assert path.is_dir()
    go_on.set()
    mirror.flush()
    mirror.insist()
    mirror._catalog.rotate(EverySteps(keep=1, keep_best=0))
    assert not path.exists()


def test_a_second_machine_is_refused_and_a_fenced_one_stops(
    training: Training, store: Store, network: Network, bucket: str
) -> None:
    first = training.start(*LONG, *on_s3(network, bucket), "trainer.epochs=100000")
    training.wait_until(first, lambda: bool(steps_there(store, bucket)))
    second = Training(training.directory / "elsewhere", training._started)
    second.directory.mkdir()
    result = second.finish(second.start(*LONG, *on_s3(store, bucket)))
    assert result.status == 1, result.output
    assert re.search(r"error: s3://\S+/lease.json: process \d+ on \S+ is writing there, and is alive", result.output)

    drop(network)  # the first is cut off; to the others it looks dead
    result = second.finish(second.start(*LONG, *on_s3(store, bucket)))
    assert result.status == 0, result.output
    assert "taken over from process" in result.output
    there = steps_there(store, bucket)
    network.drop = False
    result = training.finish(first)
    assert result.status == 4, result.output
    assert "has been taken over by another machine" in result.output
    assert steps_there(store, bucket) == there  # nothing interleaved


def test_killed_and_started_again_on_the_same_machine_nobody_waits_for_the_lease(
    training: Training, store: Store, bucket: str
) -> None:
    options = on_s3(store, bucket, "storage.lease_seconds=600")
    process = started(training, *options)
    assert training.kill_when(process, lambda: steps_here(training.run)[-1:] >= [30])
    result = training.finish(started(training, *options))
    assert result.status == 0, result.output
    assert "is held by" not in result.output
    assert steps_there(store, bucket) == steps_here(training.run)
    assert LAST in result.output or (training.checkpoints / LAST).is_dir()


def test_asked_to_stop_it_takes_the_last_checkpoint_along(training: Training, store: Store, bucket: str) -> None:
    process = started(training, *on_s3(store, bucket), "trainer.epochs=100000")
    training.wait_until(process, lambda: steps_here(training.run)[-1:] >= [9])
    process.send_signal(signal.SIGTERM)
    result = training.finish(process)
    assert result.status == 128 + signal.SIGTERM, result.output
    assert steps_there(store, bucket) == steps_here(training.run)
    assert f"after step {steps_here(training.run)[-1]}, which is saved" in result.output


def test_what_a_killed_life_left_half_done_is_swept(
    make: Callable[..., BucketMirror], tmp_path: Path, store: Store, bucket: str
) -> None:
    save(tmp_path, 7)
    folder = "holdfast/run/checkpoints"
    stays = ["step_00000003/manifest.json", "step_00000003/state.pt"]
    stays += ["step_00000005/manifest.json.retired", "step_00000005/state.pt", "step_00000007/state.pt", "notes.txt"]
    for name in [*stays, "step_00000004/state.pt", "step_00000009/state.pt"]:
        store.write(bucket, f"{folder}/{name}", b"{}")
    store.client().create_multipart_upload(Bucket=bucket, Key=f"{folder}/step_00000008/state.pt")
    mirror = make()
    mirror.open()
    mirror.begin(above=7)
    mirror.flush()
    mirror.insist()
    there = [key.removeprefix(f"{folder}/") for key in store.keys(bucket, folder)]
    assert there == sorted([*stays, "step_00000007/manifest.json"])
    assert store.client().list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []


def test_who_may_not_list_unfinished_uploads_can_train_nevertheless(
    make: Callable[..., BucketMirror], tmp_path: Path, store: Store, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Bucket.ask

    def refuse(self: Bucket, operation: str, *arguments: Any, **parameters: Any) -> Any:
        if operation == "list_multipart_uploads":
            raise Refused("permission denied")
        return ask(self, operation, *arguments, **parameters)

    monkeypatch.setattr(Bucket, "ask", refuse)
    save(tmp_path, 7)
    mirror = make()
    mirror.open()
    mirror.begin(above=7)
    mirror.flush()
    mirror.insist()


def test_a_training_that_fails_still_takes_its_checkpoints_along(
    train: Train, store: Store, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a bug in the evaluation")

    monkeypatch.setattr("src.trainer.Trainer.evaluate", fail)
    options = on_s3(store, bucket, "storage.max_mb_per_second=0.5")
    assert train(*TINY, *options, "checkpoint.every=6").status == 1
    assert steps_there(store, bucket) == steps_here() == [6, 12]


def test_the_log_of_an_earlier_life_elsewhere_comes_first_and_once(store: Store, bucket: str, tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    for there, here, whole in (
        (b"a\nb\n", b"", b"a\nb\n"),
        (b"a\nb\n", b"c\n", b"a\nb\nc\n"),
        (b"a\nb\n", b"a\nc\n", b"a\nb\nc\n"),
        (b"a\n", b"a\nb\n", b"a\nb\n"),
        (b"a\nb\n", b"a\nb\n", b"a\nb\n"),
    ):
        log.write_bytes(here)
        store.write(bucket, f"{ROOT}/train.log", there)
        with log.open("ab") as handler:  # as the logging module has it open
            RunFiles(Bucket(bucket, endpoint_url=store.endpoint), ROOT, tmp_path).fetch_history()
            handler.write(b"z\n")
        assert log.read_bytes() == whole + b"z\n"


def test_of_the_other_files_only_what_has_changed_is_uploaded(network: Network, bucket: str, tmp_path: Path) -> None:
    for name in ("train.log", "tensorboard/events.1", "tensorboard/.tmp_events.2", ".hydra/config.yaml", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def uploads(files: RunFiles) -> list[str]:
        network.requests.clear()
        files.upload_changed()
        return sorted(re.findall(rf"PUT /{bucket}/{ROOT}/(\S+)", "\n".join(network.requests)))

    def files() -> RunFiles:
        return RunFiles(Bucket(bucket, endpoint_url=network.endpoint), ROOT, tmp_path)

    first = files()
    assert uploads(first) == [".hydra/config.yaml", "tensorboard/events.1", "train.log"]
    assert uploads(first) == []
    (tmp_path / "tensorboard/events.1").write_text("xy")
    assert uploads(first) == ["tensorboard/events.1"]
    second = files()  # another life
    second.fetch_history()
    assert "tensorboard/events.1" not in uploads(second)


def test_uploads_of_the_mirror_are_no_part_of_trainings_random_numbers(
    train: Train, store: Store, network: Network, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*TINY, "trainer.epochs=1", "checkpoint.every=3")
    train(*options, "run=plain")
    network.truncate_downloads = 2
    busy(network)
    threading.Timer(1, lambda: setattr(network, "answer", None)).start()
    monkeypatch.setattr(S3Storage, "preflight", lambda *arguments: None)
    assert train(*options, *on_s3(network, bucket)).status == 0
    assert differences(state(13), state(13, Path("outputs/plain"))) == []


# --- the command line ---


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    from src.checkpoint.__main__ import main

    capsys.readouterr()
    status = main(arguments)
    return (status, *capsys.readouterr())


def test_ls_verify_pull_and_export_know_the_bucket(
    train: Train, store: Store, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*TINY, *on_s3(store, bucket), "trainer.epochs=2", "checkpoint.every=5")
    url, place = f"s3://{bucket}/{ROOT}", ("--endpoint-url", store.endpoint)
    listed = cli(capsys, "ls", str(RUN))
    assert listed[0] == 0
    assert listed[1].count("local+mirror") == len(steps_here())
    assert re.search(r"^ +26 +2 +\S+ MB .*val/accuracy.* local\+mirror", listed[1], re.MULTILINE)
    there = cli(capsys, "ls", url, *place)
    assert there[0] == 0
    assert "local" not in there[1].replace("local+", "")
    assert cli(capsys, "ls", str(RUN), "--local")[1].count("mirror") == 0

    verified = cli(capsys, "verify", url, *place)
    assert verified[0] == 0
    assert verified[1].count("verified") == len(steps_here())
    damage(store, bucket, 26, "a flipped bit")
    status, out, _ = cli(capsys, "verify", str(RUN))
    assert status == 1
    assert "mirror DAMAGED: state.pt has" in out

    status, out, err = cli(capsys, "pull", url, "outputs/pulled", *place)
    assert status == 0, err
    assert "skipped damaged checkpoint" in err
    assert steps_here(Path("outputs/pulled")) == [25]
    assert (Path("outputs/pulled") / "train.log").is_file()
    assert (Path("outputs/pulled") / ".hydra/config.yaml").is_file()
    assert cli(capsys, "pull", url, "outputs/pulled", "--all", *place)[0] == 0
    assert steps_here(Path("outputs/pulled")) == [step for step in steps_here() if step != 26]

    shutil.rmtree(RUN / "checkpoints")
    assert cli(capsys, "pull", str(RUN))[0] == 0
    assert steps_here() == [25]

    weights = torch.load(RUN / "checkpoints/step_00000025/state.pt", weights_only=True)["model_state_dict"]
    assert cli(capsys, "export", f"{url}/checkpoints/step_00000025", "weights.safetensors", *place)[0] == 0
    from safetensors.torch import load_file

    assert differences(dict(sorted(load_file("weights.safetensors").items())), dict(sorted(weights.items()))) == []
    assert cli(capsys, "export", str(RUN), "weights.pt")[0] == 0
    assert differences(torch.load("weights.pt", weights_only=True), dict(weights)) == []
    status, _, err = cli(capsys, "export", str(RUN), "weights.pt")
    assert status == 2
    assert "exists already" in err
    assert cli(capsys, "export", str(RUN), "weights.bin")[0] == 2
    assert not list(Path().glob(".tmp*"))


def test_the_command_line_says_what_is_wrong_in_one_line(
    store: Store, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ("--endpoint-url", store.endpoint)
    assert cli(capsys, "ls", f"s3://{bucket}/nothing", *place) == (
        2,
        "",
        f"error: s3://{bucket}/nothing: has no checkpoints\n",
    )
    status, _, err = cli(capsys, "ls", "s3://no-such-bucket-here/run", *place)
    assert status == 3
    assert "there is no bucket of that name" in err
    status, _, err = cli(capsys, "pull", str(tmp_path))
    assert status == 2
    assert "is a run without a mirror" in err


def test_a_config_found_on_a_disk_is_not_called(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*TINY, "trainer.epochs=1")
    config = RUN / ".hydra/config.yaml"
    evil = config.read_text().replace("src.storage.local.LocalStorage", "os.system")
    assert evil != config.read_text()
    config.write_text(evil)
    assert cli(capsys, "ls", str(RUN))[0] == 0


def test_ls_shows_what_is_here_when_the_bucket_cannot_be_reached(
    train: Train, network: Network, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*TINY, *on_s3(network, bucket), "trainer.epochs=1")
    drop(network)
    status, out, err = cli(capsys, "ls", str(RUN))
    assert status == 0
    assert " 13 " in out
    assert "cannot look into the mirror: s3://" in err
