"""The bucket: its faults are found before step 1, what goes through it arrives whole, one machine at a time."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import botocore.retryhandler
import botocore.utils
import numpy as np
import pytest
from awscrt.checksums import crc64nvme

from src.errors import CheckpointError, ConfigError, HoldfastError, require_no_credentials
from src.storage import lease as lease_module
from src.storage import transfer
from src.storage.bucket import Bucket, Cancelled, Stat
from src.storage.failures import Conflict, NotThere, Refused, StoreError
from src.storage.lease import Lease
from src.storage.s3 import S3Storage
from src.storage.transfer import Damaged, abort_uploads, download, look, upload
from tests.conftest import Result
from tests.store import READER, READER_SECRET, Network, Store, error_answer, free_port

PART = 5 * 1024 * 1024  # bytes: the least that S3 takes


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_PART", PART)


@pytest.fixture
def client(store: Store, bucket: str) -> Bucket:
    return Bucket(bucket, endpoint_url=store.endpoint)


@pytest.fixture
def disturbed(network: Network, bucket: str) -> Bucket:
    return Bucket(bucket, endpoint_url=network.endpoint, read_timeout=1)


def file_of(tmp_path: Path, size: int) -> Path:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(size).bytes(size))
    return path


def crc(path: Path) -> int:
    return int(crc64nvme(path.read_bytes()))


# --- before step 1 ---


def preflight(endpoint: str, bucket: str, directory: Path, **settings: Any) -> None:
    S3Storage(bucket, endpoint_url=endpoint, min_free_gb=0, **settings).preflight(directory, 1, 1)


def test_a_bucket_that_is_fit_is_left_as_it_was(store: Store, bucket: str, tmp_path: Path) -> None:
    preflight(store.endpoint, bucket, tmp_path)
    assert store.keys(bucket) == []


def wrong_key(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("AWS_ACCESS_KEY_ID", "nobody")


def wrong_secret(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")


def may_only_read(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("AWS_ACCESS_KEY_ID", READER)
    patch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)


def no_credentials(patch: pytest.MonkeyPatch) -> None:
    patch.delenv("AWS_ACCESS_KEY_ID")
    patch.delenv("AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (wrong_key, "the access key is unknown there; renew the credentials"),
        (wrong_secret, "the secret key does not fit the access key"),
        (may_only_read, "permission denied; it takes s3:ListBucket, GetObject, PutObject"),
        (no_credentials, "no credentials were found"),
    ],
)
def test_credentials_that_will_not_do_are_found_before_the_first_step(
    store: Store, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None], remedy: str
) -> None:
    change(monkeypatch)
    with pytest.raises(ConfigError, match=remedy):
        preflight(store.endpoint, bucket, tmp_path)


def test_a_bucket_that_is_not_there(store: Store, credentials: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no bucket of that name; create it"):
        preflight(store.endpoint, "nowhere-to-be-found", tmp_path)


def test_an_endpoint_where_nobody_listens(credentials: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be reached; check storage\.endpoint_url"):
        preflight(f"http://127.0.0.1:{free_port()}", "bucket", tmp_path)


def test_an_endpoint_that_answers_nothing(network: Network, bucket: str, tmp_path: Path) -> None:
    network.silent = True
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="does not answer"):
        preflight(network.endpoint, bucket, tmp_path)
    assert time.monotonic() - start < 15


def test_a_profile_that_is_not_there(store: Store, bucket: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"correct storage\.profile"):
        preflight(store.endpoint, bucket, tmp_path, profile="nobody")


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (403, "RequestTimeTooSkewed", "this machine's clock is off by minutes; set it"),
        (403, "ExpiredToken", "the credentials have expired"),
        (400, "IllegalLocationConstraintException", r"the bucket is in another region; name it in storage\.region"),
        (500, "SomethingNew", "the store says SomethingNew: As the test wants it."),
    ],
)
def test_what_else_a_store_may_say(
    network: Network, bucket: str, tmp_path: Path, status: int, code: str, remedy: str
) -> None:
    network.answer = error_answer(status, code)
    # What may pass is no wrong setting, so that whoever starts a run again and again knows to go on.
    with pytest.raises(ConfigError if status < 500 else CheckpointError, match=remedy):
        preflight(network.endpoint, bucket, tmp_path)


@pytest.mark.parametrize("ignored", ["if_absent", "if_match"])
def test_a_store_that_ignores_conditions_is_refused(
    store: Store, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignored: str
) -> None:
    put = Bucket.put

    def forgetful(self: Bucket, key: str, body: bytes, **conditions: Any) -> str:
        return put(self, key, body, **{name: value for name, value in conditions.items() if name != ignored})

    monkeypatch.setattr(Bucket, "put", forgetful)
    with pytest.raises(ConfigError, match="If-None-Match"):
        preflight(store.endpoint, bucket, tmp_path)
    assert store.keys(bucket) == []


def test_an_answer_that_is_lost_is_no_wrong_setting(
    store: Store, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has what was sent, so that the same request again finds a name that is taken."""
    put = Bucket.put
    lost: list[str] = []

    def lose_the_first_answer(self: Bucket, *arguments: Any, **conditions: Any) -> str:
        if not lost:
            lost.append(put(self, *arguments, **conditions))
        return put(self, *arguments, **conditions)

    monkeypatch.setattr(Bucket, "put", lose_the_first_answer)
    preflight(store.endpoint, bucket, tmp_path)
    assert lost
    assert store.keys(bucket) == []


