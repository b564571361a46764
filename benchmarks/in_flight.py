"""What training steps cost while a save is being written, relative to steps with none."""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.field import Field
from benchmarks.results import Result, Table, failure_rows, seconds, times
from benchmarks.roster import IN_BACKGROUND
from benchmarks.savers import Saver
from benchmarks.settings import Settings
from benchmarks.workloads import Task, Workload

_UNDISTURBED = 4  # steps before each save
_ENOUGH = 30  # steps in flight
_LONGEST = 60.0  # seconds that a save may take


@dataclass(frozen=True)
class _Sample:
    """The steps around one save, in seconds, without what they waited for the snapshot."""

    undisturbed: list[float]
    in_flight: list[float]
    """Those at whose end the save was still running."""


def run(settings: Settings) -> Result:
    """Measure at each size."""
    tables, measurements = [], {}
    for workload, rounds, folder in settings.sizes(small=10, large=3):
        label, table, measured = _compare(workload, rounds, folder)
        tables.append(table)
        measurements[label] = measured
    return Result(tables, measurements)


def _compare(workload: Workload, rounds: int, directory: Path) -> tuple[str, Table, dict[str, Any]]:
    task = Task(workload, "cpu")
    with Field(IN_BACKGROUND, task, directory) as field:
        samples = field.take_turns(
            lambda saver: _measure(saver, task),
            rounds,
            enough=lambda values: sum(len(sample.in_flight) for sample in values) >= _ENOUGH,
        )
    rows, ratios = [], {}
    for name, values in samples.items():
        # Each relative to the undisturbed steps of its own turn: the machine may have been slower in another.
        in_flight = [step / median(sample.undisturbed) for sample in values for step in sample.in_flight]
        if not in_flight:
            rows.append([name, "no step fits in", "0", ""])
            continue
        ratios[name] = median(in_flight)
        steps_per_save = len(in_flight) / len(values)
        rows.append([name, times(ratios[name]), str(len(in_flight)), f"{steps_per_save:.1f}"])
    alone = median(duration for values in samples.values() for sample in values for duration in sample.undisturbed)
    caption = f"**Steps while a save is in flight, {task.label}** (1 × = a step with none: {seconds(alone)})"
    columns = ["", "step in flight", "steps measured", "steps per save"]
    measured = {"state_bytes": task.state_bytes, "step": alone, "ratio": ratios, "failures": field.failures}
    return task.label, Table(caption, columns, rows + failure_rows(field.failures, len(columns))), measured


def _measure(saver: Saver, task: Task) -> _Sample:
    undisturbed, in_flight = [], []
    for _ in range(_UNDISTURBED):
        start = time.perf_counter()
        task.step()
        undisturbed.append(time.perf_counter() - start)
    saved = task.state.global_step
    saver.save(saved)
    give_up = time.monotonic() + _LONGEST
    while time.monotonic() < give_up:
        start = time.perf_counter()
        waited = task.step(saver.before_update)
        duration = time.perf_counter() - start
        if not saver.in_flight():
            break
        in_flight.append(duration - waited)
    saver.wait()
    saver.discard(saved)
    return _Sample(undisturbed, in_flight)
