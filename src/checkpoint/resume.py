"""Disk -> state: find the newest good checkpoint, check that it belongs to this run, and load it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.checkpoint.catalog import Catalog, step_of, verify
from src.checkpoint.manifest import MANIFEST_NAME, STATE_NAME, CorruptCheckpoint, Manifest
from src.errors import CheckpointError, ConfigError
from src.run import config_drift
from src.state import strip_prefixes

log = logging.getLogger(__name__)

_CORRUPT, _RETIRED = "corrupt", "retired"


def load_file(path: Path) -> Any:
    """Read a `.pt` file into host memory, whatever device it was saved from, without executing anything in it.

    Raises:
        CorruptCheckpoint: it is missing, damaged, or holds anything but tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # what torch.load raises on a damaged file is not specified
        reason = str(error).strip().split("\n")[0]
        raise CorruptCheckpoint(f"{path.name} cannot be loaded ({type(error).__name__}: {reason})") from error


def load_checkpoint(path: Path) -> tuple[Manifest, dict[str, Any]]:
    """Verify a checkpoint byte for byte, then load it.

    Raises:
        CorruptCheckpoint: it is not what was saved.
    """
    manifest = verify(path)
    state = load_file(path / STATE_NAME)
    if not isinstance(state, dict) or state.get("global_step") != manifest.global_step:
        raise CorruptCheckpoint(f"{STATE_NAME} is not the state of step {manifest.global_step}")
    return manifest, state


def newest_good(catalog: Catalog) -> tuple[Path, Manifest, dict[str, Any]] | None:
    """The newest checkpoint that verifies and loads; None if there never was one.

    Damaged ones above it are set aside (renamed, kept) and reported.

    Raises:
        CheckpointError: there are checkpoints, but none can be read. Training must not start over by itself.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(catalog.paths()):
        try:
            manifest, state = load_checkpoint(path)
        except CorruptCheckpoint as error:
            damaged.append((path, str(error)))
            continue
        for bad, reason in damaged:
            log.error("damaged checkpoint %s: %s; set aside as %s", bad, reason, catalog.set_aside(bad, _CORRUPT).name)
        return path, manifest, state
    damaged += [(path, "set aside earlier") for path in catalog.were_set_aside(_CORRUPT)]
    if damaged:
        found = "; ".join(f"{path.name}: {reason}" for path, reason in damaged)
        raise CheckpointError(
            f"{catalog.directory} holds checkpoints, but none can be read ({found}). Training does not start over by "
            "itself: put a good one back, or start over with resume=never (what is there is renamed and kept)"
        )
    return None


def find_to_resume(catalog: Catalog, resume: str) -> tuple[Path, Manifest, dict[str, Any], str | None] | None:
    """Carry out `resume=auto|required|never|PATH`.

    With PATH, a checkpoint's or a run's folder, training goes on from there on purpose: what this run
    had above it is retired. The same command run again after a kill does not go back a second time,
    but on from the newest checkpoint that descends from PATH (its manifest says so).

    Returns:
        The checkpoint's folder, manifest and state, and the PATH it descends from, if any; or None to start afresh.

    Raises:
        CheckpointError: nothing to resume where there has to be, or nothing readable.
        ConfigError: PATH is no checkpoint.
    """
    if resume == "never":
        for path in [*catalog.paths(), *catalog.were_set_aside(_CORRUPT)]:
            log.warning("resume=never: kept %s as %s", path, catalog.set_aside(path, _RETIRED).name)
        return None
    if resume not in ("auto", "required"):
        return _find_path(catalog, Path(resume))
    found = newest_good(catalog)
    if found is None and resume == "required":
        raise CheckpointError(f"resume=required, but {catalog.directory} has no checkpoint; resume=auto starts afresh")
    return (*found, found[1].resumed_from) if found else None


def check_compatible(manifest: Manifest, config: Mapping[str, Any], environment: Mapping[str, str]) -> None:
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
    if changed:
        log.warning("the machine differs from the checkpoint's (%s): exact to the last bit no more", ", ".join(changed))


def load_weights(path: Path, model: nn.Module) -> None:
    """Start from other weights (`init_from`): load what fits into `model`, and list what does not.

    Args:
        path: A checkpoint's folder, a run's folder, or a `.pt` file that holds a state_dict, bare or
            under `model_state_dict`, `state_dict` or `model`.

    Raises:
        ConfigError: there is no such file, it cannot be loaded safely, or nothing in it fits.
    """
    try:
        loaded = load_file(path) if path.is_file() else load_checkpoint(_checkpoint_at("init_from", path))[1]
    except CorruptCheckpoint as error:
        raise ConfigError("init_from", path, str(error)) from error
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    saved = strip_prefixes(loaded, model) if isinstance(loaded, dict) else {}
    own = model.state_dict()
    fits = {
        key: value
        for key, value in saved.items()
        if key in own and isinstance(value, Tensor) and value.shape == own[key].shape
    }
    if not fits:
        raise ConfigError("init_from", path, "holds no tensor that fits the model; is it of the same kind?")
    model.load_state_dict(fits, strict=False)
    log.info(
        "init_from=%s: loaded %d of the model's %d tensors; the optimizer starts afresh", path, len(fits), len(own)
    )
    for key in own.keys() - fits.keys():
        reason = f"has shape {_shape(saved[key])} in the file" if key in saved else "is not in the file"
        log.warning("init_from: %s, shape %s here, %s: it keeps its random start", key, _shape(own[key]), reason)
    for key in saved.keys() - own.keys():
        log.warning("init_from: %s in the file has no place in the model: left out", key)


def _find_path(catalog: Catalog, path: Path) -> tuple[Path, Manifest, dict[str, Any], str | None]:
    origin = str(path.resolve())
    own = newest_good(catalog)
    if own is not None and own[1].resumed_from == origin:
        return (*own, origin)
    source = _checkpoint_at("resume", path).resolve()
    try:
        manifest, state = load_checkpoint(source)
    except CorruptCheckpoint as error:
        raise CheckpointError(f"resume={path}: {error}") from error
    is_own = source.parent == catalog.directory.resolve()
    catalog.retire_above(manifest.global_step if is_own else -1)
    return source, manifest, state, origin


def _checkpoint_at(key: str, path: Path) -> Path:
    """The checkpoint that a path given by hand means: itself, or the newest good one of a run."""
    if path.name in (STATE_NAME, MANIFEST_NAME):
        path = path.parent
    if step_of(path) is not None and path.is_dir():
        return path
    for folder in (path / "checkpoints", path):
        # Read only: another run's damaged checkpoints are not ours to rename.
        for candidate in reversed(Catalog(folder).paths()):
            try:
                verify(candidate)
            except CorruptCheckpoint as error:
                log.warning("skipped damaged checkpoint %s: %s", candidate, error)
                continue
            return candidate
    raise ConfigError(key, path, "is no checkpoint; name a folder step_…, or a run directory that has some")


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