def test_the_command_says_it_in_one_line(train: Callable[..., Result], store: Store, credentials: None) -> None:
    result = train("storage=s3", "storage.bucket=nowhere", f"storage.endpoint_url={store.endpoint}", "data=synthetic")
    assert result.status == 2
    assert "error: storage.bucket=nowhere: s3://nowhere/" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bucket": None}, "storage.bucket=null: name the bucket"),
        ({"bucket": "b/path"}, "a path goes in storage.prefix"),
        ({"prefix": "../elsewhere"}, "storage.prefix="),
        ({"prefix": "a//b"}, "storage.prefix="),
        ({"endpoint_url": "127.0.0.1:9000"}, "must be like https://host:port"),
        ({"encryption": "rot13"}, "must be one of AES256, aws:kms"),
        ({"kms_key_id": "id"}, "takes storage.encryption=aws:kms"),
        ({"every": 0}, "storage.every=0"),
        ({"keep": 0}, "storage.keep=0"),
        ({"max_mb_per_second": 0}, "storage.max_mb_per_second=0"),
        ({"flush_timeout": -1}, "storage.flush_timeout=-1"),
        ({"lease_seconds": 1}, "storage.lease_seconds=1"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        S3Storage(**{"bucket": "bucket", **settings})
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["s3://key:a/b+c@bucket/x", "mysql://me:hunter2@db", "[http://a, http://b@c/d]"])
def test_credentials_are_found_wherever_they_stand(text: str) -> None:
    with pytest.raises(ConfigError, match="must not hold credentials") as refused:
        require_no_credentials("key", text)
    assert "@" not in str(refused.value)


@pytest.mark.parametrize("text", ["http://host:9000/a@b", "s3://bucket/a:b@c", "sqlite:////a@b/c", "me@host:a//b"])
def test_what_only_looks_like_them_is_not(text: str) -> None:
    require_no_credentials("key", text)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        S3Storage("bucket", endpoint_url="https://me:hunter2@store:9000")
    assert "hunter2" not in str(caught.value)


# --- up and down ---


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 3 * PART, 5 * PART + 12_345])
def test_a_file_goes_there_and_comes_back(client: Bucket, tmp_path: Path, small_parts: None, size: int) -> None:
    path, progress = file_of(tmp_path, size), [0]
    upload(client, path, "key", size, crc(path), progress.append)
    assert client.stat("key") == Stat(size, crc(path))
    assert sum(progress) == size
    assert download(client, "key", size, tmp_path / "back") == crc(path)
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_only_as_many_bytes_as_asked_for_are_sent(client: Bucket, tmp_path: Path, small_parts: None) -> None:
    path = file_of(tmp_path, 3 * PART)
    upload(client, path, "key", 2 * PART + 5)
    assert client.get("key").body == path.read_bytes()[: 2 * PART + 5]


@pytest.mark.parametrize("size", [100_000, 3 * PART])
def test_a_file_that_is_not_what_was_saved_does_not_arrive(
    client: Bucket, store: Store, bucket: str, tmp_path: Path, small_parts: None, size: int
) -> None:
    path = file_of(tmp_path, size)
    expected = crc(path)
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"?" * 9)
    with pytest.raises(Damaged, match="checksum is another"):
        upload(client, path, "key", size, expected)
    with pytest.raises(Damaged, match="became shorter"):
        upload(client, path, "key", size + PART, expected)
    assert store.keys(bucket) == []
    assert abort_uploads(client, "") == 0


