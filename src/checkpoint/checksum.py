"""The one checksum of a file, from the writer's buffer to the bucket: CRC-64/NVME.

Chosen because S3 accepts it as a full-object checksum of a multipart upload too, so the sum computed
while saving is the one that the store verifies; and because AWS's own `awscrt` computes it at memory
speed, without the GIL. It finds damage, not tampering: whoever can rewrite a checkpoint can rewrite
its manifest. Against that, loading never executes code (`weights_only=True`).
"""

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from awscrt.checksums import combine_crc64nvme, crc64nvme

from src.checkpoint.manifest import NOT_THERE, CorruptCheckpoint, FileEntry

_CHECKSUM = re.compile(r"crc64nvme:([0-9a-f]{16})")
_CHUNK = 1024 * 1024  # bytes: stays in the processor's cache between the read and the sum
_THREADS = 4
_WORTH_A_THREAD = 32 * 1024 * 1024  # bytes


def format_checksum(crc: int) -> str:
    """As it stands in a manifest."""
    return f"crc64nvme:{crc:016x}"


def crc_in(checksum: str) -> int:
    """The number in a manifest's checksum.

    Raises:
        CorruptCheckpoint: it is of another kind.
    """
    match = _CHECKSUM.fullmatch(checksum)
    if match is None:
        raise CorruptCheckpoint(f"{checksum!r} is no checksum that this code knows")
    return int(match[1], 16)


def entry_of(path: Path) -> FileEntry:
    """Of a file as it is.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    return FileEntry(size, format_checksum(_checksum(path, size)))


def verify_file(path: Path, expected: FileEntry) -> None:
    """Read the whole file and compare.

    Raises:
        CorruptCheckpoint: the file is missing, or its size or checksum is another.
        OSError: the disk cannot be read just now, which says nothing about the file.
    """
    try:
        size = path.stat().st_size
        if size != expected.size:
            raise CorruptCheckpoint(f"{path.name} has {size} bytes, the manifest says {expected.size}")
        found = format_checksum(_checksum(path, size))
    except NOT_THERE:
        raise CorruptCheckpoint(f"{path.name} is missing") from None
    if found != expected.checksum:
        raise CorruptCheckpoint(f"{path.name} has checksum {found}, the manifest says {expected.checksum}")


def _checksum(path: Path, size: int) -> int:
    """Of the first `size` bytes, by several threads, each with a stretch of the file."""
    stretch = max(-(-size // _THREADS), _WORTH_A_THREAD)
    starts = range(0, size, stretch)
    lengths = [min(stretch, size - start) for start in starts]
    with ThreadPoolExecutor(len(starts) or 1) as threads:
        crc = 0
        for length, part in zip(
            lengths, threads.map(partial(_checksum_of_stretch, path), starts, lengths), strict=True
        ):
            crc = combine_crc64nvme(crc, part, length)
    return crc


def _checksum_of_stretch(path: Path, start: int, length: int) -> int:
    crc = 0
    buffer = memoryview(bytearray(min(_CHUNK, length)))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while length > 0 and (count := file.readinto(buffer[:length])):
            crc = crc64nvme(buffer[:count], crc)
            length -= count
    if length > 0:
        raise CorruptCheckpoint(f"{path.name} became shorter while it was read")
    return crc
