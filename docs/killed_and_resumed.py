"""Draw docs/killed_and_resumed.png: one run left alone, the same run killed again and again, laid over each other.

    make figure

Both are real runs of train.py; the kills are SIGKILL. Exits with an error if the curves differ in a single bit.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS = ["model=small_cnn", "optimizer=adamw", "optimizer.lr=0.005", "trainer.epochs=12", "trainer.log_every=1"]
SETTINGS += ["checkpoint.every=10", "run=curve"]
KILLS = 5


def start(directory: Path) -> subprocess.Popen[bytes]:
    """One process of the run, with its outputs/ in `directory`."""
    command = [sys.executable, str(REPOSITORY / "train.py"), *SETTINGS]
    return subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL)


def losses(directory: Path) -> list[tuple[int, float]]:
    """The training loss as TensorBoard shows it."""
    events = EventAccumulator(str(directory / "outputs/curve/tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name[5:]) for path in directory.glob("outputs/curve/checkpoints/step_????????")), default=0)


def main() -> None:
    """Run, kill, compare, draw."""
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        alone, killed = Path(one), Path(other)
        if start(alone).wait():
            sys.exit("error: the uninterrupted run failed")
        steps = losses(alone)[-1][0]
        resumed_at = []
        for target in sorted(chance.sample(range(steps // 10, steps * 9 // 10), KILLS)):
            process = start(killed)
            while newest_step(killed) < target and process.poll() is None:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                resumed_at.append(newest_step(killed))
        if start(killed).wait():
            sys.exit("error: the killed run did not come to its end")
        left_alone, resumed = losses(alone), losses(killed)
    if left_alone != resumed:
        sys.exit("error: the curves differ")

    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    axes.plot(*zip(*left_alone, strict=True), color="#9ecae1", linewidth=5, label="left alone")
    label = f"killed {len(resumed_at)} times (kill -9), resumed"
    axes.plot(*zip(*resumed, strict=True), color="#08306b", linewidth=1, label=label)
    for index, step in enumerate(resumed_at):
        axes.axvline(step, color="#d62728", linestyle=":", linewidth=1, label=None if index else "resumed from here")
    axes.set(xlabel="optimizer step", ylabel="training loss", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    picture = REPOSITORY / "docs/killed_and_resumed.png"
    figure.savefig(picture, dpi=120)
    print(f"{len(resumed)} points, {len(resumed_at)} kills, differences: none; drawn to {os.path.relpath(picture)}")


if __name__ == "__main__":
    main()