@pytest.mark.parametrize("size", [500_000, 4 * PART])
def test_a_bit_that_flips_on_the_way_up_is_noticed_and_sent_again(
    disturbed: Bucket, network: Network, tmp_path: Path, small_parts: None, size: int
) -> None:
    path = file_of(tmp_path, size)
    network.corrupt_uploads = 1
    with pytest.raises(StoreError) as caught:  # the store compares, and refuses
        Bucket(disturbed.name, endpoint_url=network.endpoint, tries=1).ask(
            "put_object", "key", Body=path.read_bytes()[:400_000], ChecksumCRC64NVME="AAAAAAAAAAA="
        )
    assert "checksum" in str(caught.value).lower() or "digest" in str(caught.value).lower()
    network.corrupt_uploads = 1
    upload(disturbed, path, "key", size, crc(path))
    assert network.corrupt_uploads == 0
    assert disturbed.get("key").body == path.read_bytes()


def test_a_bit_that_flips_on_the_way_down_shows_in_the_checksum(
    disturbed: Bucket, network: Network, tmp_path: Path, small_parts: None
) -> None:
    path = file_of(tmp_path, 2 * PART)
    upload(disturbed, path, "key", 2 * PART)
    network.corrupt_downloads = 1
    assert download(disturbed, "key", 2 * PART, tmp_path / "back") != crc(path)


def busy(network: Network) -> None:
    network.answer = error_answer(503, "SlowDown")


def cut(network: Network) -> None:
    network.drop = True
    network.cut()


def silent(network: Network) -> None:
    network.silent = True


def test_each_try_to_write_asks_again_whether_it_may(disturbed: Bucket, network: Network) -> None:
    """In an outage that lasts, another machine may have taken over."""
    network.answer = error_answer(503, "SlowDown")
    tries: list[int] = []

    def confirm() -> None:
        tries.append(len(tries))
        if len(tries) == 3:
            network.answer = None
            raise StoreError("taken over")

    with pytest.raises(StoreError, match="taken over"):
        disturbed.put("key", b"mine", confirm=confirm)
    assert disturbed.stat("key") is None


@pytest.mark.parametrize("fault", [busy, cut, silent])
def test_transfers_outlast_a_short_outage(
    disturbed: Bucket, network: Network, tmp_path: Path, small_parts: None, fault: Callable[[Network], None]
) -> None:
    path = file_of(tmp_path, 4 * PART)

    def recover() -> None:
        network.answer, network.drop, network.silent = None, False, False
        network.cut()

    for transfer_once in (
        lambda: upload(disturbed, path, "key", 4 * PART, crc(path)),
        lambda: download(disturbed, "key", 4 * PART, tmp_path / "back"),
    ):
        fault(network)
        later = threading.Timer(0.5, recover)
        later.start()
        transfer_once()
        later.join()
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_an_answer_that_is_cut_off_is_asked_for_again(
    disturbed: Bucket, network: Network, tmp_path: Path, small_parts: None
) -> None:
    path = file_of(tmp_path, 4 * PART)
    upload(disturbed, path, "key", 4 * PART)
    network.truncate_downloads = 3
    assert download(disturbed, "key", 4 * PART, tmp_path / "back") == crc(path)


def test_an_upload_that_fails_leaves_nothing_behind(
    disturbed: Bucket, store: Store, network: Network, tmp_path: Path, small_parts: None
) -> None:
    impatient = Bucket(disturbed.name, endpoint_url=network.endpoint, read_timeout=1, tries=1)
    path = file_of(tmp_path, 4 * PART)
    network.corrupt_uploads = 1
    with pytest.raises(StoreError):
        upload(impatient, path, "key", 4 * PART, crc(path))
    assert store.keys(disturbed.name) == []
    assert abort_uploads(disturbed, "") == 0


def test_unfinished_uploads_below_a_prefix_are_swept(client: Bucket) -> None:
    for key in ("mine/one", "mine/two", "other/three"):
        client.ask("create_multipart_upload", key)
    assert abort_uploads(client, "mine/") == 2
    assert abort_uploads(client, "mine/") == 0
    assert abort_uploads(client, "other/") == 1


