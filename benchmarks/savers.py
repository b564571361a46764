"""What every saver can do, ours and the peers': the few calls that the benchmarks time."""

import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from src.state import TrainState

TIMEOUT = 300.0
"""Seconds after which a save that still runs is taken to hang."""


class Saver(ABC):
    """Saves the state of one run into one folder. Whatever it imports beyond torch, it imports in `__init__`,
    so that a peer that is not there, or does not run, is a row that says so."""

    name: ClassVar[str]
    restore_name: ClassVar[str]
    """How the restoring half is called."""
    fsyncs: ClassVar[bool] = True
    """Whether `wait` returns only when the bytes are on the disk. Without fsync they are in the page cache, and
    a power cut loses them."""
    in_background: ClassVar[bool] = True
    """Whether training goes on while it writes."""
    rotates: ClassVar[bool] = False
    """Whether it deletes older checkpoints by itself, as part of a save."""

    def __init__(self, state: TrainState, directory: Path) -> None:
        self.state = state
        self.directory = directory

    @abstractmethod
    def save(self, step: int) -> None:
        """Save the state as it is now, after `step` optimizer steps. Returns when training may go on."""

    def before_update(self) -> None:
        """Called just before parameters change: returns when they may."""
        return

    def in_flight(self) -> bool:
        """Whether the last save is still being worked on."""
        return False

    def wait(self) -> None:
        """Return when the last save is as durable as it ever gets.

        Raises:
            Exception: it failed.
        """
        return

    def restore(self, step: int, target: TrainState) -> None:
        """Bring model, optimizer and counters of `target` to the saved ones."""
        raise NotImplementedError

    def discard(self, step: int) -> None:
        """Delete a checkpoint."""
        path = self.path(step)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """End threads and processes."""
        return

    def path(self, step: int) -> Path:
        """The file or folder of a checkpoint."""
        return self.directory / f"step_{step:08d}"


class NoSaver(Saver):
    """Trains without checkpoints: the reference, which takes its turn like everyone."""

    name = "no checkpoints"

    def save(self, step: int) -> None:
        """Do nothing."""


def contents(state: TrainState) -> dict[str, Any]:
    """What every peer saves: the tensors that ours saves, and the counters."""
    counters = {"epoch": state.epoch, "global_step": state.global_step, "samples": state.samples}
    return {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "counters": counters,
    }


def fill(target: TrainState, loaded: dict[str, Any]) -> None:
    """Load into `target` what `contents` gave."""
    target.model.load_state_dict(loaded["model"])
    target.optimizer.load_state_dict(loaded["optimizer"])
    target.scheduler.load_state_dict(loaded["scheduler"])
    for name, value in loaded["counters"].items():
        setattr(target, name, value)
