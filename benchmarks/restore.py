"""From a file to model and optimizer, relative to reading as many plain bytes into fresh memory."""

import mmap
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.field import take_turns
from benchmarks.ours import Holdfast
from benchmarks.peers import DcpAsyncCached, Lightning, RawWrite, TorchCheckpointing, TorchSave, TorchSnapshot
from benchmarks.peers import TorchSaveMapped as Mapped
from benchmarks.results import Result, Table, failure_rows, seconds, times
from benchmarks.savers import Saver
from benchmarks.settings import Settings
from benchmarks.workloads import Task, Workload, state_tensors
from src.state import TrainState


class RawRead(RawWrite):
    """A plain file, read in one go into memory that was never touched."""

    name = restore_name = "read: the page cache"

    def restore(self, step: int, target: TrainState) -> None:
        """Read."""
        with self.path(step).open("rb", buffering=0) as file:
            buffer = memoryview(mmap.mmap(-1, self.path(step).stat().st_size))
            while count := file.readinto(buffer):
                buffer = buffer[count:]


_RESTORES = 3  # in a turn

_READERS: list[type[Saver]] = [
    RawRead,
    Holdfast,
    TorchCheckpointing,
    DcpAsyncCached,
    Lightning,
    TorchSnapshot,
    TorchSave,
    Mapped,
]


class DiffersError(Exception):
    """What was restored is not what was saved."""


def run(settings: Settings) -> Result:
    """Measure at each size."""
    return settings.at_each_size(_compare, small=2, large=1)


def _compare(workload: Workload, rounds: int, directory: Path) -> tuple[str, Table, dict[str, Any]]:
    turns = take_turns(_READERS, workload, "cpu", directory, _measure, rounds)
    restore_names = {saver.name: saver.restore_name for saver in _READERS}
    duration = {restore_names[name]: median(turns.samples(name)) for name in turns.rounds}
    raw = duration[RawRead.name]
    rows = [[name, times(value / raw), seconds(value)] for name, value in duration.items()]
    failures = {restore_names[name]: reason for name, reason in turns.failures.items()}
    caption = (
        f"**Restore, {turns.label}** "
        f"(1 × = reading as many bytes: {seconds(raw)}, {turns.state_bytes / raw / 1e9:.1f} GB/s)"
    )
    columns = ["", "time", "seconds"]
    measured = {"state_bytes": turns.state_bytes, "seconds": duration, "failures": failures}
    return turns.label, Table(caption, columns, rows + failure_rows(failures, len(columns))), measured


def _measure(saver: Saver, task: Task) -> list[float]:
    target = Task(task.workload, task.device)
    task.step()
    saved = task.state.global_step
    saver.save(saved)
    saver.before_update()
    saver.wait()
    durations = []
    for _ in range(_RESTORES):
        start = time.perf_counter()
        saver.restore(saved, target.state)
        durations.append(time.perf_counter() - start)
        if not isinstance(saver, RawRead):
            _require_equal(target.state, task.state)
        target.step()  # what was restored is in use, and there is something to restore the next time
    saver.discard(saved)
    return durations


def _require_equal(restored: TrainState, saved: TrainState) -> None:
    pairs = zip(state_tensors(restored), state_tensors(saved), strict=True)
    if restored.global_step != saved.global_step or not all(torch.equal(one, other) for one, other in pairs):
        raise DiffersError("what was restored is not what was saved")
