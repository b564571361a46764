"""What is trained while checkpoints are taken: real models, real optimizer steps, made-up data."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import ConstantLR

from src.models import resnet, vit
from src.state import TrainState

_CLASSES = 1000
_LAYERS, _SIZE = 24, 8  # of `perceptron`: its equal layers, and its images
_BYTES_PER_PARAMETER = 12  # float32: the weight and AdamW's two moments


def perceptron(width: int) -> nn.Module:
    """Equal linear layers: a state of any size whose number of tensors does not grow with it."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(3 * _SIZE**2, width)]
    for _ in range(_LAYERS):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, _CLASSES))


@dataclass(frozen=True)
class Workload:
    """A model and the batches it is trained on. Can be sent to another process."""

    name: str
    model: Callable[[], nn.Module]
    batch_size: int
    image_size: int


# Images are tiny: the state, not the arithmetic, is what a checkpoint costs time for.
SMALL = Workload("ResNet-18", partial(resnet, _CLASSES, 3, 32, depth=18, small_stem=False), 4, 32)
LARGE = Workload("ViT-B, 14 layers", partial(vit, _CLASSES, 3, 32, layers=14), 2, 32)
SHORT_STEP = Workload("small ViT", partial(vit, _CLASSES, 3, 32, patch_size=8, layers=2, heads=2, width=128), 2, 32)
RESNET50 = Workload("ResNet-50", partial(resnet, _CLASSES, 3, 224, depth=50, small_stem=False), 32, 224)
VIT_B_16 = Workload("ViT-B/16", partial(vit, _CLASSES, 3, 224), 32, 224)


def sized(megabytes: float) -> Workload:
    """A perceptron whose state is about `megabytes` (10⁶ bytes) large."""
    parameters = megabytes * 1e6 / _BYTES_PER_PARAMETER
    ends = 3 * _SIZE**2 + _CLASSES  # the first and the last layer have this many weights per unit of width
    width = round((math.sqrt(ends**2 + 4 * _LAYERS * parameters) - ends) / (2 * _LAYERS))
    return Workload("perceptron", partial(perceptron, width), 4, _SIZE)


class Task:
    """A workload in training: the state that checkpoints hold, and the step that changes it."""

    def __init__(self, workload: Workload, device: str) -> None:
        torch.manual_seed(0)
        model = workload.model().to(device)
        optimizer = AdamW(model.parameters(), lr=1e-4, fused=True)
        scheduler = ConstantLR(optimizer, factor=1.0)
        self.workload = workload
        self.device = device
        self.state = TrainState(model, optimizer, scheduler, GradScaler(device, enabled=False))
        self.state.loss, self.state.totals = self.state.loss.to(device), self.state.totals.to(device)
        size = workload.image_size
        self._images = torch.randn(workload.batch_size, 3, size, size, device=device)
        self._labels = torch.randint(_CLASSES, (workload.batch_size,), device=device)
        for _ in range(3):  # the optimizer makes its state in the first, kernels are chosen in the first few
            self.step()

    def step(self, before_update: Callable[[], None] = lambda: None) -> float:
        """Train one step.

        Args:
            before_update: Called when the gradients are there and the parameters are about to change.

        Returns:
            Seconds for which `before_update` held up this thread.
        """
        state = self.state
        state.optimizer.zero_grad()
        loss = cross_entropy(state.model(self._images), self._labels)
        loss.backward()
        state.loss.copy_(loss.detach())
        start = time.perf_counter()
        before_update()
        waited = time.perf_counter() - start
        state.optimizer.step()
        state.scheduler.step()
        state.advance(len(self._images))
        return waited

    @property
    def state_bytes(self) -> int:
        """Bytes of all tensors of model and optimizer."""
        return sum(tensor.nbytes for tensor in state_tensors(self.state))

    @property
    def label(self) -> str:
        """The model's name and the size of its state."""
        return f"{self.workload.name}, {readable(self.state_bytes)}"


def state_tensors(state: TrainState) -> Iterator[Tensor]:
    """All tensors of model and optimizer, in an order that depends on the model only."""
    return _tensors([state.model.state_dict(), state.optimizer.state_dict()])


def readable(size: float) -> str:
    """A number of bytes, to three digits at most."""
    return f"{size / 1e9:.2g} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
