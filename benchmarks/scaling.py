"""What checkpoints cost several ranks, and how long until they train again: the real train.py, by a real torchrun."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.results import Result, Table, seconds, times
from benchmarks.settings import Settings
from src.goodput import lives_of

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
_CASES = (("none", 1), ("ddp", 2), ("fsdp", 2))
_BATCH, _STEPS = 16, 100
_EVERY = 10  # steps between checkpoints
_NEVER = 10**9
_RUN = (
    *("data=synthetic", f"data.batch_size={_BATCH}", f"data.train_size={_BATCH * _STEPS}", "data.val_size=16"),
    *("data.image_size=8", "model=resnet18", "trainer.device=cpu", "checkpoint.keep_best=0", "run=scaling"),
)


def run(settings: Settings) -> Result:
    """Measure on this machine's processors, each rank with one thread."""
    rows, measured = [], {}
    for strategy, ranks in _CASES:
        found = [_measure(strategy, ranks, settings.directory) for _ in range(1 if settings.quick else 3)]
        alone, saving, start = (median(values) for values in zip(*found, strict=True))
        measured[f"{strategy} {ranks}"] = {"step": alone, "step_with_saves": saving, "start": start}
        rows.append([strategy, str(ranks), seconds(alone), times(saving / alone), seconds(start)])
    columns = [
        "trainer.strategy",
        "ranks",
        "step",
        f"with a checkpoint every {_EVERY} steps",
        "from start to first step",
    ]
    caption = f"**Several ranks, ResNet-18 with SGD (90 MB), batches of {_BATCH}** (one thread per rank)"
    return Result([Table(caption, columns, rows)], measured)


def _measure(strategy: str, ranks: int, directory: Path) -> tuple[float, float, float]:
    """Seconds per step without and with checkpoints, and seconds from the start of a process that resumes to its first
    step."""
    with (
        tempfile.TemporaryDirectory(dir=directory) as without,
        tempfile.TemporaryDirectory(dir=directory) as with_saves,
    ):
        _train(strategy, ranks, without, 1, _NEVER)
        _train(strategy, ranks, with_saves, 1, _EVERY)
        runs = [Path(directory, "outputs/scaling") for directory in (without, with_saves)]
        step, step_with_saves = (seconds_per_step(run_directory, _BATCH) for run_directory in runs)
        _train(strategy, ranks, with_saves, 2, _EVERY)
        start = lives_of(Path(with_saves, "outputs/scaling"))[-1].starting
    return step, step_with_saves, start


def _train(strategy: str, ranks: int, directory: str, epochs: int, every: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    settings = (f"trainer.strategy={strategy}", f"trainer.epochs={epochs}", f"checkpoint.every={every}")
    subprocess.run(
        [sys.executable, *launcher, str(TRAIN), *_RUN, *settings],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        check=True,
        capture_output=True,
    )


def seconds_per_step(run_directory: Path, batch_size: int) -> float:
    """The median of a run of train.py, from TensorBoard's events."""
    events = EventAccumulator(str(run_directory / "tensorboard")).Reload()
    return batch_size / float(median(event.value for event in events.Scalars("train/samples_per_second")))
