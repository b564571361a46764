"""What is left of the throughput of a whole training run with a checkpoint every so many steps."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.clock import clock_of
from benchmarks.field import take_turns
from benchmarks.results import Result, Table, failure_rows, seconds
from benchmarks.roster import SAVERS
from benchmarks.savers import NoSaver, Saver
from benchmarks.settings import Settings
from benchmarks.workloads import SHORT_STEP, Task, Workload

# Steps between checkpoints, and the length of a block.
_BLOCKS = {10: 100, 100: 200, 1000: 1000}
_BLOCKS_QUICK = {10: 50}
_BLOCKS_CUDA = {100: 300}


def run(settings: Settings) -> Result:
    """Measure the workload of the device."""
    if settings.device == "cuda":
        workloads, blocks = settings.workloads, _BLOCKS_CUDA
    else:
        workloads, blocks = [SHORT_STEP], _BLOCKS_QUICK if settings.quick else _BLOCKS
    rounds = 1 if settings.quick else 3
    tables, measurements = [], {}
    for workload in workloads:
        with tempfile.TemporaryDirectory(dir=settings.directory) as folder:
            label, table, measured = _compare(workload, settings.device, blocks, rounds, Path(folder))
        tables.append(table)
        measurements[label] = measured
    return Result(tables, measurements)


def _compare(
    workload: Workload, device: str, blocks: dict[int, int], rounds: int, directory: Path
) -> tuple[str, Table, dict[str, Any]]:
    measure = partial(_measure, blocks=blocks)
    turns = take_turns([NoSaver, *SAVERS], workload, device, directory, measure, rounds)
    alone = [samples[0] for samples in turns.rounds.pop(NoSaver.name)]
    kept = {
        name: {
            every: median(without[every] / own[every] for without, own in zip(alone, turns.samples(name), strict=True))
            for every in blocks
        }
        for name in turns.rounds
    }
    fsyncs = {saver.name: saver.fsyncs for saver in SAVERS}
    rows = [
        [name, *(f"{100 * share:.1f} %" for share in shares.values()), "yes" if fsyncs[name] else "no: page cache only"]
        for name, shares in kept.items()
    ]
    step = median(values[max(blocks)] for values in alone)
    caption = f"**Throughput that is left, {turns.label}** (100 % = no checkpoints: {seconds(step)} per step)"
    columns = ["a checkpoint every", *(f"{every} steps" for every in blocks), "fsync"]
    measured = {"state_bytes": turns.state_bytes, "step": step, "throughput": kept, "failures": turns.failures}
    return turns.label, Table(caption, columns, rows + failure_rows(turns.failures, len(columns))), measured


def _measure(saver: Saver, task: Task, blocks: dict[int, int]) -> list[dict[int, float]]:
    """One sample: seconds per step, by the steps between checkpoints."""
    with ThreadPoolExecutor(1) as trash:
        return [{every: _train(saver, task, every, steps, trash) / steps for every, steps in blocks.items()}]


def _train(saver: Saver, task: Task, every: int, steps: int, trash: ThreadPoolExecutor) -> float:
    """Train one block. Returns its seconds."""
    clock = clock_of(task.device)
    on_disk: list[int] = []
    clock.start()
    for count in range(steps):
        task.step(saver.before_update)
        # In the middle of each stretch, so that what a save costs afterwards falls into the block, too.
        if count % every == every // 2:
            saver.wait()  # one save in flight, whoever would take more: each more is another copy in memory
            if len(on_disk) == 2 and not saver.rotates:
                trash.submit(saver.discard, on_disk.pop(0))
            saver.save(task.state.global_step)
            on_disk.append(task.state.global_step)
    duration = clock.stop()
    saver.wait()
    trash.submit(lambda: None).result()  # it deletes in order, so all is deleted now
    for step in on_disk:
        saver.discard(step)
    return duration
