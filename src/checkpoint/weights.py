"""`init_from`: start a new run with weights from elsewhere, as far as they fit."""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from src.checkpoint.manifest import CorruptCheckpoint
from src.checkpoint.resume import checkpoint_at, load_checkpoint, load_file
from src.errors import ConfigError
from src.state import strip_prefixes

log = logging.getLogger(__name__)

_LISTED = 20  # lines about tensors that do not fit; a changed architecture may have thousands


def find_weights(path: Path, model: nn.Module, init_from: str) -> dict[str, Tensor]:
    """What fits into `model`, for it to load; lists what does not. The optimizer is left alone: it starts afresh.

    Args:
        path: A checkpoint's folder, a run's folder, or a `.pt` file that holds a state_dict, bare or
            under `model_state_dict`, `state_dict` or `model`.
        init_from: What the user calls it.

    Raises:
        ConfigError: there is no such file, it cannot be loaded safely, or nothing in it fits.
    """
    try:
        loaded = load_file(path) if path.is_file() else load_checkpoint(checkpoint_at("init_from", path))[1]
    except (CorruptCheckpoint, OSError) as error:
        raise ConfigError("init_from", init_from, str(error)) from error
    saved = strip_prefixes(_state_dict_in(loaded), model)
    own = model.state_dict()
    fits = {key: value for key, value in saved.items() if key in own and value.shape == own[key].shape}
    if not fits:
        raise ConfigError("init_from", init_from, "holds no tensor that fits the model; is it of the same kind?")

    log.info(
        "init_from=%s: loaded %d of the model's %d tensors; the optimizer starts afresh", init_from, len(fits), len(own)
    )
    remarks = [
        f"{key}, shape {tuple(own[key].shape)} here, "
        + (f"has shape {tuple(saved[key].shape)} in the file" if key in saved else "is not in the file")
        + ": it keeps its random start"
        for key in own
        if key not in fits
    ]
    remarks += [f"{key} in the file has no place in the model: left out" for key in saved if key not in own]
    for remark in remarks[:_LISTED]:
        log.warning("init_from: %s", remark)
    if len(remarks) > _LISTED:
        log.warning("init_from: … and %d more", len(remarks) - _LISTED)
    return fits


def _state_dict_in(loaded: Any) -> dict[str, Tensor]:
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    entries = loaded.items() if isinstance(loaded, dict) else ()
    return {key: value for key, value in entries if isinstance(key, str) and isinstance(value, Tensor)}
