"""Host memory -> disk, durably and atomically: a checkpoint is there completely or not at all."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from src.checkpoint.catalog import Catalog, checkpoint_name
from src.checkpoint.direct import DirectFile
from src.checkpoint.manifest import MANIFEST_NAME, STATE_NAME, CorruptCheckpoint, FileEntry, Manifest, read_manifest
from src.checkpoint.sharded import Report
from src.errors import CheckpointError
from src.storage.local import fsync_directory, write_durably

WritePieces = Callable[[Callable[[], Path], Any], tuple[Any, list[Report]]]
"""`ShardedWriter.write`, but for what is known beforehand."""


def write_checkpoint(
    catalog: Catalog, state: dict[str, Any], manifest: Manifest, write_pieces: WritePieces | None = None
) -> tuple[Path, Manifest]:
    """Commit `state` as `step_…/`, described by `manifest` (whose `files` are filled in here).

    Everything is written and fsynced under a temporary name, the manifest last; then one rename makes
    it a checkpoint. A kill at any instant leaves either nothing visible or all of it.

    Args:
        state: What `torch.load(..., weights_only=True)` will return: tensors on the CPU, containers, numbers.
        write_pieces: Writes what of it is in pieces, together with the other ranks.

    Returns:
        The committed folder and its manifest.

    Raises:
        OSError: the disk refused (full, read-only, gone); nothing is left behind.
        FileExistsError: this step has a checkpoint already. Only one from before the evaluation of its state, for
            which there was no time then, is replaced by one from after it.
    """
    final = catalog.directory / checkpoint_name(manifest.global_step)
    temporary = catalog.temporary(manifest.global_step)

    def prepare() -> Path:
        if final.exists() and not _replaces(manifest, final):
            raise FileExistsError(f"{final} exists; a committed checkpoint is never overwritten")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        return temporary

    try:
        files: dict[str, FileEntry] = {}
        if write_pieces is None:
            prepare()
        else:
            state, reports = write_pieces(prepare, state)
            files = {name: entry for written, _ in reports for name, entry in written.items()}
            manifest = replace(manifest, finite=manifest.finite and all(finite for _, finite in reports))
        files[STATE_NAME] = _write_state(temporary / STATE_NAME, state)
        manifest = replace(manifest, files=files)
        write_durably(temporary / MANIFEST_NAME, manifest.to_json())
        fsync_directory(temporary)
        return catalog.adopt(temporary), manifest
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replaces(manifest: Manifest, path: Path) -> bool:
    try:
        return bool(manifest.metrics) and not read_manifest(path / MANIFEST_NAME).metrics
    except (CorruptCheckpoint, CheckpointError):
        return False


def _write_state(path: Path, state: dict[str, Any]) -> FileEntry:
    with DirectFile(path) as file, _without_crc32():
        try:
            torch.save(state, cast(IO[bytes], file))
        except RuntimeError as error:
            # torch's zip writer reports the disk's refusal as its own error; the disk's says more.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise OSError(f"cannot write {path}: {error}") from error
        return file.commit()


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Have torch.save leave out the CRC-32 that a zip archive has for each of its members.

    torch.load does not look at them, the manifest's checksum covers every byte, and they would take longer
    than all the rest together. The switch is the whole process's: a torch.save of your own that runs at the
    same moment leaves them out too.
    """
    wanted = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(wanted)
