"""What ranks other than the first have for a checkpointer."""

import math
from collections.abc import Callable

from src.checkpoint.checkpointer import Checkpointer
from src.checkpoint.policy import CheckpointPolicy
from src.distributed import World
from src.state import TrainState


class Follower(Checkpointer):
    """Saves nothing and finds nothing: rank 0 does, and none of the others waits for its disk."""

    def __init__(self, policy: CheckpointPolicy, world: World) -> None:
        self.policy = policy
        self._world = world
        self.saves = 0
        self.stall_total = 0.0

    def __exit__(self, *exception: object) -> None:
        pass

    def restore(self, state: TrainState, resume: str, init_from: str | None) -> None:
        """Become what rank 0 has found."""
        self._load(state, None)

    def step(self, state: TrainState) -> None:
        """Nothing."""

    def wait_for_snapshot(self) -> None:
        """Nothing."""

    def wait(self) -> None:
        """Nothing."""

    def finish(self, state: TrainState, patience: Callable[[], float] = lambda: math.inf) -> None:
        """Nothing."""

    def lag(self, state: TrainState) -> dict[str, float]:
        """Nothing that is known here."""
        return {}

    def newest_finite(self) -> None:
        """None that is known here."""
