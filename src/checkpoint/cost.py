"""What a save costs training: the time it stands still, and how much slower its steps are meanwhile."""

from collections import deque
from statistics import median

_STEPS = 50  # undisturbed steps that the mean is taken over
_SAVES = 5  # saves that the median is taken over: one slow step must not space out all saves to come
_START_UP = 3  # steps that pay for what is only done once


class CostMeter:
    """Told of every step, it knows what a save costs. (CheckFreq, Mohan et al., FAST '21, measures the same two.)"""

    def __init__(self) -> None:
        self._undisturbed: deque[float] = deque(maxlen=_STEPS)
        self._seen = 0
        self._disturbed = 0.0
        self._disturbed_steps = 0
        self._costs: deque[float] = deque(maxlen=_SAVES)
        self.cost: float | None = None
        """Seconds of training that a save takes; None before the first."""

    def step(self, seconds: float, saving: bool) -> None:
        """Note how long a step took, and whether a save was in flight."""
        self._seen += 1
        if saving:
            self._disturbed += seconds
            self._disturbed_steps += 1
        elif self._seen > _START_UP:
            self._undisturbed.append(seconds)

    def saved(self, stall: float) -> None:
        """A save is durable; training stood still for `stall` seconds for it."""
        slowdown = 0.0
        if self._undisturbed:
            usual = sum(self._undisturbed) / len(self._undisturbed)
            slowdown = max(0.0, self._disturbed - self._disturbed_steps * usual)
        self.failed()
        self._costs.append(stall + slowdown)
        self.cost = median(self._costs)

    def failed(self) -> None:
        """The save in flight came to nothing: what it cost says nothing of the others."""
        self._disturbed, self._disturbed_steps = 0.0, 0
