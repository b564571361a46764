"""For how long a checkpoint holds up training, as a multiple of one plain copy of the same bytes."""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.clock import clock_of
from benchmarks.field import take_turns_beside
from benchmarks.memory import footprint
from benchmarks.process import SaverFailed
from benchmarks.results import Result, Table, failure_rows, seconds, times
from benchmarks.roster import FLOOR, SAVERS
from benchmarks.savers import Saver
from benchmarks.settings import Settings
from benchmarks.workloads import Task, Workload

_SAVES = 4  # in a turn
_UNDISTURBED = 3  # steps before each save
_FOLLOWING = {"cpu": 1, "cuda": 5}  # steps after `save` that may pay for it: on a GPU the copy overlaps more of them


@dataclass(frozen=True)
class _Sample:
    """One save, in seconds."""

    call: float
    """`save` and `before_update`."""
    undisturbed: float
    """A step with nothing in flight."""
    with_steps: float
    """The save and the steps that follow it."""


def run(settings: Settings) -> Result:
    """Measure at each size."""
    return settings.at_each_size(partial(_compare, settings), small=4, large=2)


def _compare(settings: Settings, workload: Workload, rounds: int, directory: Path) -> tuple[str, Table, dict[str, Any]]:
    device = settings.device
    measure_memory = not settings.quick and workload is settings.workloads[-1]
    turns = take_turns_beside(FLOOR, [FLOOR, *SAVERS], workload, device, directory, _save_once, rounds, _SAVES)
    pairs = {name: turns.samples(name) for name in turns.rounds}
    floors = [floor for of_one in pairs.values() for floor, _ in of_one]
    copy, step = median(floor.call for floor in floors), median(floor.undisturbed for floor in floors)
    steps = _FOLLOWING[device]
    call = {name: median(own.call for _, own in of_one) for name, of_one in pairs.items()}
    stall = {name: median(own.call / floor.call for floor, own in of_one) for name, of_one in pairs.items()}
    added = {
        name: median((own.with_steps - steps * floor.undisturbed) / floor.call for floor, own in of_one)
        for name, of_one in pairs.items()
    }
    between = {
        name: median(own.undisturbed / floor.undisturbed for floor, own in of_one) for name, of_one in pairs.items()
    }
    memory, no_memory = _memory(workload, device, directory) if measure_memory else ({}, {})

    rows = []
    for name in call:
        row = [name, times(stall[name]), times(added[name]), times(between[name]), seconds(call[name])]
        if measure_memory:
            row.append(f"{memory[name]:.1f} ×" if name in memory else no_memory.get(name, ""))
        rows.append(row)
    following = "step" if steps == 1 else f"{steps} steps"
    columns = ["", "stall", f"with what it adds to the next {following}", "steps between saves", "seconds"]
    columns += ["peak memory / state"] if measure_memory else []
    caption = f"**Stall, {turns.label}** (1 × = a copy of it just before: {seconds(copy)}; a step: {seconds(step)})"
    measured = {
        "state_bytes": turns.state_bytes,
        "step": step,
        "stall": call,
        "stall_over_memcpy": stall,
        "added_over_memcpy": added,
        "steps_between_saves": between,
        "memory_over_state": memory,
        "failures": turns.failures,
    }
    return turns.label, Table(caption, columns, rows + failure_rows(turns.failures, len(columns))), measured


def _save_once(saver: Saver, task: Task) -> _Sample:
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
    return _Sample(call, median(undisturbed), with_steps)


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
