"""Where a model is trained: on which device, and, by several processes, in step with which others."""

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src.distributed import World
from src.errors import ConfigError


def find_device(name: str) -> torch.device:
    """What `trainer.device` means here.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", str(name))
    if not match:
        raise ConfigError("trainer.device", name, "must be auto, cpu, cuda, or cuda:N")
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name != "cpu" and int(match[1] or 0) >= present:
        raise ConfigError("trainer.device", name, f"is not there ({present} GPUs found); use auto or cpu")
    return torch.device(name)


def device_of_rank(device: torch.device, world: World) -> torch.device:
    """Of the GPUs of this machine the one for this rank, from now on the current one; without GPUs the device itself.

    Raises:
        ConfigError: they are not as many as ranks, or only one is allowed.
    """
    if device.type != "cuda":
        return device
    if ":" in str(device):
        raise ConfigError("trainer.device", device, "is one GPU for all ranks; auto gives each its own")
    present = torch.cuda.device_count()
    if world.local_rank >= present:
        found = f"{present} GPUs found, for more processes than that"
        raise ConfigError("trainer.device", device, f"{found}; start one per GPU: --nproc-per-node=gpu")
    own = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(own)
    return own


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """A model of which each rank has all: each backward takes the mean of the gradients of all ranks."""
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # Else it sorts its buckets anew after its first step, which a resumed run takes at another time than one
        # that was not killed: with three ranks or more, sums in another order, and other last bits.
        find_unused_parameters=True,
    )


def no_sync_if(model: Any, more_to_come: bool) -> AbstractContextManager[None]:
    """Around a micro-batch: gradients go to the other ranks with the last one only."""
    in_step = isinstance(getattr(model, "_orig_mod", model), DistributedDataParallel)
    return model.no_sync() if more_to_come and in_step else nullcontext()
