"""Device -> host: a copy of the state that training can no longer change."""

from collections import OrderedDict
from typing import Any

import torch


def snapshot(value: Any) -> Any:
    """Copy nested containers of tensors and plain values into host memory.

    Tensors that share storage (tied weights, views) share it in the copy too, so it is saved once.
    Everything that is not a tensor is taken as it is at this moment.
    """
    return _copy(value, {})


def _copy(value: Any, copied: dict[int, torch.UntypedStorage]) -> Any:
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage._cdata not in copied:
            copied[storage._cdata] = storage.clone() if storage.device.type == "cpu" else storage.cpu()
        host = torch.empty(0, dtype=value.dtype)
        return host.set_(copied[storage._cdata], value.storage_offset(), value.size(), value.stride())
    if isinstance(value, OrderedDict):
        items = OrderedDict((key, _copy(item, copied)) for key, item in value.items())
        # Where torch.nn.Module.state_dict() keeps the versions that its modules' loading goes by.
        if hasattr(value, "_metadata"):
            items._metadata = value._metadata.copy()  # type: ignore[attr-defined]
        return items
    if isinstance(value, dict):
        return {key: _copy(item, copied) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item, copied) for item in value)
    return value
