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
from src.errors import CheckpointError
from src.storage.local import fsync_directory, write_durably


def write_checkpoint(
    catalog: Catalog, state: dict[str, Any], manifest: Manifest, finite: Callable[[], bool] = lambda: True
) -> tuple[Path, Manifest]:
    """Commit `state` as `step_…/`, described by `manifest` (whose `files` are filled in here).

    Everything is written and fsynced under a temporary name, the manifest last; then one rename makes
    it a checkpoint. A kill at any instant leaves either nothing visible or all of it.

    Args:
        state: What `torch.load(..., weights_only=True)` will return: tensors on the CPU, containers, numbers.
        finite: Whether the weights are numbers; asked when the state is on the disk.

    Returns:
        The committed folder and its manifest.

    Raises:
        OSError: the disk refused (full, read-only, gone); nothing is left behind.
        FileExistsError: this step has a checkpoint already. Only one from before the evaluation of its state, for
            which there was no time then, is replaced by one from after it.
    """
    with being_written(catalog, manifest) as folder:
        return commit(catalog, folder, state, manifest, finite)


@contextmanager
def being_written(catalog: Catalog, manifest: Manifest) -> Iterator[Path]:
    """The folder in which a checkpoint is put together; gone, should that fail."""
    final = catalog.directory / checkpoint_name(manifest.global_step)
    if final.exists() and not _replaces(manifest, final):
        raise FileExistsError(f"{final} exists; a committed checkpoint is never overwritten")
    temporary = catalog.temporary(manifest.global_step)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def commit(
    catalog: Catalog, folder: Path, state: dict[str, Any], manifest: Manifest, finite: Callable[[], bool]
) -> tuple[Path, Manifest]:
    """Write what is missing beside the manifest's files, which ranks have written there, and make it a checkpoint."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != entry.size:
            raise OSError(f"another rank's {path} is not here: trainer=fsdp needs a run directory that all ranks share")
    files = {**manifest.files, STATE_NAME: _write_state(folder / STATE_NAME, state)}
    manifest = replace(manifest, files=files, finite=manifest.finite and finite())
    write_durably(folder / MANIFEST_NAME, manifest.to_json())
    fsync_directory(folder)
    return catalog.adopt(folder), manifest


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
