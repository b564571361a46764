"""All savers side by side, taking turns, each turn in a process of its own."""

import os
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Generic, TypeVar

from benchmarks.process import SaverFailed, fresh_process
from benchmarks.savers import Saver
from benchmarks.workloads import Task, Workload

T = TypeVar("T")


@dataclass
class Turns(Generic[T]):
    """What came of it."""

    rounds: dict[str, list[list[T]]] = field(default_factory=lambda: defaultdict(list))
    """By the saver's name: its samples, round by round. A saver that fails has none."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why a saver does not run, by name."""
    label: str = ""
    """The model and the size of its state."""
    state_bytes: int = 0

    def samples(self, name: str) -> list[T]:
        """Of all rounds."""
        return [sample for samples in self.rounds[name] for sample in samples]


def take_turns(
    savers: Sequence[type[Saver]],
    workload: Workload,
    device: str,
    directory: Path,
    measure: Callable[[Saver, Task], list[T]],
    rounds: int,
) -> Turns[T]:
    """Measure every saver once a round.

    Rounds follow each other in a new order, so that whatever changes on the machine changes for all alike. Each turn
    has a process of its own: what one leaves behind there (threads, processes, allocators) would slow down all others.
    In it, the saver saves once before anything counts: buffers are made, processes started, code is warm.

    Args:
        measure: What to do with a saver, in the new process, hence a function that can be sent there. It leaves
            nothing in flight and nothing on the disk, and returns its samples.
    """
    turns: Turns[T] = Turns()
    remaining = list(savers)
    order = random.Random(0)  # another order each round: nobody always comes after the same one
    for _ in range(rounds):
        for saver in order.sample(remaining, len(remaining)):
            os.sync()  # nobody pays for the pages that another has left to be written
            with tempfile.TemporaryDirectory(dir=directory) as folder:
                try:
                    with fresh_process(_turn, saver, workload, device, Path(folder), measure) as child:
                        turns.label, turns.state_bytes, samples = child.receive()
                except SaverFailed as error:
                    turns.failures[saver.name] = str(error)
                    turns.rounds.pop(saver.name, None)
                    remaining.remove(saver)
                else:
                    turns.rounds[saver.name].append(samples)
    turns.rounds = {saver.name: turns.rounds[saver.name] for saver in remaining}  # in the order of the tables
    return turns


def _turn(
    kind: type[Saver],
    workload: Workload,
    device: str,
    directory: Path,
    measure: Callable[[Saver, Task], list[T]],
    connection: Connection,
) -> None:
    task = Task(workload, device)
    saver = kind(task.state, directory)
    task.step()
    step = task.state.global_step
    saver.save(step)
    saver.before_update()
    saver.wait()
    saver.discard(step)
    samples = measure(saver, task)
    saver.close()  # first, so that a saver that fails at it is a row that says so
    connection.send((task.label, task.state_bytes, samples))
