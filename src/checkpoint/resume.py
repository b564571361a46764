"""Disk -> state: find the newest good checkpoint, load it, and check that it belongs to this run."""

import logging
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from src.checkpoint.catalog import CORRUPT, RETIRED, Catalog, step_of, verify
from src.checkpoint.manifest import MANIFEST_NAME, STATE_NAME, CorruptCheckpoint, Fork, Manifest
from src.checkpoint.mirror import NO_MIRROR, Mirror
from src.checkpoint.remote import at_hand, is_url
from src.checkpoint.snapshot import OnTensor, TensorPath, map_tensors_by_path, tensors_by_path
from src.errors import CheckpointError, ConfigError
from src.run import config_drift

if TYPE_CHECKING:
    from src.checkpoint.sharded import Pieces

log = logging.getLogger(__name__)

_ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class Found:
    """The checkpoint that training goes on from."""

    path: Path
    manifest: Manifest
    state: dict[str, Any]
    origin: str | None
    """The `resume=PATH` that this and all later checkpoints of the run go back to."""
    forks: Sequence[Fork]
    """Of this and all later ones, likewise."""
    retire_above: int
    """Going on from here abandons this run's checkpoints above this step."""
    foreign: bool = False
    """It is another run's: this one has no checkpoint of the state yet."""


def load_file(path: Path) -> Any:
    """Map a `.pt` file into host memory, whatever device it was saved from, without executing anything in it.

    The tensors are the file's pages, read when they are needed: whoever keeps one copies it.

    Raises:
        CorruptCheckpoint: it is damaged, or holds anything but tensors and plain values.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        mappable = file.read(len(_ZIP)) == _ZIP  # not so before torch 1.6
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # what torch.load raises on a damaged file is not specified
        raise CorruptCheckpoint(f"{path.name} cannot be loaded ({_why_not(error)})") from error


def _why_not(error: Exception) -> str:
    """In place of what torch.load says of a file that holds more than tensors: to load it unsafely."""
    if isinstance(error, RuntimeError):  # a broken archive
        return str(error).strip().partition("\n")[0]
    unsafe = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
    if unsafe:
        return f"it holds {unsafe[1]}; only tensors and plain values are loaded, for objects may run code"
    return "it is no file that torch.save wrote, or is damaged"


def load_checkpoint(path: Path) -> tuple[Manifest, dict[str, Any]]:
    """Verify a checkpoint byte for byte, then load it.

    Raises:
        CorruptCheckpoint: it is not what was saved.
        OSError: the disk cannot be read just now.
    """
    manifest, state = open_checkpoint(path)
    return manifest, map_tensors_by_path(state, reader_of(path))


def open_checkpoint(path: Path) -> tuple[Manifest, dict[str, Any]]:
    """Verify a checkpoint byte for byte. Its tensors are for `reader_of` to read.

    Raises:
        CorruptCheckpoint: it is not what was saved.
        OSError: the disk cannot be read just now.
    """
    manifest = verify(path)
    state = load_file(path / STATE_NAME)
    if not isinstance(state, dict) or state.get("global_step") != manifest.global_step:
        raise CorruptCheckpoint(f"{STATE_NAME} is not the state of step {manifest.global_step}")
    if any(tensor.is_meta for tensor in tensors_by_path(state).values()):
        _pieces_of(path).check(state)
    return manifest, state


def reader_of(path: Path) -> OnTensor:
    """Reads the tensors of an opened checkpoint: of a sharded one it puts them together, one by one, in host memory.

    What it returns raises CorruptCheckpoint, OSError, or MemoryError.
    """
    pieces = None

    def read(place: TensorPath, tensor: Tensor) -> Tensor:
        nonlocal pieces
        if not tensor.is_meta:
            return tensor
        pieces = pieces or _pieces_of(path)
        return pieces.read(place, tensor)

    return read


def _pieces_of(path: Path) -> "Pieces":
    from src.checkpoint.sharded import Pieces  # imported here: it takes a second that others need not pay

    return Pieces(path)


def newest_good(catalog: Catalog, mirror: Mirror = NO_MIRROR) -> tuple[Path, Manifest, dict[str, Any]] | None:
    """The newest checkpoint that verifies and opens, here or in the mirror; None if there never was one.

    One that is in the mirror only is fetched, and from then on one like any other. Damaged ones above are set aside
    (renamed, kept) and reported. A disk or a bucket that cannot be read is no damage: nothing is set aside for it.

    Raises:
        CheckpointError: there are checkpoints, but none can be read. Training must not start over by itself.
    """
    local, retire_above = _in_force(catalog, mirror)
    damaged: dict[Path, str] = {}
    reasons: list[str] = []
    for step in sorted(local.keys() | mirror.steps, reverse=True):
        path = local.get(step, catalog.directory)
        try:
            if step in local:
                try:
                    found = (path, *open_checkpoint(path))
                except CorruptCheckpoint as error:
                    damaged[path] = str(error)
                    reasons.append(f"{path.name}: {error}")
                else:
                    _set_aside(catalog, damaged)
                    return found
            if step in mirror.steps:
                try:
                    fetched = mirror.fetch(step)
                except CorruptCheckpoint as error:
                    log.warning("damaged checkpoint of step %d in %s: %s", step, mirror.url, error)
                    reasons.append(f"step {step} in {mirror.url}: {error}")
                else:
                    _set_aside(catalog, damaged)
                    damaged.clear()
                    if retire_above is not None:
                        catalog.retire_above(retire_above)
                    path = catalog.adopt(fetched)
                    try:
                        return (path, *open_checkpoint(path))
                    except CorruptCheckpoint as error:  # it was saved like that
                        damaged[path] = str(error)
                        reasons.append(f"{path.name}: {error}")
        except OSError as error:
            raise _unreadable(path, error) from error
    for label in (CORRUPT, RETIRED):
        reasons += [f"{path.name}: set aside earlier" for path in catalog.were_set_aside(label)]
    reasons += [f"step {step} in {mirror.url}: retired earlier" for step in mirror.retired()]
    if reasons:
        raise CheckpointError(
            f"{catalog.directory} holds checkpoints, but none can be read ({'; '.join(reasons)}). Training does not "
            "start over by itself: put a good one back, or start over with resume=never (what is there is renamed and "
            "kept)"
        )
    return None


def find_to_resume(catalog: Catalog, resume: str, mirror: Mirror) -> Found | None:
    """Find what `resume=auto|required|PATH` asks for. Abandons nothing yet: it may turn out not to fit.

    With PATH, a checkpoint's or a run's folder or URL, training goes on from there on purpose. The same command
    run again after a kill does not go back a second time, but on from the newest checkpoint that descends
    from PATH (its manifest says so).

    Returns:
        None to start afresh.

    Raises:
        CheckpointError: nothing to resume where there has to be, or nothing readable.
        ConfigError: PATH is no checkpoint.
    """
    if resume not in ("auto", "required"):
        return _find_place(catalog, resume, mirror)
    found = newest_good(catalog, mirror)
    if found is None and resume == "required":
        raise CheckpointError(f"resume=required, but {catalog.directory} has no checkpoint; resume=auto starts afresh")
    return _going_on(found) if found else None


def new_fork(above: int) -> Fork:
    """Training goes back on purpose, and abandons the run's checkpoints above this step; all of them with -1."""
    return Fork(above, uuid.uuid4().hex)


