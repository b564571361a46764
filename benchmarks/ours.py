"""Ours: the checkpointer that train.py uses, behind the benchmarks' interface."""

import shutil
from contextlib import ExitStack
from pathlib import Path

from benchmarks.savers import Saver
from src.checkpoint.catalog import Catalog, checkpoint_name
from src.checkpoint.checkpointer import Checkpointer
from src.checkpoint.policy import EverySteps
from src.state import TrainState


class Holdfast(Saver):
    """A snapshot into memory that is used again; a thread writes, sums, fsyncs, commits and rotates."""

    name = "Holdfast"
    restore_name = "Holdfast, checksum verified"
    rotates = True

    def __init__(self, state: TrainState, directory: Path) -> None:
        super().__init__(state, directory)
        self._open = ExitStack()
        self._checkpointer = self._open.enter_context(_checkpointer(directory))
        self._step = 0

    def save(self, step: int) -> None:
        """Save in the background."""
        self._step = step
        self._checkpointer.step(self.state)

    def before_update(self) -> None:
        """Wait until the snapshot is taken."""
        self._checkpointer.wait_for_snapshot()

    def in_flight(self) -> bool:
        """A checkpoint is there if and only if it is complete."""
        return not self.path(self._step).is_dir()

    def wait(self) -> None:
        """Wait until it is committed, and older ones are rotated away."""
        self._checkpointer.wait()

    def restore(self, step: int, target: TrainState) -> None:
        """Find the newest checkpoint, verify it byte for byte, load it: what resuming does."""
        with _checkpointer(self.directory) as checkpointer:
            checkpointer.restore(target, "auto", None)

    def path(self, step: int) -> Path:
        """The folder that a commit renames into place."""
        return self.directory / checkpoint_name(step)

    def discard(self, step: int) -> None:
        """Delete a checkpoint, if rotation has not done so."""
        shutil.rmtree(self.path(step), ignore_errors=True)

    def close(self) -> None:
        """Wait for what is in flight, and end the thread."""
        self._open.close()


def _checkpointer(directory: Path) -> Checkpointer:
    policy = EverySteps(every=1, keep=1, keep_best=0)  # the benchmarks call it only when a save is due
    return Checkpointer(policy, Catalog(directory), config={}, environment={}, before_commit=lambda: None)
