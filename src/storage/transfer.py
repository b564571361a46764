"""Large files to a bucket and back: in parallel parts, within bounded memory, with one checksum from end to end.

The checksum is the CRC-64/NVME of the whole file, the one that a checkpoint's manifest holds. The store compares every
part with it on arrival, keeps that of the whole object, also of a multipart upload, and tells it when asked.
"""

import logging
import os
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from awscrt.checksums import combine_crc64nvme, crc64nvme

from src.background import yield_to_training
from src.storage.bucket import Bucket, Stat, encode_crc
from src.storage.failures import StoreError

log = logging.getLogger(__name__)

_MIB = 1024 * 1024
_PART = 16 * _MIB  # bytes
_LEAST = 5 * _MIB  # that S3 takes, but for the last
_MOST_PARTS = 10_000  # that an upload may have
_DOWNLOADS = 3  # tries, if what arrives is damaged
_THREADS = 4  # parts at once, each in a buffer of its own: what bounds memory

Progress = Callable[[int], None]
"""Told of every part that has arrived: its bytes."""


class Damaged(Exception):
    """The bytes in a file are not those that were written to it."""


class ArrivedDamaged(StoreError):
    """What was downloaded is not what it has to be, however often it was tried."""


def ignore(nbytes: int) -> None:
    """Progress that nobody wants to know of."""


def upload(
    bucket: Bucket,
    path: Path,
    key: str,
    size: int,
    crc: int | None = None,
    progress: Progress = ignore,
    confirm: Callable[[], None] = lambda: None,
) -> None:
    """Upload the first `size` bytes of a file, and make sure that they have arrived.

    Args:
        crc: Of the bytes as they were written; None if there is no telling (a log that grows).
        confirm: Called just before each try to have the object become what is uploaded; if it raises, it does not.

    Raises:
        Damaged: the file is not any more what was written.
        OSError: it cannot be read.
        StoreError: the store did not take it, or has something else than was sent.
    """
    part = _part_size(size)
    with path.open("rb", buffering=0) as file:
        if size <= part:
            sent = _upload_whole(bucket, file.fileno(), key, size, crc, confirm)
            progress(size)
        else:
            sent = _upload_parts(bucket, file.fileno(), key, size, part, crc, progress, confirm)
    # An upload without an error is not yet one without a fault.
    if (found := look(bucket, key)) != Stat(size, sent):
        raise StoreError(f"{bucket.url(key)}: what is there is not what was sent ({found or 'nothing'})")