def check_compatible(
    manifest: Manifest, config: Mapping[str, Any], environment: Mapping[str, str], world_size: int
) -> None:
    """Refuse to go on with a config that changes the result; say so when the machine may change its last bits.

    Raises:
        ConfigError: names each setting that differs, and the ways out.
    """
    drift = config_drift(manifest.config, config)
    if drift:
        raise ConfigError(
            "resume",
            f"step {manifest.global_step}",
            f"this checkpoint was trained with other settings ({'; '.join(drift)}). Go on with the old ones, or train "
            "with the new ones elsewhere: run=NAME, and init_from=PATH to begin with this checkpoint's weights",
        )
    changed = [
        f"{key} {manifest.environment[key]} -> {value}"
        for key, value in environment.items()
        if manifest.environment.get(key, value) != value
    ]
    if manifest.world_size != world_size:
        changed.append(f"ranks {manifest.world_size} -> {world_size}")
    if changed:
        log.warning("not as when the checkpoint was made: %s; no longer bit-exact", ", ".join(changed))


def checkpoint_at(key: str, path: Path) -> Path:
    """The checkpoint that a path given by hand means: itself, or the newest good one of a run.

    Reads only: another run's damaged checkpoints are not ours to rename.

    Args:
        key: The setting that holds the path, for the error.

    Raises:
        ConfigError: there is none.
    """
    path = _folder_of(path)
    if not path.exists():
        raise ConfigError(key, path, "does not exist; name a checkpoint (a folder step_…), or a run that has some")
    if step_of(path) is not None and path.is_dir():
        return path
    for folder in (path / "checkpoints", path):
        for candidate in reversed(Catalog(folder).paths()):
            try:
                verify(candidate)
            except CorruptCheckpoint as error:
                log.warning("skipped damaged checkpoint %s: %s", candidate, error)
                continue
            return candidate
    raise ConfigError(key, path, "is no checkpoint; name a folder step_…, or a run directory that has some")


