"""The local disk: durable primitives, and the check that it can hold a run before the run begins."""

import os
import shutil
from pathlib import Path

from src.errors import ConfigError, require_number
from src.storage.bucket import Bucket

_GB = 1e9


def fsync_directory(path: Path) -> None:
    """Make the names in a folder durable: files created in it, renamed into it, or removed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write a small file and wait until it is on the disk. The folder's own fsync is the caller's."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


class LocalStorage:
    """Keep checkpoints in the run directory, and nowhere else."""

    def __init__(self, min_free_gb: float = 1.0) -> None:
        """
        Args:
            min_free_gb: Disk space (10⁹ bytes) that the run's checkpoints must leave free.

        Raises:
            ConfigError: `min_free_gb` is not a number >= 0.
        """
        require_number("storage.min_free_gb", min_free_gb, "gigabytes to leave free on the disk", at_least=0)
        self.min_free_gb = min_free_gb

    def connect(self, bucket: str) -> Bucket:
        """A client for a bucket that a URL names; where it is and how to log in is for boto3's own settings to say."""
        return Bucket(bucket)

    def preflight(self, directory: Path, checkpoint_bytes: int, copies: int, makes_room: bool = True) -> None:
        """Find out before step 1 whether the disk can hold the run.

        Does once, with a small file, all that a save does (create, fsync, rename, delete), and
        compares the free space with what `copies` checkpoints of `checkpoint_bytes` bytes will take.

        Args:
            makes_room: The checkpoints that are there will be rotated away as new ones come.

        Raises:
            ConfigError: the folder cannot be written to, or the disk is too small.
        """
        probe = directory / ".tmp_probe"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_durably(probe, "probe")
            probe.rename(directory / ".tmp_probe_renamed").unlink()
            fsync_directory(directory)
        except OSError as error:
            raise ConfigError(
                "hydra.run.dir",
                directory,
                f"cannot be written to ({error.strerror}); free the disk, mend its permissions, or choose another",
            ) from error
        held = sum(file.stat().st_size for file in directory.glob("step_????????/*")) if makes_room else 0
        held = min(held, copies * checkpoint_bytes)
        needed = copies * checkpoint_bytes + self.min_free_gb * _GB
        free = shutil.disk_usage(directory).free + held
        if free < needed:
            raise ConfigError(
                "hydra.run.dir",
                directory,
                f"has room for {free / _GB:.2f} GB, but {copies} checkpoints of {checkpoint_bytes / _GB:.2f} GB and "
                f"storage.min_free_gb={self.min_free_gb:g} take {needed / _GB:.2f} GB; free the disk, lower "
                "checkpoint.keep or checkpoint.keep_best, or choose another folder",
            )
