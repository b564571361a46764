"""How soon after SIGTERM a checkpoint is durable: the real train.py, beside a synchronous save of the same state."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.results import Result, Table, seconds, times
from benchmarks.settings import Settings
from src.storage.local import fsync_directory

_STOPS = 10
_BATCH, _STEPS = 16, 20
_RUN = (
    *("data=synthetic", f"data.batch_size={_BATCH}", f"data.train_size={_BATCH * _STEPS}", "data.val_size=16"),
    *("data.image_size=32", "model=resnet18", "optimizer=adamw", "scheduler=none", "trainer.device=cpu"),
    *("trainer.epochs=1000", "checkpoint.every=1000000", "checkpoint.keep_best=0", "checkpoint.keep=1", "run=stop"),
)


def run(settings: Settings) -> Result:
    """Stop a training again and again, each time at another moment of a step."""
    chance = random.Random(0)
    with tempfile.TemporaryDirectory(dir=settings.directory) as folder:
        run_directory = Path(folder, "outputs/stop")
        waits = [_stop(Path(folder), chance.random()) for _ in range(3 if settings.quick else _STOPS)]
        step = _step(run_directory)
        state = torch.load(next(run_directory.glob("checkpoints/step_*/state.pt")), weights_only=True)
        save = median(_save(state, Path(folder, "state.pt")) for _ in range(5))
    bound = 2 * save + step
    row = [seconds(median(waits)), seconds(max(waits)), seconds(step), seconds(save), times(max(waits) / bound)]
    columns = ["until durable, median", "worst", "a step", "a synchronous save", "worst, of 2 saves and a step"]
    caption = f"**From SIGTERM to a durable checkpoint, ResNet-18 with AdamW, 140 MB** ({len(waits)} stops)"
    measured = {"seconds": waits, "step": step, "save": save}
    return Result([Table(caption, columns, [row])], measured)


def _stop(folder: Path, seconds_later: float) -> float:
    """Seconds from SIGTERM until there is a checkpoint that was not there before (the fsync of its folder follows)."""
    train = Path(__file__).resolve().parent.parent / "train.py"
    process = subprocess.Popen(
        [sys.executable, str(train), *_RUN], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    while " · step " not in (line := process.stdout.readline()):
        if not line:
            raise RuntimeError(f"train.py ended with {process.wait()}")
    time.sleep(seconds_later)
    before = set(folder.glob("outputs/stop/checkpoints/step_*"))
    process.send_signal(signal.SIGTERM)
    start = time.perf_counter()
    ended = False
    while not set(folder.glob("outputs/stop/checkpoints/step_*")) - before:
        if ended:
            raise RuntimeError(f"train.py ended with {process.returncode}, and without a checkpoint")
        ended = process.poll() is not None
        time.sleep(0.001)
    wait = time.perf_counter() - start
    process.communicate()
    return wait


def _save(state: object, path: Path) -> float:
    """Seconds for torch.save, fsync, rename, fsync of the folder."""
    start = time.perf_counter()
    with path.with_suffix(".tmp").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".tmp").rename(path)
    fsync_directory(path.parent)
    return time.perf_counter() - start


def _step(run_directory: Path) -> float:
    events = EventAccumulator(str(run_directory / "tensorboard")).Reload()
    return _BATCH / float(median(event.value for event in events.Scalars("train/samples_per_second")))
