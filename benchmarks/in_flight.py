"""What training steps cost while a save is being written, relative to steps with none."""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.field import take_turns
from benchmarks.results import Result, Table, failure_rows, seconds, times
from benchmarks.roster import IN_BACKGROUND
from benchmarks.savers import NoSaver, Saver
from benchmarks.settings import Settings
from benchmarks.workloads import Task, Workload

_UNDISTURBED = 4  # steps before each save
_SAVES, _STEPS = 4, 10  # in a turn: at most so many saves, and so many steps in flight
_LONGEST = 60.0  # seconds that a save may take


@dataclass(frozen=True)
class _Sample:
    """The steps around one save, in seconds, without what they waited for the snapshot."""

    undisturbed: list[float]
    in_flight: list[float]
    """Those at whose end the save was still running."""


def run(settings: Settings) -> Result:
    """Measure at each size."""
    return settings.at_each_size(_compare, small=2, large=2)


def _compare(workload: Workload, rounds: int, directory: Path) -> tuple[str, Table, dict[str, Any]]:
    turns = take_turns([NoSaver, *IN_BACKGROUND], workload, "cpu", directory, _measure, rounds)
    alone = median(step for sample in turns.samples(NoSaver.name) for step in sample.undisturbed)
    rows, ratios, between = [], {}, {}
    for saver in IN_BACKGROUND:
        samples = turns.samples(saver.name) if saver.name in turns.rounds else []
        if not samples:
            continue
        # Relative to the steps just before the same save: the machine may be slower at another time.
        in_flight = [step / median(sample.undisturbed) for sample in samples for step in sample.in_flight]
        between[saver.name] = median(step for sample in samples for step in sample.undisturbed) / alone
        if in_flight:
            ratios[saver.name] = median(in_flight)
        ratio = times(ratios[saver.name]) if in_flight else "no step fits in"
        per_save = f"{len(in_flight) / len(samples):.1f}"
        rows.append([saver.name, ratio, times(between[saver.name]), str(len(in_flight)), per_save])
    caption = f"**Steps while a save is in flight, {turns.label}** (1 × = a step without a saver: {seconds(alone)})"
    columns = ["", "step in flight", "steps between saves", "steps measured", "steps per save"]
    measured = {
        "state_bytes": turns.state_bytes,
        "step": alone,
        "ratio": ratios,
        "steps_between_saves": between,
        "failures": turns.failures,
    }
    return turns.label, Table(caption, columns, rows + failure_rows(turns.failures, len(columns))), measured


def _measure(saver: Saver, task: Task) -> list[_Sample]:
    samples: list[_Sample] = []
    while len(samples) < _SAVES and sum(len(sample.in_flight) for sample in samples) < _STEPS:
        samples.append(_save_once(saver, task))
    return samples


def _save_once(saver: Saver, task: Task) -> _Sample:
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
