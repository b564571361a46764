"""Are they numbers? Asked of the copies in host memory, in a thread beside training."""

import math
from collections.abc import Container
from typing import Any

import numpy as np
from torch import Tensor

_PIECE = 32_768  # elements: below this torch computes in the calling thread alone


def weights_are_finite(host_state: dict[str, Any], buffers: Container[str] = ()) -> bool:
    """Whether all of the model's parameters are. The loss tells of it only a step later.

    One pass: a sum is finite only if all of it is. (One too large for a float32 is no model either.)

    Args:
        buffers: Names that are not looked at: a mask, say, may hold infinities on purpose.
    """
    return all(
        _is_finite(value)
        for name, value in host_state["model_state_dict"].items()
        if name not in buffers and isinstance(value, Tensor) and value.is_floating_point()
    )


def _is_finite(tensor: Tensor) -> bool:
    # Not by torch, whose OpenMP would start a second set of threads for this one: with more of them than cores they
    # all stop spinning, for the rest of the process, and every training step takes twice as long.
    try:
        array = tensor.numpy()
    except TypeError:  # a type that numpy has not, such as bfloat16
        return all(math.isfinite(piece.float().sum()) for piece in tensor.reshape(-1).split(_PIECE))
    with np.errstate(all="ignore"):
        return math.isfinite(np.add.reduce(array, axis=None, dtype=np.float64 if array.itemsize < 4 else None))
