"""What the mirror does with its network: throughput there and back, and what training loses meanwhile."""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.carriers import CARRIERS, Carrier, Holdfast, Place
from benchmarks.field import in_turns
from benchmarks.process import SaverFailed, fresh_process
from benchmarks.results import Result, Table, failure_rows, seconds, times
from benchmarks.settings import Settings
from benchmarks.workloads import SMALL, Task, readable
from src.background import yield_to_training
from tests.store import KEY, SECRET, Store

_SIZE = 140_000_000  # bytes: as the small checkpoints of the other benchmarks
_TRANSFERS = 3  # each way, in a turn
_STEPS = 15  # alone, and at least as many beside uploads


@dataclass(frozen=True)
class _Sample:
    """One turn. Seconds."""

    up: list[float]
    down: list[float]
    alone: list[float]
    """Training steps with nothing beside them."""
    beside: list[float]
    """Training steps while uploads run one after the other."""
    uploads_beside: list[float]


def run(settings: Settings) -> Result:
    """Measure against a real S3 server on this machine."""
    os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    with tempfile.TemporaryDirectory(dir=settings.directory) as folder:
        label, table, measured = _compare(_SIZE, 1 if settings.quick else 3, Path(folder))
    return Result([table], {label: measured})


@contextmanager
def _server(directory: Path) -> Iterator[Place]:
    """A server of its own for each turn: it never gives back the space of what has been overwritten."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        server = Store(Path(folder))
        try:
            server.client().create_bucket(Bucket="benchmark")
            yield Place(server.endpoint, "benchmark")
        finally:
            server.kill()


def _compare(size: int, rounds: int, directory: Path) -> tuple[str, Table, dict[str, Any]]:
    file = directory / f"file_{size}"
    with file.open("wb") as target:
        for start in range(0, size, 1 << 24):
            target.write(os.urandom(min(1 << 24, size - start)))

    def turn(carrier: type[Carrier]) -> _Sample:
        with _server(directory) as place, fresh_process(_turn, carrier, place, file) as child:
            sample: _Sample = child.receive()
            return sample

    turns, failures = in_turns(CARRIERS, rounds, turn)
    file.unlink()

    def over(samples: list[_Sample], part: Callable[[_Sample], list[float]]) -> float:
        return median(value for sample in samples for value in part(sample))

    rows, measured = [], {}
    for name, samples in turns.items():
        found = {
            "up": size / over(samples, lambda sample: sample.up),
            "down": size / over(samples, lambda sample: sample.down),
            # Relative to the steps of the same turn: the machine may be slower in another.
            "step": median(median(sample.beside) / median(sample.alone) for sample in samples),
            "up_beside_training": size / over(samples, lambda sample: sample.uploads_beside),
        }
        measured[name] = found
    ours = measured[Holdfast.name]
    for name, found in measured.items():
        cells = [f"{found[key] / 1e6:.0f} MB/s ({found[key] / ours[key]:.2f})" for key in ("up", "down")]
        beside = f"{found['up_beside_training'] / 1e6:.0f} MB/s"
        rows.append([name, *cells, times(found["step"]), beside])
    label = readable(size)
    alone = median(step for samples in turns.values() for sample in samples for step in sample.alone)
    caption = f"**To a bucket and back, {label}** (in brackets relative to Holdfast; a step alone: {seconds(alone)})"
    columns = ["", "upload", "download", "training step beside uploads", "uploads beside training"]
    return (
        label,
        Table(caption, columns, rows + failure_rows(failures, len(columns))),
        {
            "bytes_per_second_and_step_ratio": measured,
            "failures": failures,
        },
    )


def _turn(kind: type[Carrier], place: Place, file: Path, connection: Connection) -> None:
    carrier = kind(place)
    back = file.with_suffix(".back")
    key, size = "file", file.stat().st_size
    carrier.upload(file, key)
    carrier.download(key, back, size)
    if back.read_bytes() != file.read_bytes():
        raise SaverFailed("what came back is not what was sent")
    up = [_timed(lambda: carrier.upload(file, key)) for _ in range(_TRANSFERS)]
    down = [_timed(lambda: carrier.download(key, back, size)) for _ in range(_TRANSFERS)]
    back.unlink()

    task = Task(SMALL, "cpu")
    alone = [_timed(task.step) for _ in range(_STEPS)]
    done, uploads = threading.Event(), []

    def keep_uploading() -> None:
        if isinstance(carrier, Holdfast):  # as the mirror's thread does
            yield_to_training()
        while not done.is_set():
            uploads.append(_timed(lambda: carrier.upload(file, key)))

    thread = threading.Thread(target=keep_uploading)
    thread.start()
    beside: list[float] = []
    while len(beside) < _STEPS or not uploads:
        beside.append(_timed(task.step))
    done.set()
    thread.join()
    connection.send(_Sample(up, down, alone, beside, uploads))


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
