"""What ranks other than the first have for a checkpointer."""

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from src.background import yield_to_training
from src.checkpoint.checkpointer import Checkpointer
from src.checkpoint.finite import weights_are_finite
from src.checkpoint.policy import CheckpointPolicy
from src.checkpoint.saver import take_snapshot
from src.checkpoint.sharded import OtherRankFailed, Outline, ShardedWriter
from src.checkpoint.snapshot import Snapshot, Snapshotter
from src.distributed import World
from src.state import TrainState

log = logging.getLogger(__name__)


class Follower(Checkpointer):
    """Saves nothing and finds nothing: rank 0 does, and none of the others waits for its disk."""

    def __init__(self, policy: CheckpointPolicy, world: World) -> None:
        self.policy = policy
        self.saves = 0
        self.stall_total = 0.0
        self._world = world

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


class ShardFollower(Follower):
    """Saves its pieces when rank 0 says so, and finds nothing."""

    def __init__(self, policy: CheckpointPolicy, world: World, shards: ShardedWriter) -> None:
        super().__init__(policy, world)
        self._pieces = shards
        self._snapshotter: Snapshotter | None = None
        self._buffers: frozenset[str] = frozenset()
        self._snapshot: Snapshot | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint-writer", initializer=yield_to_training)
        self._written: Future[None] | None = None

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(wait=True)
        if self._snapshotter is not None:
            self._snapshotter.close()

    def restore(self, state: TrainState, resume: str, init_from: str | None) -> None:
        """Become what rank 0 has found, and take part in saving it, if it is another run's."""
        self._pieces.require_shared(None)
        super().restore(state, resume, init_from)
        self._save_while_told(state)

    def step(self, state: TrainState) -> None:
        """Save if rank 0 does."""
        if self._world.tell(False):
            self._save(state)

    def wait_for_snapshot(self) -> None:
        """Parameters may change after it."""
        if self._snapshot is not None:
            self._snapshot.wait()

    def wait(self) -> None:
        """Until nothing is in flight. What failed is rank 0's to report, and to try again."""
        if self._written is not None and (error := self._written.exception()) is not None:
            if not isinstance(error, OSError | MemoryError):
                raise error
            if not isinstance(error, OtherRankFailed):
                log.error("rank %d could not save its piece: %s", self._world.rank, error)
        self._written = None

    def finish(self, state: TrainState, patience: Callable[[], float] = lambda: math.inf) -> None:
        """Save the last state if rank 0 does, as often as it takes."""
        self._save_while_told(state)

    def _save_while_told(self, state: TrainState) -> None:
        while self._world.tell(False):
            self._save(state)
        self.wait()

    def _save(self, state: TrainState) -> None:
        self.wait()
        if self._snapshotter is None:
            self._snapshotter, self._buffers = Snapshotter(state.device), state.buffer_names()
        self._snapshot, outline = take_snapshot(self._snapshotter, state, in_pieces=True)
        self._written = self._thread.submit(self._write, self._snapshot, outline)

    def _write(self, snapshot: Snapshot, outline: Outline) -> None:
        host_state: Any = None

        def begin() -> Path | None:
            nonlocal host_state
            host_state = snapshot.complete()
            return None  # rank 0 has it

        folder = self._pieces.together(begin)[0]
        assert isinstance(folder, Path)
        self._pieces.write(folder, outline, host_state, lambda: weights_are_finite(host_state, self._buffers))


def follower(policy: CheckpointPolicy, world: World, shards: ShardedWriter | None) -> Follower:
    """What a rank other than the first needs.

    Args:
        shards: What the ranks write together, if each has a piece of the model.
    """
    return Follower(policy, world) if shards is None else ShardFollower(policy, world, shards)
