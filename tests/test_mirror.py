"""The mirror: what is committed reaches the bucket, whatever happens, and an empty machine goes on from there."""

import errno
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.checkpoint import outage
from src.checkpoint.bucket_mirror import BucketMirror
from src.checkpoint.catalog import Catalog
from src.checkpoint.manifest import Manifest
from src.checkpoint.policy import EverySteps
from src.checkpoint.remote import RemoteCatalog
from src.checkpoint.run_files import RunFiles
from src.checkpoint.writer import write_checkpoint
from src.errors import MirrorError
from src.storage.bucket import Bucket
from src.storage.failures import Refused
from src.storage.s3 import S3Storage
from src.storage.transfer import upload
from tests.conftest import LAST, LONG, TINY, Result, Training
from tests.store import ROOT, RUN, SECRET, Network, Store, drop, error_answer, on_s3, steps_here, steps_there
from tests.test_resume import differences, state
from tests.test_training import curves, final_state

Train = Callable[..., Result]
Fault = Callable[[Network], None]
# --- all is well ---


def test_what_is_kept_here_is_there_byte_for_byte_and_the_log_with_it(train: Train, store: Store, bucket: str) -> None:
    result = train(*TINY, *on_s3(store, bucket), "trainer.epochs=2", "checkpoint.every=5")
    assert result.status == 0, result.output
    here = {path.relative_to(RUN).as_posix(): path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    del here[".lock"], here[".home"], here["result.json"]
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


@pytest.mark.parametrize("mode", [(), ("-m", "trainer.seed=1,2")], ids=["run", "sweep"])
def test_a_password_on_the_command_line_is_refused_before_anything_is_written(
    train: Train, mode: tuple[str, ...]
) -> None:
    url = "http://me:hunter2@host:1"
    result = train(*mode, *TINY, "storage=s3", "storage.bucket=b", f"storage.endpoint_url={url}")
    assert result.status == 2
    assert "error: storage.endpoint_url=http://host:1: must not hold credentials" in result.output
    assert "hunter2" not in result.output
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("key", "more"),
    [
        ("init_from", ("-m", "init_from=s3://me:hunter2@a/x,s3://b/x")),
        ("hydra.sweeper.storage", ("-m", "hydra/sweeper=optuna", "hydra.sweeper.storage=mysql://me:hunter2@db/x")),
        ("+data.urls", ("+data.urls=[http://a/x,http://me:hunter2@b/x]",)),
    ],
    ids=["swept", "hydra", "list"],
)
def test_wherever_it_is_given(train: Train, key: str, more: tuple[str, ...]) -> None:
    result = train(*more, *TINY)
    assert result.status == 2
    assert f"error: {key}=" in result.output
    assert "must not hold credentials" in result.output
    assert "hunter2" not in result.output
    assert not Path("outputs").exists()


