"""The checkpoints of one run: list them in order, verify them, rotate them, set damaged ones aside."""

import itertools
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from src.checkpoint.checksum import verify_file
from src.checkpoint.manifest import MANIFEST_NAME, CorruptCheckpoint, Manifest, read_manifest
from src.checkpoint.policy import CheckpointPolicy
from src.storage.local import fsync_directory

log = logging.getLogger(__name__)

_STEP_NAME = re.compile(r"step_(\d{8,})")
# Renamed and kept. While nothing else is there, the first two forbid to start over unasked.
CORRUPT, RETIRED, OLD = "corrupt", "retired", "old"
# Work in progress: a kill leaves these behind, and nobody ever reads them as a checkpoint.
TEMPORARY_PREFIX = ".tmp_"
_TRASH_PREFIX = ".trash_"
_REPLACED_PREFIX = ".replaced_"  # this one is whole: if nothing has taken its place, it gets it back


def checkpoint_name(global_step: int) -> str:
    """The folder name of a checkpoint. Zero-padded, so that names sort like steps."""
    return f"step_{global_step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's folder name stands for; None if it is no checkpoint's name."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def verify(path: Path) -> Manifest:
    """Check a checkpoint's manifest and every file it names, byte for byte.

    Raises:
        CorruptCheckpoint: something is missing or not what it was when it was saved.
    """
    manifest = read_manifest(path / MANIFEST_NAME)
    if manifest.global_step != step_of(path):
        raise CorruptCheckpoint(f"{MANIFEST_NAME} says step {manifest.global_step}, the folder is {path.name}")
    for name, entry in manifest.files.items():
        verify_file(path / name, entry)
    return manifest


class Catalog:
    """The folder `checkpoints/` of a run.

    `step_00000300/` came into being by one atomic rename, complete. Anything wrong with it later, be it a
    missing manifest, is damage, not an unfinished save: those are called `.tmp_…`. Order is by step, from the
    name; modification times mean nothing (copying and syncing change them).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._manifests: dict[Path, Manifest] = {}
        self._held: set[Path] = set()
        self._lock = threading.Lock()

    def by_step(self) -> dict[int, Path]:
        """The folders of all checkpoints, damaged ones too, oldest step first."""
        if not self.directory.is_dir():
            return {}
        steps = ((step, path) for path in self.directory.iterdir() if (step := step_of(path)) is not None)
        return dict(sorted(steps))

    def paths(self) -> list[Path]:
        """The same without the steps."""
        return list(self.by_step().values())

    def temporary(self, global_step: int) -> Path:
        """Where a checkpoint is put together before it is one."""
        return self.directory / (TEMPORARY_PREFIX + checkpoint_name(global_step))

    def readable(self) -> list[tuple[Path, Manifest]]:
        """The checkpoints that have a readable manifest, oldest step first. Their files are not verified."""
        found = []
        for path in self.paths():
            try:
                found.append((path, self.manifest(path)))
            except CorruptCheckpoint:
                continue
        return found

    def manifest(self, path: Path) -> Manifest:
        """The manifest of a checkpoint. It never changes, so it is read once: rotation stays cheap over a long run.

        Raises:
            CorruptCheckpoint: it is missing or no good.
            OSError: the disk cannot be read just now.
        """
        found = self._manifests.get(path)  # another thread may forget it the next moment
        if found is None:
            found = self._manifests[path] = read_manifest(path / MANIFEST_NAME)
        return found

    def set_aside(self, path: Path, label: str) -> Path:
        """Rename a checkpoint so that it no longer counts, and keep it. Returns where it is now."""
        name = f"{path.name.partition('.')[0]}.{label}"
        names = itertools.chain([name], (f"{name}{number}" for number in itertools.count(2)))
        target = next(folder for folder in map(path.with_name, names) if not folder.exists())
        self._manifests.pop(path, None)
        path.rename(target)
        return target

    def were_set_aside(self, label: str) -> list[Path]:
        """What `set_aside` renamed earlier under this label."""
        pattern = re.compile(rf"{_STEP_NAME.pattern}\.{label}\d*")
        return sorted(path for path in self.directory.glob("step_*") if pattern.fullmatch(path.name))

    def retire_above(self, global_step: int) -> None:
        """Set aside what lies above a step that training goes back to on purpose.

        Without this, an abandoned future would be the newest checkpoint at the next resume.
        """
        for step, path in self.by_step().items():
            if step > global_step:
                log.warning("%s is retired: renamed to %s", path, self.set_aside(path, RETIRED).name)

    def rotate(self, policy: CheckpointPolicy) -> None:
        """Delete what the policy no longer keeps. Call it only after a newer checkpoint is durable.

        A disk that refuses is reported, not raised: it costs space, never a checkpoint.
        """
        try:
            checkpoints = self.readable()
            keep = policy.to_keep([manifest.saved for _, manifest in checkpoints])
            for path, manifest in checkpoints:
                if manifest.global_step not in keep:
                    self._delete(path)
        except OSError as error:
            log.warning("could not delete old checkpoints in %s (%s)", self.directory, error)

    @contextmanager
    def hold(self, path: Path) -> Iterator[bool]:
        """While entered, rotation leaves a checkpoint alone, because it is being read. Gives whether it is there."""
        with self._lock:
            self._held.add(path)
        try:
            yield path.is_dir()
        finally:
            with self._lock:
                self._held.discard(path)

    def adopt(self, folder: Path) -> Path:
        """Commit a complete and fsynced checkpoint that lies in `directory` under a temporary name.

        If there is one of that step, the new one takes its place, also while it is being read: whoever does so has its
        files open, or finds others than the manifest says. A kill at any instant leaves one of the two, though perhaps
        only after `clear_leftovers`.

        Raises:
            OSError: the disk refused.
        """
        final = folder.with_name(folder.name.removeprefix(TEMPORARY_PREFIX))
        replaced = final.with_name(_REPLACED_PREFIX + final.name)
        with self._lock:
            if final.exists():
                final.rename(replaced)
                self._manifests.pop(final, None)
            try:
                folder.rename(final)
                fsync_directory(self.directory)
            except OSError:  # else a checkpoint would be there that counts as failed, and be in the way of the next try
                with suppress(OSError):
                    if final.exists():
                        final.rename(folder)
                    if replaced.exists():
                        replaced.rename(final)
                raise
        shutil.rmtree(replaced, ignore_errors=True)
        return final

    def clear_leftovers(self) -> None:
        """Delete what a killed process left half-written or half-deleted. Only for the run's one writer."""
        for path in self.directory.glob(f"{_REPLACED_PREFIX}*"):
            final = path.with_name(path.name.removeprefix(_REPLACED_PREFIX))
            if not final.exists():
                path.rename(final)
        for prefix in (TEMPORARY_PREFIX, _TRASH_PREFIX, _REPLACED_PREFIX):
            for path in self.directory.glob(f"{prefix}*"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _delete(self, path: Path) -> None:
        # Renamed first: a kill half-way through never leaves half a checkpoint under a real name.
        trash = path.with_name(_TRASH_PREFIX + path.name)
        shutil.rmtree(trash, ignore_errors=True)
        with self._lock:
            if path in self._held:  # it goes the next time
                return
            path.rename(trash)
        self._manifests.pop(path, None)
        shutil.rmtree(trash)