def download(bucket: Bucket, key: str, size: int, path: Path, progress: Progress = ignore) -> int:
    """Download an object of `size` bytes into a file, and fsync it.

    Returns:
        The CRC-64/NVME of what was written.

    Raises:
        OSError: the disk refused.
        StoreError: the store did not give it.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        if size:
            _reserve(descriptor, size)  # a disk that is too full says so now

        def fetch(start: int) -> tuple[int, int]:
            chunk = _read_range(bucket, key, start, min(_PART, size - start))
            _write_all(descriptor, chunk, start)
            progress(len(chunk))
            return crc64nvme(chunk), len(chunk)

        whole = 0
        with _threads() as threads:
            for crc, length in threads.map(fetch, range(0, size, _PART)):
                whole = combine_crc64nvme(whole, crc, length)
        os.fsync(descriptor)
        return whole
    finally:
        os.close(descriptor)


def download_whole(bucket: Bucket, key: str, there: Stat, path: Path, progress: Progress = ignore) -> None:
    """Download an object, and again if what arrives is not what the store says it has.

    Args:
        there: Its size, and the CRC-64/NVME that it has to have; None if there is no telling.

    Raises:
        OSError: the disk refused.
        ArrivedDamaged: it did, each time.
        StoreError: the store did not give it.
    """
    for _ in range(_DOWNLOADS):
        if download(bucket, key, there.size, path, progress) == there.crc or there.crc is None:
            return
        log.warning("%s arrived damaged", bucket.url(key))
    raise ArrivedDamaged(f"{bucket.url(key)} arrived damaged {_DOWNLOADS} times")


def abort_uploads(bucket: Bucket, prefix: str) -> int:
    """Abort the multipart uploads below `prefix`, which nobody will complete. Returns how many there were."""
    uploads = bucket.ask("list_multipart_uploads", Prefix=prefix).get("Uploads", [])
    for upload in uploads:
        bucket.ask("abort_multipart_upload", upload["Key"], UploadId=upload["UploadId"])
    return len(uploads)


def _upload_whole(
    bucket: Bucket, descriptor: int, key: str, size: int, crc: int | None, confirm: Callable[[], None]
) -> int:
    body = os.pread(descriptor, size, 0)
    _require_all(len(body), size, key)
    found = int(crc64nvme(body))
    _compare(found, crc, key)
    bucket.pace(size)
    bucket.ask("put_object", key, confirm, Body=body, ChecksumCRC64NVME=encode_crc(found), **bucket.write_options)
    return found


def _upload_parts(
    bucket: Bucket,
    descriptor: int,
    key: str,
    size: int,
    part: int,
    crc: int | None,
    progress: Progress,
    confirm: Callable[[], None],
) -> int:
    checksums = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"}
    upload_id = bucket.ask("create_multipart_upload", key, **checksums, **bucket.write_options)["UploadId"]
    buffers: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
    for _ in range(_THREADS):
        buffers.put(bytearray(part))

    def send(number: int) -> tuple[int, int, dict[str, object]]:
        length = min(part, size - number * part)
        buffer = buffers.get()
        try:
            _require_all(os.preadv(descriptor, [memoryview(buffer)[:length]], number * part), length, key)
            # boto3 takes bytes and bytearrays whole, but no views of them.
            body = buffer if length == part else bytes(buffer[:length])
            found = int(crc64nvme(body))
            sent: dict[str, object] = {"PartNumber": number + 1, "ChecksumCRC64NVME": encode_crc(found)}
            bucket.pace(length)
            sent["ETag"] = bucket.ask("upload_part", key, UploadId=upload_id, Body=body, **sent)["ETag"]
        finally:
            buffers.put(buffer)
        progress(length)
        return found, length, sent

    try:
        whole, parts = 0, []
        with _threads() as threads:
            for found, length, sent in threads.map(send, range(-(-size // part))):
                whole = combine_crc64nvme(whole, found, length)
                parts.append(sent)
        _compare(whole, crc, key)
        bucket.ask(
            "complete_multipart_upload",
            key,
            confirm,
            UploadId=upload_id,
            MultipartUpload={"Parts": parts},
            ChecksumCRC64NVME=encode_crc(whole),
            ChecksumType="FULL_OBJECT",
        )
    except BaseException:
        with suppress(StoreError):  # else it is swept at the next start
            bucket.ask("abort_multipart_upload", key, UploadId=upload_id)
        raise
    return whole


def _part_size(size: int) -> int:
    """At most `_PART`, unless there would be too many; and such that in the last round all threads have one."""
    if size <= _PART:
        return _PART  # goes in one piece
    rounds = -(-size // (_PART * _THREADS))
    even = max(_LEAST, -(-size // (rounds * _THREADS)))
    return max(even, -(-size // _MOST_PARTS))


def look(bucket: Bucket, key: str) -> Stat | None:
    """Size and CRC-64/NVME of an object: as the store says, or where it keeps no checksums, by reading all of it.

    Returns:
        None if there is no such object.
    """
    found = bucket.stat(key)
    if found is None or found.crc is not None:
        return found
    crc = 0
    for start in range(0, found.size, _PART):
        chunk = _read_range(bucket, key, start, min(_PART, found.size - start))
        crc = combine_crc64nvme(crc, crc64nvme(chunk), len(chunk))
    return Stat(found.size, crc)


def _read_range(bucket: Bucket, key: str, start: int, length: int) -> bytes:
    bucket.pace(length)
    chunk: bytes = bucket.ask("get_object", key, Range=f"bytes={start}-{start + length - 1}")["Body"]
    if len(chunk) != length:
        raise StoreError(f"{bucket.url(key)}: the store sent {len(chunk)} bytes of {length}")
    return chunk


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):  # macOS has none
        os.posix_fallocate(descriptor, 0, size)


def _write_all(descriptor: int, chunk: bytes, offset: int) -> None:
    view = memoryview(chunk)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _require_all(read: int, wanted: int, key: str) -> None:
    if read != wanted:
        raise Damaged(f"{key.rpartition('/')[2]} became shorter")


def _compare(found: int, expected: int | None, key: str) -> None:
    if expected is not None and found != expected:
        raise Damaged(f"{key.rpartition('/')[2]} is not what was saved: its checksum is another")


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "s3", initializer=yield_to_training)