def test_how_far_behind_the_bucket_is_is_shown(train: Train, store: Store, bucket: str) -> None:
    train(*TINY, *on_s3(store, bucket), "trainer.epochs=2")
    events = EventAccumulator(str(RUN / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert {event.step: event.value for event in events.Scalars("mirror/steps_at_risk")}[13] == 13.0
    for tag in ("mirror/checkpoints_waiting", "mirror/megabytes_waiting", "checkpoint/steps_at_risk"):
        assert len(events.Scalars(tag)) == 26


# --- kills ---


def started(training: Training, *options: str) -> subprocess.Popen[str]:
    return training.start(*LONG, *options)


def test_killed_at_any_moment_of_an_upload_or_a_download_nothing_is_lost(
    training: Training, uninterrupted: Path, store: Store, bucket: str
) -> None:
    # Of equally good ones the older is the best, and a disk that was lost no longer has it.
    options = on_s3(store, bucket, "storage.max_mb_per_second=1.5", "checkpoint.keep_best=0")
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
    result = training.finish(started(training, *on_s3(store, bucket), "checkpoint.keep_best=0"))
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
    monkeypatch.setattr(outage, "_FIRST_PAUSE", 0.1)
    monkeypatch.setattr(outage, "_LONGEST_PAUSE", 1.0)
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
    assert result.status == 3
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
    return write_checkpoint(Catalog(tmp_path / home / "checkpoints"), {"global_step": step}, Manifest(step, 0, {}))[0]


def mirror_all(mirror: BucketMirror, above: int) -> None:
    """From its start to its end; raises unless all is there."""
    mirror.open()
    mirror.begin(above)
    mirror.flush()
    mirror.insist()


def test_the_newest_goes_first_and_what_is_rotated_away_is_forgotten(
    make: Callable[..., BucketMirror], tmp_path: Path, network: Network, store: Store, bucket: str
) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    mirror = make(place=network)
    mirror_all(mirror, above=4)
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


def test_what_was_damaged_here_before_it_was_there_is_not_passed_over(
    make: Callable[..., BucketMirror], tmp_path: Path
) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state.pt").write_bytes(b"")
    mirror = make()
    mirror.open()
    mirror.begin(above=2)
    mirror.flush()
    with pytest.raises(MirrorError, match="step_00000002 has been damaged on the disk before it was in s3://"):
        mirror.insist()


def test_what_was_damaged_here_and_has_a_successor_there_fails_nothing(
    make: Callable[..., BucketMirror], tmp_path: Path
) -> None:
    for step in (1, 2):
        path = save(tmp_path, step)
        if step == 1:
            (path / "state.pt").write_bytes(b"")
    mirror = make()
    mirror_all(mirror, above=2)


def test_a_new_best_is_mirrored_whatever_its_turn(
    make: Callable[..., BucketMirror], tmp_path: Path, store: Store, bucket: str
) -> None:
    mirror = make(every=3)
    mirror.open()
    mirror.begin(above=-1)
    catalog = Catalog(tmp_path / "here/checkpoints")
    for step in (1, 2, 3):
        write_checkpoint(catalog, {"global_step": step}, Manifest(step, 0, {}, best={"global_step": min(step, 2)}))
        mirror.committed(step)
    deadline = time.monotonic() + 60
    while mirror.lag()["mirror/checkpoints_waiting"] or mirror.newest_step() == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert steps_there(store, bucket, "holdfast/run") == [1, 2]


def test_a_store_that_hangs_is_not_waited_for_when_all_is_there(
    make: Callable[..., BucketMirror], tmp_path: Path, network: Network
) -> None:
    save(tmp_path, 1)
    mirror = make(place=network)
    mirror_all(mirror, above=1)
    network.silent = True
    (tmp_path / "here/train.log").write_text("one more line")
    closing = threading.Thread(target=mirror.close)
    closing.start()
    closing.join(20)  # one request alone would wait for longer
    assert not closing.is_alive()


def test_a_disk_that_cannot_be_listed_is_no_crash_of_the_mirror(
    make: Callable[..., BucketMirror], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    mirror = make(flush_timeout=1)
    mirror.open()
    mirror.begin(above=1)

    def refuse(self: Catalog) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "by_step", refuse)
        mirror.flush()
    assert "which cannot be read (Input/output error)" in caplog.text
    with pytest.raises(MirrorError):
        mirror.insist()


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
    mirror_all(mirror, above=7)
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
    mirror_all(mirror, above=7)


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
        (b"a\nb", b"a\nbc\n", b"a\nbc\n"),
        (b"a\nb\n", b"a\nb\n", b"a\nb\n"),
    ):
        log.write_bytes(here)
        store.write(bucket, f"{ROOT}/train.log", there)
        with log.open("ab") as handler:  # as the logging module has it open
            RunFiles(Bucket(bucket, endpoint_url=store.endpoint), ROOT, tmp_path).fetch_history()
            handler.write(b"z\n")
        assert log.read_bytes() == whole + b"z\n"


def test_a_long_log_comes_back_whole(store: Store, bucket: str, tmp_path: Path) -> None:
    line = b"x" * 999 + b"\n"
    store.write(bucket, f"{ROOT}/train.log", 70_000 * line)
    RunFiles(Bucket(bucket, endpoint_url=store.endpoint), ROOT, tmp_path).fetch_history()
    assert (tmp_path / "train.log").stat().st_size == 70_000 * len(line)


def test_names_in_the_bucket_that_no_disk_takes_are_left_there(
    store: Store, bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["tensorboard/a", "tensorboard/a/b", f"tensorboard/{'n' * 252}", "goodput/1-1.json", "goodput/2-2.json"]
    for name in names:
        store.write(bucket, f"{ROOT}/{name}", b'{"began": 1' + b"0" * 400 + b"}" if "json" in name else b"x")
    RunFiles(Bucket(bucket, endpoint_url=store.endpoint), ROOT, tmp_path).fetch_history()
    assert caplog.text.count("is left there") == 2
    assert (tmp_path / "goodput/1-1.json").exists()


def test_a_bit_flipped_on_the_way_down_is_noticed_in_other_files_too(
    store: Store, network: Network, bucket: str, tmp_path: Path
) -> None:
    body = os.urandom(200_000)
    (tmp_path / "body").write_bytes(body)
    upload(Bucket(bucket, endpoint_url=store.endpoint), tmp_path / "body", f"{ROOT}/tensorboard/events", len(body))
    network.corrupt_downloads = 1
    RunFiles(Bucket(bucket, endpoint_url=network.endpoint), ROOT, tmp_path).fetch_history()
    assert network.corrupt_downloads == 0
    assert (tmp_path / "tensorboard/events").read_bytes() == body


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
    monkeypatch.setattr(S3Storage, "preflight", lambda *arguments, **more: None)
    assert train(*options, *on_s3(network, bucket)).status == 0
    assert differences(state(13), state(13, Path("outputs/plain"))) == []
