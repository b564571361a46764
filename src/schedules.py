"""Learning rate schedules: pure functions of the step, as a factor of the optimizer's learning rate.

Closed forms rather than torch's chained schedulers, for two reasons: the state to resume is one
number, and a run that is continued with more epochs follows the longer schedule instead of carrying
the old length along in its state (OneCycleLR then raises, CosineAnnealingLR climbs again).

Every builder takes `(optimizer, total_steps)`; step what it returns once per optimizer step. `warmup` is a
share of `total_steps`.
"""

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from src.errors import require_int, require_number


class Schedule(LambdaLR):
    """torch's LambdaLR, for a closed form: after a resume, its rate is that of this schedule, not the saved one.

    The two are the same, bit for bit, unless the run was given more epochs.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the position and set the optimizer's rates by it; load the optimizer first."""
        super().load_state_dict(state_dict)
        factors = [factor(self.last_epoch) for factor in self.lr_lambdas]
        self._last_lr = [base * factor for base, factor in zip(self.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def constant(optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> Schedule:
    """The optimizer's learning rate throughout, after the warm-up."""
    return _with_warmup(optimizer, total_steps, warmup, lambda _: 1.0)


def cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.0, final: float = 0.0) -> Schedule:
    """Half a cosine from 1 down to `final` (Loshchilov & Hutter 2017, without restarts)."""
    require_number("scheduler.final", final, "share of the learning rate left at the end", at_least=0)
    return _with_warmup(optimizer, total_steps, warmup, lambda t: _half_cosine(1.0, final, t))


def one_cycle(
    optimizer: Optimizer, total_steps: int, peak: float = 0.3, initial: float = 0.04, final: float = 4e-6
) -> Schedule:
    """Half a cosine up from `initial` to 1 at the share `peak` of all steps, then one down to `final`.

    Smith & Topin 2018, with the shape and the defaults of torch's OneCycleLR, but without its cycling
    of the momentum.
    """
    require_number("scheduler.peak", peak, "share of the steps at which it peaks", above=0, below=1)
    require_number("scheduler.initial", initial, "share of the learning rate at the start", at_least=0)
    require_number("scheduler.final", final, "share of the learning rate left at the end", at_least=0)

    def factor(t: float) -> float:
        return _half_cosine(initial, 1.0, t / peak) if t < peak else _half_cosine(1.0, final, (t - peak) / (1 - peak))

    return _with_warmup(optimizer, total_steps, 0.0, factor)


def step(optimizer: Optimizer, total_steps: int, warmup: float = 0.0, drops: int = 3, gamma: float = 0.1) -> Schedule:
    """`drops` equal stages after the first, each `gamma` times the one before."""
    require_int("scheduler.drops", drops, 1, "times the learning rate drops")
    require_number("scheduler.gamma", gamma, "factor at each drop", above=0)
    return _with_warmup(optimizer, total_steps, warmup, lambda t: gamma ** min(int(t * (drops + 1)), drops))


def _half_cosine(start: float, end: float, t: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(t, 1.0))) / 2


def _with_warmup(optimizer: Optimizer, total_steps: int, warmup: float, factor: Callable[[float], float]) -> Schedule:
    """`factor` takes the share, 0 to 1, of the steps after the warm-up."""
    require_number("scheduler.warmup", warmup, "share of the steps spent warming up", at_least=0, below=1)
    warmup_steps = round(warmup * total_steps)

    def at(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return factor((step - warmup_steps) / max(1, total_steps - warmup_steps))

    return Schedule(optimizer, at)
