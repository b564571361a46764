"""For how long a checkpoint holds up training, as a multiple of one plain copy of the same bytes."""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.clock import clock_of
from benchmarks.field import Field
from benchmarks.memory import SaverFailed, footprint
from benchmarks.results import Result, Table, failure_rows, seconds, times
from benchmarks.roster import FLOOR, SAVERS
from benchmarks.savers import Saver
from benchmarks.settings import Settings
from benchmarks.workloads import Task, Workload

_UNDISTURBED = 2  # steps before each save
_FOLLOWING = {"cpu": 1, "cuda": 5}  # steps after `save` that may pay for it: on a GPU the copy overlaps more of them


@dataclass(frozen=True)
class _Sample:
    """One save, in seconds."""

    call: float
    """`save` and `before_update`."""
    undisturbed: list[float]
    """Steps with nothing in flight."""
    with_steps: float
    """The save and the steps that follow it."""


def run(settings: Settings) -> Result:
    """Measure at each size."""
    tables, measurements = [], {}
    for workload, rounds, folder in settings.sizes(small=15, large=5):
        measure_memory = not settings.quick and workload is settings.workloads[-1]
        label, table, measured = _compare(workload, settings.device, rounds, measure_memory, folder)
        tables.append(table)
        measurements[label] = measured
    return Result(tables, measurements)


def _compare(
    workload: Workload, device: str, rounds: int, measure_memory: bool, directory: Path
) -> tuple[str, Table, dict[str, Any]]:
    task = Task(workload, device)
    with Field([FLOOR, *SAVERS], task, directory) as field:
        samples = field.take_turns(lambda saver: _measure(saver, task), rounds)
    step = median(duration for values in samples.values() for sample in values for duration in sample.undisturbed)
    steps = _FOLLOWING[device]
    call = {name: median(sample.call for sample in values) for name, values in samples.items()}
    added = {name: median(sample.with_steps - steps * step for sample in values) for name, values in samples.items()}
    floor = call[FLOOR.name]
    memory, no_memory = _memory(workload, device, directory) if measure_memory else ({}, {})

    rows = []
    for name in call:
        row = [name, times(call[name] / floor), times(added[name] / floor), seconds(call[name])]
        if measure_memory:
            row.append(f"{memory[name]:.1f} ×" if name in memory else no_memory.get(name, ""))
        rows.append(row)
    following = "step" if steps == 1 else f"{steps} steps"
    columns = ["", "stall", f"with what it adds to the next {following}", "seconds"]
    columns += ["peak memory / state"] if measure_memory else []
    caption = f"**Stall, {task.label}** (copies of it: 1 × = {seconds(floor)}; a step: {seconds(step)})"
    measured = {
        "state_bytes": task.state_bytes,
        "step": step,
        "stall": call,
        "stall_over_memcpy": {name: value / floor for name, value in call.items()},
        "added_over_memcpy": {name: value / floor for name, value in added.items()},
        "memory_over_state": memory,
        "failures": field.failures,
    }
    return task.label, Table(caption, columns, rows + failure_rows(field.failures, len(columns))), measured


def _measure(saver: Saver, task: Task) -> _Sample:
    clock = clock_of(task.device)
    undisturbed = []
    for _ in range(_UNDISTURBED):
        clock.start()
        task.step()
        undisturbed.append(clock.stop())
    saved = task.state.global_step
    clock.start()
    start = time.perf_counter()
    saver.save(saved)
    call = time.perf_counter() - start
    for _ in range(_FOLLOWING[task.device]):
        call += task.step(saver.before_update)
    with_steps = clock.stop()
    saver.wait()
    saver.discard(saved)
    return _Sample(call, undisturbed, with_steps)


def _memory(workload: Workload, device: str, directory: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Peak memory as a multiple of the state by saver, and why there is none."""
    ratios, failures = {}, {}

    def look(saver: type[Saver]) -> None:
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            try:
                taken = footprint(saver, workload, device, Path(folder))
                ratios[saver.name] = taken.peak_bytes / taken.state_bytes
            except SaverFailed as error:
                failures[saver.name] = f"failed: {error}"

    with ThreadPoolExecutor(2) as two_at_once:  # nobody's time is taken
        list(two_at_once.map(look, SAVERS))
    return ratios, failures
