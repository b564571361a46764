"""WHEN to save and WHAT to keep. Pure decisions: no I/O, no torch, no clock of their own.

The two questions are separate methods on one small object, which Hydra builds from the
``checkpoint`` config group. (Orbax separates "when to save" from "what to preserve" in the same
way: ``save_decision_policy`` and ``preservation_policy``.)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from src.errors import require_choice, require_int, require_number


@dataclass(frozen=True)
class Progress:
    """What a policy may know of the run when it decides whether to save."""

    global_step: int
    """Optimizer steps taken."""
    epoch: int
    """Epochs completed."""
    seconds: float
    """A monotonic clock; only differences mean anything."""
    epoch_end: bool = False
    """This step completed an epoch, and the epoch has been evaluated."""
    is_best: bool = False
    """That evaluation is the best so far, by the monitored metric."""
    saving: bool = False
    """The save before is still being written."""
    save_cost: float | None = None
    """Seconds of training that a save takes here, as measured; None before the first."""


@dataclass(frozen=True)
class Saved:
    """What a policy may know of a committed checkpoint when it decides what to keep."""

    global_step: int
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    finite: bool = True
    """Loss and weights are numbers."""


def direction_of(monitor: str, mode: str) -> str:
    """Whether the best of a metric is its `max` or its `min`."""
    if mode == "auto":
        return "min" if monitor.endswith("loss") else "max"
    return mode


@dataclass(frozen=True, kw_only=True)
class CheckpointPolicy(ABC):
    """Keeps the newest `keep` checkpoints, the `keep_best` best, and one per `keep_every` steps."""

    keep: int = 3
    """The number of newest checkpoints that are kept."""
    keep_best: int = 1
    """The number of best checkpoints kept beside them; 0 for none. A new best is always saved."""
    monitor: str = "val/accuracy"
    """The metric that ranks checkpoints."""
    mode: str = "auto"
    """Whether the best `monitor` is its `max` or its `min`; `auto`: the min of a loss, the max of all else."""
    keep_every: int | None = None
    """Keep for ever the first checkpoint of each stretch of this many steps, but for the stretch that begins at 0."""
    max_failures: int = 3
    """Stop training when this many saves in a row have failed."""
    retry_after: float = 30.0
    """Seconds until a failed save is tried again."""

    def __post_init__(self) -> None:
        require_int("checkpoint.keep", self.keep, 1, "newest checkpoints to keep")
        require_int("checkpoint.keep_best", self.keep_best, 0, "best checkpoints to keep; 0 for none")
        require_choice("checkpoint.mode", self.mode, ("auto", "max", "min"))
        if self.keep_every is not None:
            require_int("checkpoint.keep_every", self.keep_every, 1, "steps; or null")
        require_int("checkpoint.max_failures", self.max_failures, 1, "failed saves in a row")
        require_number("checkpoint.retry_after", self.retry_after, "seconds until a failed save is retried", at_least=0)

    @abstractmethod
    def due(self, now: Progress, last: Progress) -> bool:
        """Whether the interval has passed. `last` is the last save, or where this process began."""

    def should_save(self, now: Progress, last: Progress) -> bool:
        """WHEN: the interval has passed, or this is the best model so far and the best is kept."""
        if (now.global_step, now.epoch_end) == (last.global_step, last.epoch_end):
            return False
        return self.due(now, last) or (self.keep_best > 0 and now.is_best)

    def best_of(
        self, best: Mapping[str, Any] | None, metrics: Mapping[str, float], global_step: int
    ) -> dict[str, Any] | None:
        """The best evaluation after a new one: `best` so far, or the new one if it beats it. NaN never does.

        Returns:
            `metric`, `mode`, `value`, `global_step`; None if there is no number yet.
        """
        value = metrics[self.monitor]
        # A best by another metric or mode (the setting was changed) says nothing about this one.
        same = best and (best["metric"], best["mode"]) == (self.monitor, self.direction)
        reigning = dict(best) if best and same else None
        if math.isnan(value):
            return reigning
        if reigning is None or (value - reigning["value"]) * self._sign > 0:
            return {"metric": self.monitor, "mode": self.direction, "value": value, "global_step": global_step}
        return reigning

    def to_keep(self, saved: Sequence[Saved]) -> set[int]:
        """WHAT: the global steps, out of `saved` (in any order), that rotation must leave alone."""
        steps = sorted(s.global_step for s in saved)
        keep = set(steps[-self.keep :])
        # However long a run goes on after it has diverged: the way back stays open.
        keep.update(sorted(s.global_step for s in saved if s.finite)[-1:])

        scored = [(value, s.global_step) for s in saved if (value := s.metrics.get(self.monitor)) is not None]
        # On a tie the older one stays: rotating it away would gain nothing.
        scored.sort(key=lambda entry: (-self._sign * entry[0], entry[1]))
        keep.update(step for _, step in scored[: self.keep_best])

        if self.keep_every is not None:
            stretches_kept = {0}
            for step in steps:
                if step // self.keep_every not in stretches_kept:
                    stretches_kept.add(step // self.keep_every)
                    keep.add(step)
        return keep

    @property
    def copies(self) -> int:
        """Checkpoints on the disk at once, the one being written included; without those that `keep_every` keeps, and
        the last good one of a run that goes on after it has diverged."""
        return self.keep + self.keep_best + 1

    @property
    def direction(self) -> str:
        """`max` or `min`: what `mode` comes to."""
        return direction_of(self.monitor, self.mode)

    @property
    def _sign(self) -> int:
        return 1 if self.direction == "max" else -1


@dataclass(frozen=True, kw_only=True)
class EverySteps(CheckpointPolicy):
    """Save every `every` optimizer steps."""

    every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("checkpoint.every", self.every, 1, "optimizer steps between checkpoints")

    def due(self, now: Progress, last: Progress) -> bool:
        """Every `every`-th step, counted from the start of the run, wherever this process began."""
        return now.global_step % self.every == 0


@dataclass(frozen=True, kw_only=True)
class EveryMinutes(CheckpointPolicy):
    """Save when `every` minutes have passed since the last save (or since this process began)."""

    every: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("checkpoint.every", self.every, "minutes between checkpoints", above=0)

    def due(self, now: Progress, last: Progress) -> bool:
        """`every` minutes have passed since the last save."""
        return now.seconds - last.seconds >= 60 * self.every


@dataclass(frozen=True, kw_only=True)
class EveryEpochs(CheckpointPolicy):
    """Save at the end of every `every`-th epoch, after its evaluation."""

    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("checkpoint.every", self.every, 1, "epochs between checkpoints")

    def due(self, now: Progress, last: Progress) -> bool:
        """The step completed an epoch, and its number is a multiple of `every`."""
        return now.epoch_end and now.epoch % self.every == 0


@dataclass(frozen=True, kw_only=True)
class Budget(CheckpointPolicy):
    """Save as often as `overhead` allows: nobody has to know what a save costs on this machine.

    Measures the cost of a save, and spaces saves so that they take that share of the time, as CheckFreq does
    (Mohan et al., FAST '21). (Young 1974 and Daly 2006 derive the interval from the mean time between failures
    instead, which on spot instances is anyone's guess.)
    """

    overhead: float = 0.01
    max_minutes: float = 30.0

    WARM_UP = 10
    """Steps before the first save, which is for measuring: the very first are slower than the rest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("checkpoint.overhead", self.overhead, "share of the time spent on saves", above=0, below=1)
        require_number("checkpoint.max_minutes", self.max_minutes, "most minutes between checkpoints", above=0)

    def due(self, now: Progress, last: Progress) -> bool:
        """The last save has been paid for, or is `max_minutes` ago. Never while one is being written."""
        passed = now.seconds - last.seconds
        if now.saving:
            return False
        if passed >= 60 * self.max_minutes:
            return True
        if now.save_cost is None:
            return now.global_step - last.global_step >= self.WARM_UP
        return passed >= now.save_cost / self.overhead
