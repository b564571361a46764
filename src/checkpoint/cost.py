"""What a save costs training: the time it stands still, and how much slower its steps are meanwhile."""

from collections import deque
from statistics import median

_STEPS = 50  # undisturbed steps that the mean is taken over
_SAVES = 5  # saves that the median is taken over: one slow step must not space out all saves to come


class CostMeter:
    """Told of every step, it knows what a save costs. (CheckFreq, Mohan et al., FAST '21, measures the same two.)"""

    def __init__(self) -> None:
        self._undisturbed: deque[float] = deque(maxlen=_STEPS)
        self._disturbed: list[float] = []
        self._costs: deque[float] = deque(maxlen=_SAVES)
        self.cost: float | None = None
        """Seconds of training that a save takes; None before the first."""

    def step(self, seconds: float, saving: bool) -> None:
        """Note how long a step took, and whether a save was in flight."""
        (self._disturbed if saving else self._undisturbed).append(seconds)

    def saved(self, stall: float) -> None:
        """A save is durable; training stood still for `stall` seconds for it."""
        slowdown = 0.0
        if self._undisturbed:
            usual = sum(self._undisturbed) / len(self._undisturbed)
            slowdown = max(0.0, sum(self._disturbed) - len(self._disturbed) * usual)
        self._disturbed.clear()
        self._costs.append(stall + slowdown)
        self.cost = median(self._costs)
