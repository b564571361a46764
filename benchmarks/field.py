"""All savers side by side, taking turns, each turn in a process of its own."""

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from benchmarks.process import SaverFailed, fresh_process
from benchmarks.savers import Saver
from benchmarks.workloads import Task, Workload

T = TypeVar("T")
R = TypeVar("R")


class Named(Protocol):
    """Whoever takes part."""

    name: ClassVar[str]


Kind = TypeVar("Kind", bound=Named)


@dataclass
class Turns(Generic[T]):
    """What came of it."""

    rounds: dict[str, list[list[T]]] = field(default_factory=dict)
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

    def turn(saver: type[Saver]) -> list[T]:
        with _at_work(saver, workload, device, directory, measure, turns) as sample:
            return sample()

    turns.rounds, turns.failures = in_turns(savers, rounds, turn)
    return turns


def take_turns_beside(
    reference: type[Saver],
    savers: Sequence[type[Saver]],
    workload: Workload,
    device: str,
    directory: Path,
    measure: Callable[[Saver, Task], T],
    rounds: int,
    samples: int,
) -> Turns[tuple[T, T]]:
    """As `take_turns`, with so many samples in a turn, each after one of `reference`, which waits in a process of its
    own: for what can only be told from the memory's moods, which change from minute to minute, by pairs.

    Returns:
        Pairs: of the reference, and of the saver right after it.
    """
    turns: Turns[tuple[T, T]] = Turns()

    def turn(saver: type[Saver]) -> list[tuple[T, T]]:
        place = (workload, device, directory, measure, turns)
        with _at_work(reference, *place) as of_the_reference, _at_work(saver, *place) as of_the_saver:

            def before() -> T:
                try:
                    return of_the_reference()
                except SaverFailed as error:  # no failure of the saver's
                    raise RuntimeError(f"{reference.name}: {error}") from error

            return [(before(), of_the_saver()) for _ in range(samples)]

    turns.rounds, turns.failures = in_turns(savers, rounds, turn)
    return turns


def in_turns(
    kinds: Sequence[type[Kind]], rounds: int, turn: Callable[[type[Kind]], R]
) -> tuple[dict[str, list[R]], dict[str, str]]:
    """Give everybody a turn in each round, in another order each time, so that nobody always comes after the same one.

    Returns:
        What came of it by name, round by round, in the order of `kinds`; and by name, why one does not run.
    """
    found: dict[str, list[R]] = {kind.name: [] for kind in kinds}
    failures: dict[str, str] = {}
    order = random.Random(0)
    for _ in range(rounds):
        remaining = [kind for kind in kinds if kind.name not in failures]
        for kind in order.sample(remaining, len(remaining)):
            os.sync()  # nobody pays for the pages that another has left to be written
            try:
                found[kind.name].append(turn(kind))
            except SaverFailed as error:
                failures[kind.name] = str(error)
                del found[kind.name]
    return found, failures


@contextmanager
def _at_work(
    saver: type[Saver],
    workload: Workload,
    device: str,
    directory: Path,
    measure: Callable[[Saver, Task], R],
    turns: Turns[Any],
) -> Iterator[Callable[[], R]]:
    """A saver in a process of its own, warm, that measures when it is asked to and else does nothing."""
    with (
        tempfile.TemporaryDirectory(dir=directory) as folder,
        fresh_process(_turn, saver, workload, device, Path(folder), measure) as child,
    ):
        turns.label, turns.state_bytes = child.receive()

        def sample() -> R:
            child.send(True)
            measured: R = child.receive()
            return measured

        yield sample
        child.send(False)
        child.receive()


def _turn(
    kind: type[Saver],
    workload: Workload,
    device: str,
    directory: Path,
    measure: Callable[[Saver, Task], Any],
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
    connection.send((task.label, task.state_bytes))
    while connection.recv():
        connection.send(measure(saver, task))
    saver.close()
    connection.send(None)  # only now, so that a saver that fails at it is a row that says so
