"""Committed checkpoints -> bucket, in the background, newest first; and back, on a machine that has none."""

import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from src.background import byte_bar, yield_to_training
from src.checkpoint.catalog import RETIRED, Catalog, checkpoint_name
from src.checkpoint.manifest import CorruptCheckpoint, Manifest
from src.checkpoint.mirror import Mirror
from src.checkpoint.outage import Outage
from src.checkpoint.policy import CheckpointPolicy, Saved
from src.checkpoint.remote import RemoteCatalog
from src.checkpoint.run_files import RunFiles
from src.errors import CheckpointError, MirrorError
from src.storage.failures import Refused, StoreError
from src.storage.lease import Lease
from src.storage.local import LocalStorage
from src.storage.s3 import S3Storage
from src.storage.transfer import Damaged, abort_uploads

log = logging.getLogger(__name__)

_FILES_EVERY = 30.0  # seconds between uploads of log and TensorBoard's events
_LEAVING = 5.0  # seconds for the last lines of the log, and for giving up the lease


def open_mirror(storage: LocalStorage, name: str, catalog: Catalog, policy: CheckpointPolicy) -> Mirror:
    """The mirror that a `storage` group asks for.

    Args:
        name: Of the run, below the prefix.
    """
    if isinstance(storage, S3Storage):
        return BucketMirror(storage, name, catalog, policy)
    return Mirror(storage)


