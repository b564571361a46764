"""All savers side by side in one process, taking turns."""

import os
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from benchmarks.savers import Saver
from benchmarks.workloads import Task

T = TypeVar("T")


class Field:
    """The savers that run, and why the others do not.

    They take turns, round after round in a new order, so that whatever else changes on the machine changes for all
    alike. Each saves once before anything counts: buffers are made, processes started, code is warm.
    """

    def __init__(self, savers: Sequence[type[Saver]], task: Task, directory: Path) -> None:
        self.task = task
        self.failures: dict[str, str] = {}
        """Why a saver does not run, by name."""
        self._savers: list[Saver] = []
        for number, kind in enumerate(savers):
            folder = directory / f"saver_{number}"
            folder.mkdir()
            try:
                saver = kind(task.state, folder)
                _save_once(saver, task)
            except Exception as error:
                self.failures[kind.name] = explain(error)
            else:
                self._savers.append(saver)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for saver in self._savers:
            try:
                saver.close()
            except Exception as error:
                self.failures.setdefault(saver.name, explain(error))
        self._savers.clear()  # and their buffers with them

    def take_turns(
        self, measure: Callable[[Saver], T], rounds: int, enough: Callable[[list[T]], bool] = lambda samples: False
    ) -> dict[str, list[T]]:
        """Measure every saver once a round.

        Args:
            measure: What to do with a saver. It leaves nothing in flight and nothing on the disk.
            rounds: At most.
            enough: Whether a saver can sit out from now on, by its samples so far.

        Returns:
            The samples by the saver's name. One that fails half-way has none, and is among `failures`.
        """
        samples: dict[str, list[T]] = defaultdict(list)
        order = random.Random(0)  # another order each round: nobody always comes after the same one
        for _ in range(rounds):
            for saver in order.sample(self._savers, len(self._savers)):
                if enough(samples[saver.name]):
                    continue
                # Nobody pays for the pages that another has left to be written.
                os.sync()
                try:
                    samples[saver.name].append(measure(saver))
                except Exception as error:
                    self.failures[saver.name] = explain(error)
                    self._savers.remove(saver)
        names = [saver.name for saver in self._savers]
        return {name: samples[name] for name in names}


def explain(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def _save_once(saver: Saver, task: Task) -> None:
    task.step()
    step = task.state.global_step
    saver.save(step)
    saver.before_update()
    saver.wait()
    saver.discard(step)