def _find_place(catalog: Catalog, place: str, mirror: Mirror) -> Found:
    origin = _origin(place)
    own = catalog.directory.resolve()
    if is_url(place):
        is_own_run = origin in (mirror.url, f"{mirror.url}/checkpoints")
    else:
        is_own_run = _folder_of(Path(place)).resolve() in (own, own.parent)
    if is_own_run:
        found = newest_good(catalog, mirror)
        if found is None:
            raise ConfigError("resume", place, "has no checkpoint yet; leave it out to start")
        return _going_on(found)
    if _descends(catalog, mirror, origin):
        found = newest_good(catalog, mirror)
        if found is not None:
            log.info("resume=%s: already done; going on from what came of it", place)
            return _going_on(found)
    with at_hand("resume", place, mirror.connect, catalog.directory) as path:
        source = checkpoint_at("resume", path).resolve()
        try:
            # What was downloaded is gone when this is left.
            manifest, state = (load_checkpoint if is_url(place) else open_checkpoint)(source)
        except (CorruptCheckpoint, OSError) as error:
            raise CheckpointError(f"resume={place}: {error}") from error
        step = manifest.global_step
        is_here = source.parent == own
        is_own = is_here or (mirror.url is not None and origin.startswith(f"{mirror.url}/"))
        above = step if is_own else -1
        forks = [*(manifest.forks if is_own else ()), new_fork(above)]
        return Found(source, manifest, state, origin, forks, above, foreign=not is_here)


def _origin(place: str) -> str:
    """What a `resume=PATH` is called in manifests. A relative one stays relative: so the same command finds that it has
    been done also where the project lies elsewhere."""
    if is_url(place):
        return place.rstrip("/")
    path = _folder_of(Path(place))
    return str(path.resolve()) if path.is_absolute() else os.path.normpath(path)


def _going_on(found: tuple[Path, Manifest, dict[str, Any]]) -> Found:
    manifest = found[1]
    return Found(*found, manifest.resumed_from, manifest.forks, manifest.global_step)


def _in_force(catalog: Catalog, mirror: Mirror) -> tuple[dict[int, Path], int | None]:
    """The checkpoints here that count, without those that have been abandoned in the bucket's history.

    If the newest ones here and there descend from different forks, training went back on purpose at one place while
    the other was out of reach (with storage=local, or on another machine). The later of the two is in force; what
    the other place has above the step that was gone back to is not. Only what was done on purpose counts: that a
    run was started anew where its checkpoints were out of sight abandons nothing.

    Returns:
        Them, and the step above which those here have to be retired before one is fetched; None if none do.
    """
    local = catalog.by_step()
    here = _newest_manifest(catalog) if mirror.steps else None
    there = mirror.newest_manifest() if here else None
    if here is None or there is None:
        return local, None
    is_here = here.created >= there.created
    in_force, other, where = (here, there, mirror.url) if is_here else (there, here, catalog.directory)
    if set(in_force.forks) <= set(other.forks):
        return local, None
    above = min(fork.above for fork in set(in_force.forks) ^ set(other.forks))  # up to there they are the same
    if max(mirror.steps if is_here else local) > above:
        how = f"gone back to step {above}" if above >= 0 else "begun anew"
        log.warning("training has %s on purpose: what %s had come to does not count any more", how, where)
    if is_here:
        mirror.forget(above)
        return local, None
    return {step: path for step, path in local.items() if step <= above}, above


def _descends(catalog: Catalog, mirror: Mirror, origin: str) -> bool:
    """Whether the newest checkpoint, here or in the mirror, goes back to this `resume=PATH`."""
    newest = [found for found in (_newest_manifest(catalog), mirror.newest_manifest()) if found is not None]
    return bool(newest) and max(newest, key=lambda manifest: manifest.created).resumed_from == origin


def _newest_manifest(catalog: Catalog) -> Manifest | None:
    try:
        return next((manifest for _, manifest in reversed(catalog.readable())), None)
    except OSError as error:
        raise _unreadable(catalog.directory, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({error.strerror or error}). Mend the disk and run the same command again; if "
        "it is beyond mending, rename the folder, and the checkpoint before it is used"
    )


def _set_aside(catalog: Catalog, damaged: Mapping[Path, str]) -> None:
    for path, reason in damaged.items():
        log.error("damaged checkpoint %s: %s; set aside as %s", path, reason, catalog.set_aside(path, CORRUPT).name)


def _folder_of(path: Path) -> Path:
    return path.parent if path.name in (STATE_NAME, MANIFEST_NAME) else path
