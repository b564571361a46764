"""What a saver does to the memory of a process that does nothing else."""

from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from benchmarks.process import fresh_process
from benchmarks.savers import Saver
from benchmarks.workloads import Task, Workload

_SAVES = 3
_INTERVAL = 0.01  # seconds between looks


@dataclass(frozen=True)
class Footprint:
    """What a few saves in a row took, in a fresh process."""

    state_bytes: int
    peak_bytes: int
    """Largest memory of the process and its children, above that of the process before its first save."""


def footprint(kind: type[Saver], workload: Workload, device: str, directory: Path) -> Footprint:
    """Save three times in a fresh process, one after the other, and watch its memory from outside.

    Pages that processes share are counted once (PSS); the page cache is not counted. Watching takes one of the cores:
    nothing else can be measured there.

    Raises:
        SaverFailed: with the reason, in one line.
    """
    with fresh_process(_save_repeatedly, kind, workload, device, directory) as child:
        child.receive()  # the saver is ready
        before = _memory(child.process, and_children=False)
        looks = [before]
        child.send("go")
        state_bytes = child.receive(lambda: looks.append(_memory(child.process)), _INTERVAL)
        child.send("end")
    return Footprint(state_bytes, max(looks) - before)


def _save_repeatedly(
    kind: type[Saver], workload: Workload, device: str, directory: Path, connection: Connection
) -> None:
    task = Task(workload, device)
    saver = kind(task.state, directory)
    connection.send(None)
    connection.recv()
    for _ in range(_SAVES):
        task.state.advance(0)  # another step, as far as a saver can tell, without a step's activations
        saver.save(task.state.global_step)
        saver.before_update()
        saver.wait()
        saver.discard(task.state.global_step)
    connection.send(task.state_bytes)
    connection.recv()
    saver.close()


def _memory(process: psutil.Process, and_children: bool = True) -> int:
    """Bytes, pages that several processes share counted once."""
    family = [process]
    with suppress(psutil.Error):  # here and below: it has just ended
        family += process.children(recursive=True) if and_children else []
    total = 0
    for member in family:
        with suppress(psutil.Error):
            total += member.memory_full_info().pss
    return total
