"""How soon after SIGTERM a checkpoint is durable: the real train.py, beside a synchronous save of the same state."""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.peers import save_durably
from benchmarks.results import Result, Table, seconds, times
from benchmarks.scaling import TRAIN, seconds_per_step
from benchmarks.settings import Settings

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
        step = seconds_per_step(run_directory, _BATCH)
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
    process = subprocess.Popen(
        [sys.executable, str(TRAIN), *_RUN], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
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
    """Seconds for a synchronous, durable save."""
    start = time.perf_counter()
    save_durably(state, path)
    return time.perf_counter() - start
