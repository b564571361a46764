"""What it takes to look at a run from elsewhere, beside its checkpoints: config, log, TensorBoard's events, goodput."""

import errno
import logging
import re
from pathlib import Path

from src.storage.bucket import Bucket
from src.storage.transfer import Damaged, download_whole, upload

log = logging.getLogger(__name__)

_LOG = "train.log"
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_EVENTS = re.compile(rf"tensorboard/({_NAME}/)*{_NAME}")
_CONFIG = re.compile(rf"\.hydra/{_NAME}\.yaml")
_BAD_NAMES = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
_LIVES = re.compile(r"goodput/\d+-\d+\.json")


class RunFiles:
    """The files of one run, here and below a prefix, under the same names."""

    def __init__(self, bucket: Bucket, prefix: str, directory: Path) -> None:
        """
        Args:
            prefix: What stands before the names, without a slash at its end.
            directory: The run directory.
        """
        self._bucket = bucket
        self._prefix = prefix
        self._directory = directory
        self._uploaded: dict[str, tuple[int, int]] = {}

    def upload_changed(self) -> None:
        """Upload what has changed since the last call.

        Raises:
            StoreError: the store did not take it.
        """
        for name in self._local():
            path = self._directory / name
            try:
                stat = path.stat()
                version = (stat.st_size, stat.st_mtime_ns)
                if self._uploaded.get(name) != version:
                    upload(self._bucket, path, f"{self._prefix}/{name}", stat.st_size)
                    self._uploaded[name] = version
            except (OSError, Damaged):  # gone or cut short just now: the next call sees
                continue

    def fetch_history(self) -> None:
        """Bring here what earlier lives of the run logged on other machines, so that log and curves are whole.

        Raises:
            StoreError: the store cannot be asked.
            OSError: the disk refused.
        """
        for name, size in self._remote():
            target = self._directory / name
            if _EVENTS.fullmatch(name) or _LIVES.fullmatch(name):
                if target.exists() or self._fetch(name, target):
                    stat = target.stat()
                    if stat.st_size == size:  # events are only ever appended
                        self._uploaded[name] = (size, stat.st_mtime_ns)
            elif name == _LOG:
                earlier = target.with_name(f".tmp_{name}")
                if self._fetch(name, earlier):
                    _prepend(target, earlier)

    def fetch_all(self) -> None:
        """Bring everything here that is not here yet.

        Raises:
            StoreError: the store cannot be asked.
            OSError: the disk refused.
        """
        for name, _ in self._remote():
            if not (self._directory / name).exists():
                self._fetch(name, self._directory / name)

    def _local(self) -> list[str]:
        patterns = (".hydra/*", "tensorboard/**/*", "goodput/*", _LOG)
        found = [path for pattern in patterns for path in self._directory.glob(pattern)]
        names = [path.relative_to(self._directory).as_posix() for path in sorted(found) if path.is_file()]
        return list(filter(_is_one, names))

    def _remote(self) -> list[tuple[str, int]]:
        """Names and sizes. What is in a bucket is not to be trusted: a name that could lead elsewhere is none."""
        found = []
        for part in (".hydra/", "tensorboard/", "goodput/", _LOG):
            for key, size in self._bucket.keys(f"{self._prefix}/{part}"):
                name = key.removeprefix(f"{self._prefix}/")
                if _is_one(name):
                    found.append((name, size))
        return found

    def _fetch(self, name: str, target: Path) -> bool:
        """Returns whether it is here now. A name that no disk takes is left out: history is not worth a run."""
        key = f"{self._prefix}/{name}"
        there = self._bucket.stat(key)
        if there is None:  # gone since it was listed
            return False
        temporary = target.with_name(f".tmp_{target.name}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            download_whole(self._bucket, key, there, temporary)
            temporary.rename(target)
        except OSError as error:
            if error.errno not in _BAD_NAMES:
                raise
            log.warning("%s is left there: %s", self._bucket.url(key), error)
            return False
        return True


def _is_one(name: str) -> bool:
    return name == _LOG or any(pattern.fullmatch(name) for pattern in (_EVENTS, _CONFIG, _LIVES))


def _prepend(path: Path, earlier: Path) -> None:
    """Put what a log had elsewhere before what it has here, once, though both may begin alike.

    In place: a handler that appends has it open, and goes on after the new end.

    Args:
        path: The log.
        earlier: A file with what it had elsewhere, which is gone afterwards.
    """
    own, history = path.read_bytes() if path.exists() else b"", earlier.read_bytes()
    earlier.unlink()
    if own.startswith(history):
        return
    alike = 0
    for line, other in zip(own.splitlines(True), history.splitlines(True), strict=False):
        if line != other:
            break
        alike += len(line)
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(history + own[alike:])
