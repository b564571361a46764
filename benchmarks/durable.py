"""How long it takes until a checkpoint would survive, relative to writing and fsyncing as many plain bytes."""

import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.field import take_turns
from benchmarks.peers import RawWrite
from benchmarks.results import Result, Table, failure_rows, seconds, times
from benchmarks.roster import SAVERS
from benchmarks.savers import Saver
from benchmarks.settings import Settings
from benchmarks.workloads import Task, Workload

_SAVES = 3  # in a turn


def run(settings: Settings) -> Result:
    """Measure at each size."""
    return settings.at_each_size(_compare, small=3, large=1)


def _compare(workload: Workload, rounds: int, directory: Path) -> tuple[str, Table, dict[str, Any]]:
    savers: list[type[Saver]] = [RawWrite, *SAVERS]
    turns = take_turns(savers, workload, "cpu", directory, _measure, rounds)
    duration = {name: median(turns.samples(name)) for name in turns.rounds}
    raw = duration[RawWrite.name]
    fsyncs = {saver.name: saver.fsyncs for saver in savers}
    rows = [
        [name, times(value / raw), seconds(value), "yes" if fsyncs[name] else "no: page cache only"]
        for name, value in duration.items()
    ]
    caption = (
        f"**Until it is durable, {turns.label}** "
        f"(1 × = write and fsync of as many bytes: {seconds(raw)}, {turns.state_bytes / raw / 1e6:.0f} MB/s)"
    )
    columns = ["", "time", "seconds", "fsync"]
    measured = {"state_bytes": turns.state_bytes, "seconds": duration, "fsyncs": fsyncs, "failures": turns.failures}
    return turns.label, Table(caption, columns, rows + failure_rows(turns.failures, len(columns))), measured


def _measure(saver: Saver, task: Task) -> list[float]:
    durations = []
    for _ in range(_SAVES):
        task.step()
        saved = task.state.global_step
        start = time.perf_counter()
        saver.save(saved)
        saver.before_update()
        saver.wait()
        durations.append(time.perf_counter() - start)
        saver.discard(saved)
    return durations
