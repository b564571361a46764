"""The weights of a checkpoint alone, in a file for others to load."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from src.checkpoint.resume import checkpoint_at, load_checkpoint
from src.errors import ConfigError

_KINDS = (".pt", ".safetensors")


def export(source: Path, target: Path) -> int:
    """Write the model's state_dict of a checkpoint, or of a run's newest good one.

    Args:
        target: A new file; `.pt`, for `torch.load(weights_only=True)`, or `.safetensors`.

    Returns:
        The checkpoint's step.

    Raises:
        ConfigError: there is no such checkpoint, or no such kind of file.
        CorruptCheckpoint: it is damaged.
        OSError: the disk refused.
    """
    if target.suffix not in _KINDS:
        raise ConfigError("export", target, f"must end in {' or '.join(_KINDS)}")
    if target.exists():
        raise ConfigError("export", target, "exists already; nothing is overwritten")
    manifest, state = load_checkpoint(checkpoint_at("export", source))
    weights: dict[str, Tensor] = state["model_state_dict"]
    temporary = target.with_name(f".tmp_{target.name}")
    try:
        if target.suffix == ".safetensors":
            # It knows no tensors that share memory (tied weights): each gets its own copy.
            save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, temporary)
        else:
            torch.save(dict(weights), temporary)
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
    return manifest.global_step
