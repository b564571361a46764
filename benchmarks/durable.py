"""How long it takes until a checkpoint would survive, relative to writing and fsyncing as many plain bytes."""

import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.field import Field
from benchmarks.peers import RawWrite
from benchmarks.results import Result, Table, failure_rows, seconds, times
from benchmarks.roster import SAVERS
from benchmarks.savers import Saver
from benchmarks.settings import Settings
from benchmarks.workloads import Task, Workload


def run(settings: Settings) -> Result:
    """Measure at each size."""
    tables, measurements = [], {}
    for workload, rounds, folder in settings.sizes(small=5, large=3):
        label, table, measured = _compare(workload, rounds, folder)
        tables.append(table)
        measurements[label] = measured
    return Result(tables, measurements)


def _compare(workload: Workload, rounds: int, directory: Path) -> tuple[str, Table, dict[str, Any]]:
    task = Task(workload, "cpu")
    savers: list[type[Saver]] = [RawWrite, *SAVERS]
    with Field(savers, task, directory) as field:
        samples = field.take_turns(lambda saver: _measure(saver, task), rounds)
    duration = {name: median(values) for name, values in samples.items()}
    raw = duration[RawWrite.name]
    fsyncs = {saver.name: saver.fsyncs for saver in savers}
    rows = [
        [name, times(value / raw), seconds(value), "yes" if fsyncs[name] else "no: page cache only"]
        for name, value in duration.items()
    ]
    caption = (
        f"**Until it is durable, {task.label}** "
        f"(1 × = write and fsync of as many bytes: {seconds(raw)}, {task.state_bytes / raw / 1e6:.0f} MB/s)"
    )
    columns = ["", "time", "seconds", "fsync"]
    measured = {"state_bytes": task.state_bytes, "seconds": duration, "fsyncs": fsyncs, "failures": field.failures}
    return task.label, Table(caption, columns, rows + failure_rows(field.failures, len(columns))), measured


def _measure(saver: Saver, task: Task) -> float:
    task.step()
    saved = task.state.global_step
    start = time.perf_counter()
    saver.save(saved)
    saver.before_update()
    saver.wait()
    duration = time.perf_counter() - start
    saver.discard(saved)
    return duration
