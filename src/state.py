"""The whole state of a training run: what a checkpoint holds, and what exact resume needs."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.checkpoint.snapshot import OnTensor, TensorPath
from src.errors import CheckpointError
from src.rng import rng_state, set_rng_state
from src.sharding import local, piece_of


@dataclass
class TrainState:
    """What changes during training. Everything else is config or code.

    `model` is the bare module: never DDP's or torch.compile's wrapper, so keys carry no prefix.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: GradScaler
    epoch: int = 0
    """Epochs completed; also the index of the one in progress."""
    global_step: int = 0
    """Optimizer steps taken, those included that a GradScaler skipped because the gradient overflowed."""
    samples: int = 0
    """Samples of the epoch in progress that were trained on. Samples, not batches: they mean the same
    whatever the batch size and the number of ranks."""
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Training loss of the last step, on the device."""
    totals: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    """Sums over the epoch in progress, on the device: loss x samples, correct predictions."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest evaluation."""
    best: dict[str, Any] | None = None
    """The best evaluation so far: `metric`, `mode`, `value`, `global_step`."""

    @property
    def evaluated(self) -> bool:
        """Whether `metrics` are of exactly these weights: an epoch has just ended."""
        return self.samples == 0 and self.epoch > 0

    @property
    def device(self) -> torch.device:
        """Where training happens."""
        return self.loss.device

    def best_so_far(self, monitor: str) -> dict[str, Any]:
        """The best evaluation; NaN at step 0 if there has been none that was a number."""
        return self.best or {"metric": monitor, "value": math.nan, "global_step": 0}

    def updated_tensors(self) -> Iterator[Tensor]:
        """The tensors that change in `optimizer.step()` and at no other time: parameters and the optimizer's state.

        A snapshot may still read them during the next forward and backward. Whatever else the state holds
        may change there, so when in doubt leave a tensor out.
        """
        buffers = {buffer.untyped_storage()._cdata for buffer in self.model.buffers()}
        moments = (value for values in self.optimizer.state.values() for value in values.values())
        for tensor in (*self.model.parameters(), *moments):
            if isinstance(tensor, Tensor) and (here := local(tensor)).untyped_storage()._cdata not in buffers:
                yield here

    def buffer_names(self) -> frozenset[str]:
        """Those of the model's tensors that are no parameters."""
        return frozenset(name for name, _ in self.model.named_buffers(remove_duplicate=False))

    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint will be. Optimizers make their state in the first step: until
        then it is taken to be two numbers per parameter, as Adam's is."""
        tensors = (value for value in self.model.state_dict().values() if isinstance(value, Tensor))
        weights: int = sum(tensor.nbytes for tensor in tensors)
        moments = sum(2 * parameter.nbytes for parameter in self.model.parameters() if parameter.requires_grad)
        return weights + moments

    def undo_point(self) -> Callable[[], None]:
        """Call what this returns to take back a forward and backward: buffers and random generators are then as now.
        (Gradients are no part of the state.)"""
        changed = list(self.model.buffers())
        as_now = [tensor.clone() for tensor in changed]
        generators = rng_state()

        def undo() -> None:
            for tensor, saved in zip(changed, as_now, strict=True):
                tensor.copy_(saved)
            set_rng_state(generators)

        return undo

    def advance(self, samples: int) -> None:
        """Count one optimizer step on `samples` samples."""
        self.global_step += 1
        self.samples += samples

    def end_epoch(self, metrics: dict[str, float], best: dict[str, Any] | None) -> None:
        """Close the epoch in progress with its evaluation, and the best one so far."""
        self.epoch += 1
        self.samples = 0
        self.totals.zero_()
        self.metrics = metrics
        self.best = best

    def state_dict(self) -> dict[str, Any]:
        """Everything, under the keys of `state.pt`. Tensors are the live ones, parameters among them, not copies."""
        return {
            "model_state_dict": self.model.state_dict(keep_vars=True),  # detaching hundreds costs a third of a ms
            "optimizer_state_dict": self.optimizer.state_dict(),
            "lr_scheduler_state_dict": self.scheduler.state_dict(),
            "scaler_state_dict": self._scaler_state_dict(),
            "epoch": self.epoch,
            "global_step": self.global_step,
            "samples": self.samples,
            "loss": self.loss,
            "totals": self.totals,
            "metrics": dict(self.metrics),
            "best": dict(self.best) if self.best else None,
            "rng_state": rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the state that was saved. Tensors are copied, to the devices that model and optimizer are on.

        Raises:
            CheckpointError: the state is of another model or optimizer; this one is then half-loaded.
        """
        try:
            self.model.load_state_dict(strip_prefixes(state["model_state_dict"], self.model))
            self._load_optimizer(state["optimizer_state_dict"])
            self.scheduler.load_state_dict(state["lr_scheduler_state_dict"])
            if state["scaler_state_dict"] and self.scaler.is_enabled():
                numbers = {k: v.item() if isinstance(v, Tensor) else v for k, v in state["scaler_state_dict"].items()}
                self.scaler.load_state_dict(numbers)
            self.epoch = state["epoch"]
            self.global_step = state["global_step"]
            self.samples = state["samples"]
            self.loss.copy_(state["loss"])
            self.totals.copy_(state["totals"])
            self.metrics = dict(state["metrics"])
            self.best = state["best"]
            set_rng_state(state["rng_state"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]  # torch lists every single tensor
            raise CheckpointError(
                f"the checkpoint does not fit this code's model and optimizer ({reason}); "
                "go back to the code that wrote it, or start a new run from its weights: run=NAME init_from=PATH"
            ) from error

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over those of the model's tensors that are given. Everything else is left alone."""
        self.model.load_state_dict(weights, strict=False)

    def own_part(self) -> OnTensor:
        """What this rank keeps of a whole tensor at a place in a state: a piece of those that it has in pieces."""
        in_pieces: dict[TensorPath, Tensor] = {
            ("model_state_dict", key): parameter
            for key, parameter in self.model.named_parameters(remove_duplicate=False)
        }
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

        def part(path: TensorPath, tensor: Tensor) -> Tensor:
            like = in_pieces.get(path)
            if path[:2] == ("optimizer_state_dict", "state") and int(path[2]) < len(parameters):
                like = parameters[int(path[2])]
            return piece_of(tensor, like)

        return part

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(saved)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        names = [name for group in saved["param_groups"] for name in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            moments = self.optimizer.state.get(parameter, {})
            for key, value in saved["state"].get(name, {}).items():
                own = moments.get(key)
                # torch rounds them to the parameter's type, and on a CPU takes the others as they are instead of
                # copying them.
                if isinstance(value, Tensor) and isinstance(own, Tensor) and (own.is_cpu or own.dtype != value.dtype):
                    moments[key] = value.to(own.device, copy=True)

    def _scaler_state_dict(self) -> dict[str, Any]:
        """As `GradScaler.state_dict()`, which would wait for the device: what lives there is a tensor here."""
        if not self.scaler.is_enabled():
            return {}
        return {
            "scale": self.scaler.scale(torch.ones((), device=self.device)),
            "growth_factor": self.scaler.get_growth_factor(),
            "backoff_factor": self.scaler.get_backoff_factor(),
            "growth_interval": self.scaler.get_growth_interval(),
            "_growth_tracker": self.scaler._growth_tracker,
        }


def strip_prefixes(saved: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Undo the key prefixes of wrappers: DDP's `module.` (leading), torch.compile's `_orig_mod.` (anywhere).

    Keys that `model` has itself are left alone. If all are, so is `saved`, with the `_metadata` by
    which modules load older versions.
    """
    own = model.state_dict().keys()

    def strip(key: str) -> str:
        if key in own:
            return key
        bare = key.replace("_orig_mod.", "")
        while bare not in own and bare.startswith("module."):
            bare = bare.removeprefix("module.")
        return bare

    if all(key in own for key in saved):
        return saved
    return OrderedDict((strip(key), value) for key, value in saved.items())
