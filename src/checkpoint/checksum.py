"""The one checksum of a file, from the writer's buffer to the bucket: CRC-64/NVME.

Chosen because S3 accepts it as a full-object checksum of a multipart upload too, so the sum computed
while saving is the one that the store verifies; and because AWS's own `awscrt` computes it at memory
speed, without the GIL. It finds damage, not tampering: whoever can rewrite a checkpoint can rewrite
its manifest. Against that, loading never executes code (`weights_only=True`).
"""

import io
from pathlib import Path
from typing import Any, BinaryIO

from awscrt.checksums import crc64nvme

from src.checkpoint.manifest import NOT_THERE, CorruptCheckpoint, FileEntry

_CHUNK = 16 * 1024 * 1024  # bytes


class ChecksumWriter(io.RawIOBase):
    """A write-only file object that sums what passes through. Needs no second read of the file."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._crc = 0
        self._size = 0

    def write(self, data: Any) -> int:
        """Pass `data` (any bytes-like object) on to the file."""
        self._file.write(data)
        self._crc = crc64nvme(data, self._crc)
        self._size += len(data)
        return len(data)

    def entry(self) -> FileEntry:
        """Size and checksum of everything written so far."""
        return FileEntry(self._size, _format(self._crc))


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
        crc = 0
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(min(_CHUNK, max(size, 1)))
            view = memoryview(buffer)
            while count := file.readinto(buffer):
                crc = crc64nvme(view[:count], crc)
    except NOT_THERE:
        raise CorruptCheckpoint(f"{path.name} is missing") from None
    if _format(crc) != expected.checksum:
        raise CorruptCheckpoint(f"{path.name} has checksum {_format(crc)}, the manifest says {expected.checksum}")


def _format(crc: int) -> str:
    return f"crc64nvme:{crc:016x}"
