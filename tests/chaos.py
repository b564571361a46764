"""Everything at once: a real run with a real S3 server, disturbed at random, must end like one left alone.

    make chaos ARGS="--kills 200 --seed 0"

What is done, and in which order, follows from the seed; at which instant it hits, from the machine.
"""

import argparse
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from src.checkpoint.catalog import Catalog, verify
from src.checkpoint.manifest import CorruptCheckpoint
from src.goodput import account_of, lives_of
from tests.conftest import REPOSITORY, TINY, Training
from tests.store import KEY, SECRET, Store, on_s3, steps_there
from tests.test_resume import differences, state

_STEPS_PER_EPOCH = 13  # of TINY
_STATE_BYTES = 38_000  # likewise
_BUCKET = "chaos"
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Report:
    """What was done, and what came of it."""

    faults: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    resumes: int = 0
    unreadable: list[str] = field(default_factory=list)
    """Newest checkpoints that did not verify, though nobody had damaged them."""
    unexpected: list[str] = field(default_factory=list)
    """Processes that ended otherwise than they should."""
    different: list[str] = field(default_factory=list)
    """Where the final state differs from that of the undisturbed run."""
    goodput: str = ""
    steps: int = 0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Nothing was lost."""
        return not (self.unreadable or self.unexpected or self.different)

    def __str__(self) -> str:
        lines = [f"{count:5} x {fault}" for fault, count in sorted(self.faults.items())]
        lines += [
            f"{self.lives:5} lives, {self.resumes} of them resumed, {self.steps} steps, {self.seconds:.0f} s",
            f"{len(self.unreadable):5} unreadable newest checkpoints {self.unreadable or ''}",
            f"{len(self.unexpected):5} processes that ended otherwise than they should",
            *self.unexpected,
            f"{len(self.different):5} differences from the undisturbed run {self.different or ''}",
            f"goodput {self.goodput}",
            "nothing was lost" if self.good else "FAILED",
        ]
        return "\n".join(lines)


class Chaos:
    """One disturbed run."""

    def __init__(self, directory: Path, kills: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.kills = kills
        self.report = Report()
        self.store = Store(directory / "store")
        self.training = Training(directory, [])
        # A schedule would depend on the number of epochs, which is only known when all is done.
        self.command = (*TINY, "scheduler=none", "checkpoint.every=4", "checkpoint.retry_after=0.1")
        self.epochs = 1_000_000
        self.damaged: set[str] = set()  # by us, until a life has come as far as replacing it

    @property
    def run(self) -> Path:
        return self.training.run

    def go(self) -> Report:
        """Train disturbed, then undisturbed, and compare."""
        began = time.monotonic()
        self.store.client().create_bucket(Bucket=_BUCKET)
        in_life = {
            self.kill_while_starting: 10,
            self.kill_after_some_commits: 30,
            self.kill_inside_a_save: 20,
            self.ask_to_stop: 8,
            self.fill_the_disk: 3,
        }
        while self.report.faults["SIGKILL"] < self.kills:
            self.disturb_the_dead()
            fault = self.chance.choices(list(in_life), list(in_life.values()))[0]
            fault()
            self.look_at_the_newest()
        self.finish()
        self.report.seconds = time.monotonic() - began
        return self.report

    def finish(self) -> None:
        """Let it come to its end, and compare."""
        reached = max([0, *Catalog(self.training.checkpoints).by_step(), *steps_there(self.store, _BUCKET)])
        self.epochs = reached // _STEPS_PER_EPOCH + 2
        process = self.start()
        process.wait(timeout=600)
        self.note_life(process.returncode, expected=(0,))
        whole = self.training.finish(self.training.start(*self.command, f"trainer.epochs={self.epochs}", "run=whole"))
        assert whole.status == 0, whole.output
        self.report.steps = self.epochs * _STEPS_PER_EPOCH
        left_alone = state(self.report.steps, self.training.directory / "outputs/whole")
        self.report.different = differences(left_alone, state(self.report.steps, self.run))
        self.report.goodput = str(account_of(lives_of(self.run)))

    # --- what happens to a process ---

    def kill_while_starting(self) -> None:
        process = self.start()
        self.wait(process, self.chance.uniform(0.2, 5.0))
        self.end(process, signal.SIGKILL, "SIGKILL", (-signal.SIGKILL,))

    def kill_after_some_commits(self) -> None:
        process = self.start()
        self.disturb_the_living(process)
        self.until_commits(process, self.chance.randrange(1, 4))
        self.wait(process, self.chance.uniform(0, 0.05))
        self.end(process, signal.SIGKILL, "SIGKILL", (-signal.SIGKILL,))

    def kill_inside_a_save(self) -> None:
        process = self.start()
        self.until_commits(process, self.chance.randrange(0, 3))
        self.until(process, lambda: any(self.training.checkpoints.glob(".tmp_step_*")))
        self.end(process, signal.SIGKILL, "SIGKILL", (-signal.SIGKILL,))

    def ask_to_stop(self) -> None:
        number = self.chance.choice(_STOPS)
        process = self.start()
        self.until_commits(process, self.chance.randrange(0, 3))
        # Where it came before training began, nothing was there to be saved.
        self.end(process, number, "asked to stop", (128 + number, -number))

    def fill_the_disk(self) -> None:
        half = _STATE_BYTES // 2
        process = self.start(preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (half, half)))
        process.wait(timeout=120)
        self.report.faults["full disk"] += 1
        self.note_life(process.returncode, expected=(2, 3))

    # --- what happens beside it ---

    def disturb_the_living(self, process: subprocess.Popen[str]) -> None:
        what = self.chance.choices(["nothing", "SIGSTOP", "server frozen", "server restarted"], [14, 3, 3, 1])[0]
        if what == "nothing":
            return
        self.until_commits(process, 1)
        self.report.faults[what] += 1
        if what == "SIGSTOP":
            process.send_signal(signal.SIGSTOP)
            time.sleep(self.chance.uniform(0.1, 1.0))
            process.send_signal(signal.SIGCONT)
        elif what == "server frozen":
            self.store.freeze()
            self.wait(process, self.chance.uniform(0.1, 2.0))
            self.store.thaw()
        else:
            self.store.kill()
            self.store.start()

    def disturb_the_dead(self) -> None:
        here = Catalog(self.training.checkpoints).paths()
        there = steps_there(self.store, _BUCKET)
        what = self.chance.choices(
            ["nothing", "damage here", "damage in the bucket", "disk lost"],
            [14, 2 if len(here) > 1 else 0, 1 if here and len(there) > 1 else 0, 1 if there else 0],
        )[0]
        if what == "damage here":
            self.damage(here[-1])
        elif what == "damage in the bucket":
            key = f"holdfast/tiny/checkpoints/step_{there[-1]:08d}/state.pt"
            self.store.write(_BUCKET, key, self.store.read(_BUCKET, key)[:-100])
        elif what == "disk lost":
            shutil.rmtree(self.run)
        if what != "nothing":
            self.report.faults[what] += 1

    def damage(self, checkpoint: Path) -> None:
        self.damaged.add(checkpoint.name)
        path = checkpoint / self.chance.choice(["state.pt", "manifest.json"])
        how = self.chance.choice(["bit", "cut", "gone"])
        content = bytearray(path.read_bytes())
        if how == "bit":
            content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
        path.write_bytes(bytes(content[: len(content) // 2] if how == "cut" else content))
        if how == "gone":
            path.unlink()

    # --- how ---

    def start(self, **options: Callable[[], None]) -> subprocess.Popen[str]:
        where = on_s3(self.store, _BUCKET)
        # Into a file: a pipe that nobody reads would hold it up.
        self.output = (self.training.directory / "output").open("w+", encoding="utf-8")
        process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "train.py"), *self.command, *where, f"trainer.epochs={self.epochs}"],
            cwd=self.training.directory,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            **options,  # type: ignore[call-overload]
        )
        return process

    def until(self, process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while process.poll() is None and not condition():
            if time.monotonic() >= deadline:
                self.report.unexpected.append("--- it hangs: neither ended nor came to what was waited for")
                return
            time.sleep(0.0005)

    def until_commits(self, process: subprocess.Popen[str], count: int) -> None:
        seen = set(self.training.checkpoints.glob("step_????????"))
        self.until(process, lambda: len(set(self.training.checkpoints.glob("step_????????")) - seen) >= count)

    def wait(self, process: subprocess.Popen[str], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self.until(process, lambda: time.monotonic() >= deadline)

    def end(self, process: subprocess.Popen[str], number: int, fault: str, expected: Sequence[int]) -> None:
        if process.poll() is None:
            process.send_signal(number)
            self.report.faults[fault] += 1
        process.wait(timeout=120)
        self.note_life(process.returncode, (*expected, 0))

    def note_life(self, status: int, expected: Sequence[int]) -> None:
        self.output.seek(0)
        output = self.output.read()
        self.output.close()
        self.report.lives += 1
        self.report.resumes += "resumed from" in output
        if status not in expected or re.search(r"^Traceback", output, re.MULTILINE):
            self.report.unexpected.append(f"--- status {status}:\n{output[-3000:]}")

    def look_at_the_newest(self) -> None:
        for path in Catalog(self.training.checkpoints).paths()[-1:]:
            try:
                verify(path)
            except CorruptCheckpoint as error:
                if path.name not in self.damaged:  # else the last life was killed before it came to look
                    self.report.unreadable.append(f"{path.name}: {error}")
            else:
                self.damaged.discard(path.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if nothing was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs; other faults come on top (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started by `&`, it would be ignored, also by children
    os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(Path(folder), options.kills, options.seed)
        try:
            report = chaos.go()
        finally:
            chaos.store.kill()
    print(report)
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