def test_where_a_store_keeps_no_checksums_what_arrived_is_read_back(
    client: Bucket, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_of(tmp_path, 2 * PART + 7)
    stat = Bucket.stat

    def forgetful(self: Bucket, key: str) -> Stat | None:
        found = stat(self, key)
        return found and Stat(found.size, None)

    monkeypatch.setattr(Bucket, "stat", forgetful)
    upload(client, path, "key", path.stat().st_size, crc(path))
    assert look(client, "key") == Stat(path.stat().st_size, crc(path))
    client.put("key", b"another thing")
    with pytest.raises(StoreError, match="not what was sent"):
        monkeypatch.setattr(Bucket, "ask", _lose_uploads(Bucket.ask))
        upload(client, path, "key", path.stat().st_size, crc(path))


def _lose_uploads(ask: Callable[..., Any]) -> Callable[..., Any]:
    """A store that says yes to an upload and keeps what it had."""
    return lambda self, operation, *arguments, **parameters: (
        {} if operation == "complete_multipart_upload" else ask(self, operation, *arguments, **parameters)
    )


def test_an_upload_that_the_store_only_says_it_took_is_an_error(
    client: Bucket, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_of(tmp_path, 2 * PART)
    monkeypatch.setattr(Bucket, "ask", _lose_uploads(Bucket.ask))
    with pytest.raises(StoreError, match="not what was sent"):
        upload(client, path, "key", 2 * PART, crc(path))


def test_a_bound_on_the_traffic_is_kept(store: Store, bucket: str, tmp_path: Path, small_parts: None) -> None:
    bounded = Bucket(bucket, endpoint_url=store.endpoint, bytes_per_second=4 * PART)
    start = time.monotonic()
    upload(bounded, file_of(tmp_path, 5 * PART), "key", 5 * PART)
    assert time.monotonic() - start >= 1.0  # the first part goes at once, four more a quarter of a second apart


def test_a_transfer_can_be_given_up(store: Store, bucket: str, tmp_path: Path, small_parts: None) -> None:
    slow = Bucket(bucket, endpoint_url=store.endpoint, bytes_per_second=PART / 100)
    threading.Timer(0.3, slow.cancel).start()
    start = time.monotonic()
    with pytest.raises(Cancelled):
        upload(slow, file_of(tmp_path, 5 * PART), "key", 5 * PART)
    assert time.monotonic() - start < 10


def test_trouble_draws_no_random_numbers_from_training(
    disturbed: Bucket, network: Network, tmp_path: Path, small_parts: None
) -> None:
    before = random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index]
    busy(network)
    threading.Timer(0.5, lambda: setattr(network, "answer", None)).start()
    upload(disturbed, file_of(tmp_path, 2 * PART), "key", 2 * PART)
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before  # type: ignore[index]


def test_encryption_and_storage_class_are_asked_for(
    network: Network, bucket: str, tmp_path: Path, small_parts: None
) -> None:
    storage = S3Storage(
        bucket, endpoint_url=network.endpoint, encryption="aws:kms", kms_key_id="key-1", storage_class="STANDARD_IA"
    )
    client = storage.connect(tries=1)
    for size in (10, 2 * PART):
        network.requests.clear()
        with suppress(StoreError):  # this store may have no such key; what counts is what it was asked for
            upload(client, file_of(tmp_path, size), "key", size)
        first = network.requests[0].lower()
        for header in ("server-side-encryption: aws:kms", "aws-kms-key-id: key-1", "storage-class: standard_ia"):
            assert header in first


def test_a_disk_that_refuses_a_download_is_not_the_networks_fault(client: Bucket, tmp_path: Path) -> None:
    client.put("key", b"12345")
    with pytest.raises(OSError, match="No such file"):
        download(client, "key", 5, tmp_path / "no folder" / "file")


def test_conditions(client: Bucket) -> None:
    first = client.put("key", b"one", if_absent=True)
    with pytest.raises(Conflict):
        client.put("key", b"two", if_absent=True)
    client.put("key", b"two", if_match=first)
    with pytest.raises(Conflict):
        client.put("key", b"three", if_match=first)
    assert client.get("key").body == b"two"
    client.delete("key")
    client.delete("key")
    with pytest.raises(NotThere):
        client.get("key")
    assert client.stat("key") is None


def test_an_empty_object_is_an_object(client: Bucket) -> None:
    client.put("key", b"")
    assert client.get("key").body == b""


def test_renewing_credentials_draws_no_random_numbers_from_training() -> None:
    before = random.getstate()
    soon = (datetime.now(UTC) - timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    botocore.utils.InstanceMetadataFetcher()._evaluate_expiration({"expiry_time": soon})
    botocore.retryhandler.delay_exponential("rand", 2, 3)
    assert random.getstate() == before


def test_more_keys_than_fit_on_a_page(client: Bucket, store: Store) -> None:
    s3 = store.client()
    for number in range(1100):
        s3.put_object(Bucket=client.name, Key=f"many/{number:04d}", Body=b"")
    assert [key for key, _ in client.keys("many/")] == [f"many/{number:04d}" for number in range(1100)]


# --- one machine at a time ---


@pytest.fixture
def leases(client: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Lease]]:
    monkeypatch.setattr(lease_module, "_LOOK", 0.1)
    made = []

    def make(home: str, seconds: float = 3.0, bucket: Bucket = client) -> Lease:
        made.append(Lease(bucket, "lease.json", home=home, holder=f"process 1 on {home}", seconds=seconds))
        return made[-1]

    yield make
    for lease in made:
        lease.release()


def dies(lease: Lease) -> None:
    """Ends like a process that is killed: no more renewals, no release."""
    lease._released.set()
    lease._thread.join()
    lease.lost = True  # so that the fixture's release does not delete it


def test_the_second_machine_is_refused_and_told_who_the_first_is(leases: Callable[..., Lease]) -> None:
    first = leases("here")
    first.acquire()
    with pytest.raises(HoldfastError, match="process 1 on here is writing there, and is alive") as caught:
        leases("there").acquire()
    assert "run=NAME" in str(caught.value)
    first.confirm()


def test_what_is_released_is_free_at_once(leases: Callable[..., Lease], client: Bucket) -> None:
    first = leases("here")
    first.acquire()
    first.release()
    assert client.stat("lease.json") is None
    start = time.monotonic()
    leases("there").acquire()
    assert time.monotonic() - start < 1


def test_a_dead_machines_lease_is_taken_over_when_its_time_has_run_out(
    leases: Callable[..., Lease], caplog: pytest.LogCaptureFixture
) -> None:
    first = leases("here")
    first.acquire()
    dies(first)
    leases("there").acquire()
    assert "is held by process 1 on here" in caplog.text
    assert "taken over from process 1 on here" in caplog.text


def test_a_lease_left_behind_in_the_same_run_directory_is_taken_over_at_once(leases: Callable[..., Lease]) -> None:
    first = leases("here", seconds=60)
    first.acquire()
    dies(first)
    start = time.monotonic()
    leases("here", seconds=60).acquire()
    assert time.monotonic() - start < 1


def test_the_first_machine_is_fenced_off_when_it_comes_back(
    leases: Callable[..., Lease], network: Network, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = leases("here", bucket=Bucket(bucket, endpoint_url=network.endpoint, tries=1))
    first.acquire()
    cut(network)
    second = leases("there")
    second.acquire()  # after its time has run out
    network.drop = False
    deadline = time.monotonic() + 60
    with pytest.raises(StoreError, match="taken over by another machine"):
        while time.monotonic() < deadline:
            first.confirm()
            time.sleep(0.05)
    assert first.lost
    assert "taken over by process 1 on there" in caplog.text
    second.confirm()
    first.release()
    second.confirm()


def test_a_renewal_whose_answer_was_lost_is_still_ours(leases: Callable[..., Lease]) -> None:
    lease = leases("here")
    lease.acquire()
    known = lease._etag
    lease._renew()
    lease._etag = known
    lease._renew()
    assert not lease.lost
    assert lease._etag != known


def test_something_unreadable_in_its_place_is_in_the_way_for_a_while_only(
    leases: Callable[..., Lease], client: Bucket
) -> None:
    client.put("lease.json", b'{"home": ["not", "a", "lease"]}')
    leases("here").acquire()


def test_refusals_are_not_retried(network: Network, bucket: str) -> None:
    network.answer = error_answer(403, "AccessDenied")
    with pytest.raises(Refused):
        Bucket(bucket, endpoint_url=network.endpoint).get("key")
    assert len(network.requests) == 1
