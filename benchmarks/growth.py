"""What grows with the state, and what must not grow with the number of saves."""

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.field import take_turns
from benchmarks.memory import footprint
from benchmarks.ours import Holdfast
from benchmarks.peers import BufferAndThread, DcpAsyncCached, TorchCheckpointing, TorchSaveDurably
from benchmarks.process import SaverFailed, fresh_process
from benchmarks.results import Result, Table, seconds
from benchmarks.savers import Saver
from benchmarks.settings import Settings
from benchmarks.workloads import Task, readable, sized

_MEGABYTES = (10, 40, 150, 600, 2000)
_MEGABYTES_QUICK = (100,)
_SAVES = 5  # of each size
_SAVERS: list[type[Saver]] = [Holdfast, TorchCheckpointing, DcpAsyncCached, TorchSaveDurably]

_LOOKS = (10, 100, 500, 1000)  # saves
_SMALL = 1  # megabytes of state
_MANY: dict[type[Saver], int] = {Holdfast: 1000, BufferAndThread: 200}
_MANY_QUICK: dict[type[Saver], int] = {Holdfast: 100}


@dataclass(frozen=True)
class Look:
    """A process after so many saves."""

    saves: int
    duration: float
    """Median seconds per save, of the ten up to this one."""
    resident_bytes: int
    open_files: int


def run(settings: Settings) -> Result:
    """Measure both."""
    by_size, sizes = _with_the_state(settings)
    by_count, counts = _with_the_saves(settings)
    return Result([by_size, by_count], {"size": sizes, "saves": counts})


def _with_the_state(settings: Settings) -> tuple[Table, dict[str, Any]]:
    savers = _SAVERS[:2] if settings.quick else _SAVERS
    cells: dict[str, list[str]] = {saver.name: [] for saver in savers}
    measured: dict[str, dict[str, Any]] = {saver.name: {} for saver in savers}
    sizes = {readable(size * 1e6): size for size in (_MEGABYTES_QUICK if settings.quick else _MEGABYTES)}
    for size, megabytes in sizes.items():
        with tempfile.TemporaryDirectory(dir=settings.directory) as folder:
            turns = take_turns(savers, sized(megabytes), "cpu", Path(folder), _save_a_few, rounds=1)
            for saver in savers:
                try:
                    if saver.name in turns.failures:
                        raise SaverFailed(turns.failures[saver.name])
                    peak = footprint(saver, sized(megabytes), "cpu", Path(folder)).peak_bytes
                except SaverFailed as error:
                    cells[saver.name].append(f"failed: {error}")
                    continue
                stall, duration = map(median, zip(*turns.samples(saver.name), strict=True))
                cells[saver.name].append(f"{seconds(stall)} · {readable(peak)} · {seconds(duration)}")
                measured[saver.name][size] = {"stall": stall, "peak_bytes": peak, "duration": duration}
    rows = [[name, *of_one] for name, of_one in cells.items()]
    columns = ["stall · peak memory · time per save", *sizes]
    return Table("**With the size of the state** (a fresh process each)", columns, rows), measured


def _save_a_few(saver: Saver, task: Task) -> list[tuple[float, float]]:
    """Seconds that each save held up training, and until it was done."""
    samples = []
    for _ in range(_SAVES):
        task.step()
        start = time.perf_counter()
        saver.save(task.state.global_step)
        saver.before_update()
        stall = time.perf_counter() - start
        saver.wait()
        samples.append((stall, time.perf_counter() - start))
        saver.discard(task.state.global_step)
    return samples


def _with_the_saves(settings: Settings) -> tuple[Table, dict[str, Any]]:
    rows, measured = [], {}
    for saver, saves in (_MANY_QUICK if settings.quick else _MANY).items():
        with tempfile.TemporaryDirectory(dir=settings.directory) as folder:
            try:
                with fresh_process(_save_many, saver, saves, Path(folder)) as child:
                    looks = child.receive()
            except SaverFailed as error:
                rows.append([saver.name, f"failed: {error}", "", "", ""])
                continue
        measured[saver.name] = [asdict(look) for look in looks]
        rows += [
            [saver.name, str(look.saves), seconds(look.duration), readable(look.resident_bytes), str(look.open_files)]
            for look in looks
        ]
    columns = ["", "saves", "time per save", "memory of the process", "open files"]
    caption = f"**With the number of saves** (a state of {_SMALL} MB, a fresh process each)"
    return Table(caption, columns, rows), measured


def _save_many(kind: type[Saver], saves: int, directory: Path, connection: Connection) -> None:
    task = Task(sized(_SMALL), "cpu")
    saver = kind(task.state, directory)
    durations, looks = [], []
    for count in range(1, saves + 1):
        task.step()
        start = time.perf_counter()
        saver.save(task.state.global_step)
        saver.before_update()
        saver.wait()
        durations.append(time.perf_counter() - start)
        if not saver.rotates:
            saver.discard(task.state.global_step)
        if count in _LOOKS or count == saves:
            looks.append(Look(count, median(durations[-10:]), _resident_bytes(), _open_files()))
    connection.send(looks)
    saver.close()


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
