"""The checkpoints of one run in a bucket, under the names that they have on the disk."""

import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from src.checkpoint.catalog import TEMPORARY_PREFIX, checkpoint_name, step_of
from src.checkpoint.checksum import crc_in
from src.checkpoint.manifest import MANIFEST_NAME, CorruptCheckpoint, Manifest, parse_manifest
from src.errors import CheckpointError, ConfigError
from src.storage.bucket import Bucket, Stat
from src.storage.failures import Conflict, NotThere, StoreError
from src.storage.local import fsync_directory, write_durably
from src.storage.transfer import ArrivedDamaged, Progress, download_whole, ignore, look, upload

log = logging.getLogger(__name__)

_THREADS = 16  # manifests read at once

Connect = Callable[[str], Bucket]
"""A client for a bucket of this name."""


class RemoteCatalog:
    """Checkpoints below a prefix. One is there if and only if its manifest is: uploaded last, deleted first."""

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        """
        Args:
            prefix: What stands before `/step_…/`, without a slash at its end.
        """
        self.bucket = bucket
        self.prefix = prefix

    def url(self, global_step: int) -> str:
        """How a person would write it."""
        return self.bucket.url(self._key(global_step))

    def steps(self) -> list[int]:
        """All checkpoints, oldest first. One request per thousand objects."""
        return [step for step, names in self._objects().items() if MANIFEST_NAME in names]

    def were_set_aside(self, label: str) -> list[int]:
        """What `set_aside` took out earlier under this label, and that has not been replaced."""
        aside = f"{MANIFEST_NAME}.{label}"
        return [step for step, names in self._objects().items() if aside in names and MANIFEST_NAME not in names]

    def manifest(self, global_step: int) -> Manifest:
        """Read a manifest.

        Raises:
            CorruptCheckpoint: it is no good, or not there.
            StoreError: the store cannot be asked.
        """
        return self._manifest(global_step)[1]

    def manifests(self, steps: list[int]) -> dict[int, Manifest | Exception]:
        """Read many manifests, several at once. Where one is no good: why."""

        def read(step: int) -> Manifest | Exception:
            try:
                return self.manifest(step)
            except (CorruptCheckpoint, CheckpointError) as error:
                return error

        with ThreadPoolExecutor(_THREADS) as threads:
            return dict(zip(steps, threads.map(read, steps), strict=True))

    def upload(
        self,
        path: Path,
        manifest: Manifest,
        confirm: Callable[[], None],
        before_commit: Callable[[], None] = lambda: None,
        progress: Progress = ignore,
    ) -> None:
        """Upload a committed checkpoint; what has arrived already, before a kill say, is not sent again.

        Args:
            confirm: Called before anything changes that another machine could have written; raises if this one may
                not write there any more.
            before_commit: Called before it becomes visible.

        Raises:
            Damaged: a file is not what was saved.
            OSError: a file cannot be read.
            StoreError: the store did not take it.
        """
        manifest_key, text = self._key(manifest.global_step, MANIFEST_NAME), (path / MANIFEST_NAME).read_bytes()

        def replace() -> None:
            self.bucket.delete(manifest_key, confirm)  # which describes what is replaced

        for name, entry in manifest.files.items():
            key, crc = self._key(manifest.global_step, name), crc_in(entry.checksum)
            there = look(self.bucket, key)
            if there == Stat(entry.size, crc):
                progress(entry.size)
            else:
                if there is not None:
                    log.warning("%s is not what is here (%s); it is uploaded again", self.bucket.url(key), there)
                upload(self.bucket, path / name, key, entry.size, crc, progress, replace if there else confirm)
        before_commit()
        try:
            self.bucket.put(manifest_key, text, if_absent=True, confirm=confirm)
        except Conflict:
            # From an earlier life of the run that knew nothing of this one, or an answer was lost. The files are ours
            # now, so the manifest has to be.
            there_already = self.bucket.get(manifest_key)
            if there_already.body != text:
                log.warning("%s was there already, from an earlier life; replaced", self.bucket.url(manifest_key))
                self.bucket.put(manifest_key, text, if_match=there_already.etag, confirm=confirm)

    def fetch(self, global_step: int, folder: Path, progress: Progress = ignore) -> None:
        """Download a checkpoint into `folder`, and verify it; the manifest is written last.

        Raises:
            CorruptCheckpoint: it is not what was saved, or not all there.
            OSError: the disk refused.
            StoreError: the store cannot be asked.
        """
        text, manifest = self._manifest(global_step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, entry in manifest.files.items():
            key, crc = self._key(global_step, name), crc_in(entry.checksum)
            there = self.bucket.stat(key)
            if there is None or there.size != entry.size or there.crc not in (None, crc):
                found = f"{there.size} bytes" if there else "nothing"
                raise CorruptCheckpoint(f"{name} is not what was saved: {found} in the bucket, {entry.size} bytes then")
            try:
                download_whole(self.bucket, key, Stat(entry.size, crc), folder / name, progress)
            except ArrivedDamaged as error:
                if there.crc == crc:  # it is good there
                    raise
                raise CorruptCheckpoint(f"{name} has another checksum than the manifest says") from error
        write_durably(folder / MANIFEST_NAME, text.decode("utf-8"))
        fsync_directory(folder)

    def verify(self, global_step: int) -> Manifest:
        """Compare what the bucket holds with the manifest: by the checksums that the store keeps, or by reading.

        Raises:
            CorruptCheckpoint: it is not what was saved, or not all there.
            StoreError: the store cannot be asked.
        """
        manifest = self.manifest(global_step)
        for name, entry in manifest.files.items():
            found = look(self.bucket, self._key(global_step, name))
            if found is None:
                raise CorruptCheckpoint(f"{name} is missing")
            if found != Stat(entry.size, crc_in(entry.checksum)):
                raise CorruptCheckpoint(f"{name} has {found}")
        return manifest

    def set_aside(self, global_step: int, label: str) -> None:
        """Have a checkpoint not count any more, and keep it, until its name is needed again. (To rename a large
        object is to copy it.)"""
        source = self._key(global_step, MANIFEST_NAME)
        self.bucket.put(f"{source}.{label}", self.bucket.get(source).body)
        self.bucket.delete(source)

    def delete(self, global_step: int) -> None:
        """Delete a checkpoint: first what makes it one."""
        self.bucket.delete(self._key(global_step, MANIFEST_NAME))
        for key, _ in list(self.bucket.keys(f"{self._key(global_step)}/")):
            self.bucket.delete(key)

    def sweep(self, keep: Container[int]) -> int:
        """Delete what belongs to no checkpoint: an upload or a deletion was cut short.

        Args:
            keep: Steps whose upload may go on where it stopped.

        Returns:
            How many objects there were.
        """
        strays = [
            self._key(step, name)
            for step, names in self._objects().items()
            # One that was set aside has a manifest too, under another name.
            if step not in keep and not any(name.startswith(MANIFEST_NAME) for name in names)
            for name in names
        ]
        for key in strays:
            self.bucket.delete(key)
        return len(strays)

    def _objects(self) -> dict[int, list[str]]:
        """The names of the objects in each folder that is called like a checkpoint, oldest step first."""
        found: dict[int, list[str]] = defaultdict(list)
        for key, _ in self.bucket.keys(f"{self.prefix}/step_"):
            folder, _, name = key.removeprefix(f"{self.prefix}/").partition("/")
            step = step_of(Path(folder))
            if step is not None and folder == checkpoint_name(step):
                found[step].append(name)
        return dict(sorted(found.items()))

    def _manifest(self, global_step: int) -> tuple[bytes, Manifest]:
        key = self._key(global_step, MANIFEST_NAME)
        try:
            text = self.bucket.get(key).body
        except NotThere:
            raise CorruptCheckpoint(f"{MANIFEST_NAME} is missing") from None
        manifest = parse_manifest(text, self.bucket.url(key))
        if manifest.global_step != global_step:
            raise CorruptCheckpoint(f"{MANIFEST_NAME} says step {manifest.global_step}")
        return text, manifest

    def _key(self, global_step: int, name: str | None = None) -> str:
        folder = f"{self.prefix}/{checkpoint_name(global_step)}"
        return f"{folder}/{name}" if name else folder


def is_url(place: str) -> bool:
    """Whether a `resume=` or `init_from=` names something in a bucket."""
    return place.startswith("s3://")


def catalogs_at(url: str, connect: Connect) -> tuple[list[RemoteCatalog], int | None]:
    """Where the checkpoints may be that a URL means, likeliest first; and which one, if it names one."""
    name, _, key = url.removeprefix("s3://").partition("/")
    key = key.rstrip("/")
    bucket = connect(name)
    parent, _, last = key.rpartition("/")
    step = step_of(Path(last))
    if step is not None:
        return [RemoteCatalog(bucket, parent)], step
    return [RemoteCatalog(bucket, prefix.strip("/")) for prefix in (f"{key}/checkpoints", key)], None


@contextmanager
def at_hand(key: str, place: str, connect: Connect, directory: Path) -> Iterator[Path]:
    """A path for what `resume=` or `init_from=` names. What is in a bucket is brought to a temporary folder first.

    Args:
        key: The setting, for the error.
        place: A path; or the URL of a checkpoint, of a run (its newest good one is meant), or of a `.pt` file.
        directory: Where the temporary folder may be.

    Raises:
        ConfigError: there is nothing of the kind.
        CheckpointError: the bucket or the disk refused.
    """
    if not is_url(place):
        yield Path(place)
        return
    folder = directory / f"{TEMPORARY_PREFIX}fetched"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield _fetch(key, place, connect, folder)
    except StoreError as error:
        raise CheckpointError(f"{key}={place}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch(key: str, url: str, connect: Connect, folder: Path) -> Path:
    if url.endswith(".pt"):
        name, _, object_key = url.removeprefix("s3://").partition("/")
        bucket = connect(name)
        there = bucket.stat(object_key)
        if there is None:
            raise ConfigError(key, url, "there is no such object")
        download_whole(bucket, object_key, there, folder / "weights.pt")
        return folder / "weights.pt"
    places, wanted = catalogs_at(url, connect)
    for catalog in places:
        for step in reversed(catalog.steps()):
            if wanted in (None, step):
                target = folder / checkpoint_name(step)
                try:
                    catalog.fetch(step, target)
                except CorruptCheckpoint as error:
                    log.warning("skipped damaged checkpoint %s: %s", catalog.url(step), error)
                    continue
                return target
    raise ConfigError(key, url, "is no good checkpoint; name a folder step_…, a run that has some, or a .pt file")