class BucketMirror(Mirror):
    """Mirrors to a bucket. Nothing here makes training wait, except `open`, `fetch` and `begin` before it, and `flush`
    after it.

    There is no queue: the thread looks for the newest checkpoint on the disk that should be in the bucket and is
    not. So what is rotated away before its turn is forgotten, and what a kill left undone is found again.
    """

    def __init__(self, storage: S3Storage, name: str, catalog: Catalog, policy: CheckpointPolicy) -> None:
        super().__init__(storage)
        self._every = storage.every
        self._flush_timeout = storage.flush_timeout
        self._catalog = catalog
        self._policy = replace(policy, keep=storage.keep or policy.keep)
        self._bucket = storage.connect()
        self._root = storage.key(name)
        self.url = self._bucket.url(self._root)
        self._remote = RemoteCatalog(self._bucket, f"{self._root}/checkpoints")
        directory = catalog.directory.parent
        self._files = RunFiles(self._bucket, self._root, directory)
        self._lease = Lease(
            storage.connect(read_timeout=5, tries=4),  # of its own: it outlives the transfers
            f"{self._root}/lease.json",
            home=_home(directory),
            holder=f"process {os.getpid()} on {socket.gethostname()}",
            seconds=storage.lease_seconds,
        )
        # What the thread, the loop, and the thread that writes checkpoints all look at.
        self._lock = threading.RLock()
        self._forgotten: frozenset[int] = frozenset()
        self._mirrored: dict[int, Manifest | None] = {}  # None: not read yet, or unreadable
        self._unchecked: set[int] = set()  # there since an earlier life, and here: compared when nothing else is due
        self._wanted: set[int] = set()
        self._damaged: set[int] = set()  # on the disk, so that it cannot be mirrored
        self._commits = 0
        self._newest = 0  # mirrored step
        self._arrived = 0  # bytes of the upload in progress
        self._lag = {"mirror/checkpoints_waiting": 0.0, "mirror/megabytes_waiting": 0.0}
        self._files_at = float("-inf")  # when they were uploaded last
        self._outage = Outage()
        self._flushing = threading.Event()
        self._flushed = threading.Event()
        self._closing = threading.Event()
        self._news = threading.Event()
        self._hurry = threading.Event()  # do not sit out a pause
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def open(self) -> None:
        """Take the lease, and list the checkpoints.

        Raises:
            CheckpointError: the bucket cannot be asked. Training must not start over, or from an older checkpoint.
            HoldfastError: another machine is training this run.
        """
        try:
            self._lease.acquire()
            self.steps = frozenset(self._remote.steps())
        except StoreError as error:
            raise CheckpointError(
                f"{error}. What is there cannot be known, and training does not start over by itself: mend it and run "
                "the same command again, or go on without a mirror (storage=local)"
            ) from error

    def newest_manifest(self) -> Manifest | None:
        """Of the newest good one that was there when it was opened.

        Raises:
            CheckpointError: the bucket cannot be asked.
        """
        for step in sorted(self.steps, reverse=True):
            with suppress(CorruptCheckpoint), _or_no_training():
                return self._remote.manifest(step)
        return None

    def fetch(self, global_step: int) -> Path:
        """Download a checkpoint, in parallel, and verify it.

        Raises:
            CorruptCheckpoint: it is damaged or not all there.
            CheckpointError: the bucket or the disk refused.
        """
        folder = self._catalog.temporary(global_step)
        url = self._remote.url(global_step)
        try:
            size = self._remote.manifest(global_step).nbytes
            with byte_bar(f"fetching {url}", size) as bar:
                self._remote.fetch(global_step, folder, bar.update)
        except (StoreError, OSError) as error:
            raise CheckpointError(f"{url}: {error}; mend it and run the same command again") from error
        log.info("fetched %s", url)
        return folder

    def retired(self) -> list[int]:
        """Steps that an earlier life abandoned on purpose.

        Raises:
            CheckpointError: the bucket cannot be asked.
        """
        with _or_no_training():
            return self._remote.were_set_aside(RETIRED)

    def forget(self, above: int) -> None:
        """Leave out of `steps` what is above that step."""
        self._forgotten = frozenset(step for step in self.steps if step > above)
        self.steps -= self._forgotten

    def begin(self, above: int, label: str = RETIRED) -> None:
        """Sweep what a killed life left half-done, set aside what has been abandoned, and start the thread.

        Raises:
            CheckpointError: the bucket refused.
        """
        with _or_no_training():
            for step in sorted(self.steps | self._forgotten):
                if step > above or step in self._forgotten:
                    log.warning("%s no longer counts: its manifest is renamed ….%s", self._remote.url(step), label)
                    self._remote.set_aside(step, label)
            self._sweep()
            self._files.fetch_history()
            self._mirrored = {step: None for step in self.steps if step <= above}
            self._newest = max(self._mirrored, default=0)
            local = set(self._catalog.by_step())
            self._unchecked = self._mirrored.keys() & local
            self._wanted = local if self._every == 1 else self._last_and_best()
            self._lag = self._measure_lag()
        log.info("mirroring to %s", self.url)
        self._thread.start()

    def committed(self, global_step: int) -> None:
        """Mirror it, if it is its turn."""
        with self._lock:
            replaced = global_step in self._mirrored
            self._mirrored.pop(global_step, None)
            self._damaged.discard(global_step)
            if replaced or self._commits % self._every == 0 or self._is_best(global_step):
                self._wanted.add(global_step)
            self._commits += 1
        with suppress(OSError):  # a disk that cannot be listed is no failure of the save
            self._lag = self._measure_lag()
        self._news.set()

    def check(self) -> None:
        """Whether the lease is still ours, as far as is known."""
        if self._lease.lost:
            raise MirrorError(
                f"{self.url} has been taken over by another machine, which goes on with this run: training stops "
                "here. (If that was not meant to be, give one of the two another name with run=NAME)"
            )

    def newest_step(self) -> int:
        """The newest checkpoint whose upload was verified."""
        return self._newest

    def lag(self) -> dict[str, float]:
        """Checkpoints and megabytes that are still to be uploaded, as of the last change."""
        return self._lag

    def flush(self, patience: Callable[[], float] = lambda: math.inf) -> None:
        """Wait until everything that should be in the bucket is there: up to `storage.flush_timeout` seconds."""
        if not self._thread.is_alive() or self._flushing.is_set():
            return
        deadline = time.monotonic() + self._flush_timeout
        try:
            with self._lock:  # whatever their turn
                self._wanted |= self._last_and_best()
            self._flushing.set()
            self._news.set()
            self._hurry.set()
            total = self._bytes_waiting()
            with byte_bar(f"mirroring to {self.url}", total) as bar:
                while not self._flushed.wait(0.1) and time.monotonic() < deadline and patience() > 0:
                    if self._lease.lost:
                        break
                    bar.update(max(0, total - self._bytes_waiting() - bar.n))
            missing = ", ".join(map(checkpoint_name, self._waiting())) or "log and events"
        except OSError as error:  # of such a disk nothing more is to be had
            missing = f"what is in {self._catalog.directory}, which cannot be read ({error.strerror or error})"
        if not self._flushed.is_set():
            log.error("not in %s: %s%s", self.url, missing, self._outage.because)

    def insist(self) -> None:
        """Raises unless `flush` has brought everything there."""
        if not self._flushed.is_set():
            raise MirrorError(
                f"the run is done and safe in its directory, but not all of it is in {self.url}"
                f"{self._outage.because}; run the same command again to upload the rest"
            )
        damaged = max(self._damaged, default=0)
        if damaged > self._newest:
            raise MirrorError(
                f"the run is done, but {checkpoint_name(damaged)} has been damaged on the disk before it was in "
                f"{self.url}; run the same command again, which goes on from the one before"
            )

    def close(self) -> None:
        """End the threads, also amid an upload, and release the lease; a store that hangs is not waited for."""
        self._closing.set()
        self._news.set()
        self._hurry.set()
        if not self._flushed.is_set():
            self._bucket.cancel()
        leaving = threading.Thread(target=self._leave, name="mirror-leaves", daemon=True)
        leaving.start()
        leaving.join(_LEAVING)
        if leaving.is_alive():
            log.warning("%s takes too long to answer: it is left as it is, and the lease to run out", self.url)
            self._bucket.cancel()

    def _leave(self) -> None:
        if self._thread.ident is not None:  # it was begun
            self._thread.join()
            if self._flushed.is_set():
                with suppress(StoreError, OSError):  # the log's last lines
                    self._upload_files()
        self._lease.release()

    def _sweep(self) -> None:
        """Remove what a killed life left in the bucket: uploads and deletions that it did not finish."""
        try:
            swept = abort_uploads(self._bucket, f"{self._root}/") + self._remote.sweep(keep=self._catalog.by_step())
        except Refused as error:
            log.warning("what earlier lives left unfinished in %s stays there: %s", self.url, error)
        else:
            if swept:
                log.info("removed %d things that an earlier life had left unfinished in %s", swept, self.url)

    def _work(self) -> None:
        yield_to_training()
        while not self._closing.is_set():
            self._news.clear()
            flushing = self._flushing.is_set()
            try:
                busy = self._turn(flushing)
                self._lag = self._measure_lag()
            except Exception as error:
                if self._closing.is_set():
                    return
                if not isinstance(error, StoreError | OSError):
                    log.exception("the mirror tripped; it goes on")
                self._hurry.wait(self._outage.failed(error, self._at_risk(), hurry=self._flushing.is_set()))
                self._hurry.clear()
                continue
            self._outage.over()
            if not busy:
                if flushing:
                    self._flushed.set()
                self._news.wait(_FILES_EVERY)

    def _turn(self, flushing: bool) -> bool:
        """Upload one checkpoint, or if there is none the other files. Returns whether to look again at once."""
        step = max(self._waiting() or self._unchecked, default=None)
        if step is not None:
            self._upload(step)
            self._unchecked.discard(step)
            self._rotate()
        if (flushing and step is None) or time.monotonic() - self._files_at >= _FILES_EVERY:
            self._upload_files()
            self._files_at = time.monotonic()
        return step is not None

    def _waiting(self) -> list[int]:
        """What is on the disk, should be in the bucket, and is not; without what would be deleted there at once."""
        local = self._catalog.by_step()
        with self._lock:
            candidates = self._wanted.intersection(local) - self._mirrored.keys()
            keep = self._policy.to_keep([self._saved(step) for step in candidates | self._mirrored.keys()])
            return sorted(candidates & keep)

    def _bytes_waiting(self) -> int:
        return max(0, sum(map(self._size, self._waiting())) - self._arrived)

    def _measure_lag(self) -> dict[str, float]:
        return {
            "mirror/checkpoints_waiting": float(len(self._waiting())),
            "mirror/megabytes_waiting": self._bytes_waiting() / 1e6,
        }

    def _upload(self, step: int) -> None:
        path = self._catalog.directory / checkpoint_name(step)
        with self._catalog.hold(path) as there:
            if not there:
                return
            manifest = None
            try:
                manifest = self._catalog.manifest(path)
                if step in self._unchecked and self._knows_more(step, manifest):
                    return
                self._arrived = 0
                # Log and curves go first: after the loss of this disk none of what led to the checkpoint is missing.
                self._remote.upload(path, manifest, self._lease.confirm, self._upload_files, self._count)
            except (Damaged, CorruptCheckpoint, CheckpointError) as error:
                if self._manifest_here(step) != manifest:  # it has just been replaced: the next turn
                    return
                log.error("%s is damaged and is not mirrored: %s", path, error)
                with self._lock:
                    self._wanted.discard(step)
                    if step not in self._mirrored:
                        self._damaged.add(step)
                return
            finally:
                self._arrived = 0
            with self._lock:
                if self._manifest_here(step) in (manifest, None):
                    self._mirrored[step] = manifest
        self._newest = max(self._newest, step)

    def _knows_more(self, step: int, here: Manifest) -> bool:
        """Whether the bucket has this checkpoint from after the evaluation that the one here had no time for."""
        try:
            there = self._remote.manifest(step)
        except CorruptCheckpoint:
            return False
        if there.metrics and not here.metrics:
            with self._lock:
                self._mirrored[step] = there
            return True
        return False

    def _upload_files(self) -> None:
        self._lease.confirm()
        self._files.upload_changed()

    def _rotate(self) -> None:
        """Delete from the bucket what it no longer keeps; called after a newer one has been verified there."""
        with self._lock:
            unread = [step for step, manifest in self._mirrored.items() if manifest is None]
        for step, found in self._remote.manifests(unread).items():
            with self._lock:
                if isinstance(found, Manifest) and step in self._mirrored:
                    self._mirrored[step] = found
        with self._lock:
            there = set(self._mirrored)
            keep = self._policy.to_keep([self._saved(step) for step in there])
        for step in there - keep:
            self._lease.confirm()
            self._remote.delete(step)
            self._unchecked.discard(step)
            with self._lock:
                self._mirrored.pop(step, None)

    def _last_and_best(self) -> set[int]:
        """Of what is on the disk, what is mirrored whatever its turn.

        Raises:
            OSError: the disk cannot be listed.
        """
        return replace(self._policy, keep=1).to_keep([self._saved(step) for step in self._catalog.by_step()])

    def _is_best(self, step: int) -> bool:
        manifest = self._manifest_here(step)
        return manifest is not None and manifest.best is not None and manifest.best.get("global_step") == step

    def _manifest(self, step: int) -> Manifest | None:
        """Of a checkpoint that is mirrored or on the disk; None if it is no good, or has just gone."""
        return self._mirrored.get(step) or self._manifest_here(step)

    def _manifest_here(self, step: int) -> Manifest | None:
        with suppress(CorruptCheckpoint, CheckpointError, OSError):
            return self._catalog.manifest(self._catalog.directory / checkpoint_name(step))
        return None

    def _saved(self, step: int) -> Saved:
        manifest = self._manifest(step)
        return manifest.saved if manifest else Saved(step)

    def _size(self, step: int) -> int:
        manifest = self._manifest(step)
        return manifest.nbytes if manifest else 0

    def _count(self, nbytes: int) -> None:
        self._arrived += nbytes

    def _at_risk(self) -> str:
        return (
            f"only on this disk: {self._lag['mirror/checkpoints_waiting']:.0f} checkpoints "
            f"({self._lag['mirror/megabytes_waiting']:.0f} MB), the newest in the bucket is of step {self._newest}"
        )


@contextmanager
def _or_no_training() -> Iterator[None]:
    """Before the first step, what goes wrong with bucket or disk ends the run."""
    try:
        yield
    except (StoreError, OSError) as error:
        raise CheckpointError(f"{error}; mend it and run the same command again") from error


def _home(directory: Path) -> str:
    """A name for the run directory that no other directory has: not a copy of it on another machine, and not
    another of the same name in another container."""
    file = directory / ".home"
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(uuid.uuid4().hex)
    except FileExistsError:
        pass
    return f"{socket.gethostname()}:{directory.resolve()}:{file.read_text(encoding='utf-8')}"
