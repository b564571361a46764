"""A model that no rank has all of: each has a piece of every parameter (FSDP2)."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, device_type: str, ranks: int) -> None:
    """Leave of each parameter only this rank's piece. Those of one block are brought together when it is computed:
    of each member of an `nn.Sequential` or `nn.ModuleList` (a ViT's layers, a ResNet's), then of what is left."""
    mesh = init_device_mesh(device_type, (ranks,))
    for module in reversed(list(model.modules())):  # inner ones first
        if isinstance(module, nn.Sequential | nn.ModuleList):
            for block in module.children():
                if any(True for _ in block.parameters()) and not isinstance(block, nn.ModuleList):
                    fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank has a piece; called by all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece_of(tensor: Tensor, like: Tensor | None) -> Tensor:
    """This rank's piece of a whole tensor, if `like` is in pieces; nothing is sent."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    cut = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return DTensor.from_local(
        cut.to_local().clone(memory_format=torch.contiguous_format),  # not a view that keeps all of it
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
