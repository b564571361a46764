"""Where the time of a run has gone, over all its lives: training, or what kills and checkpoints cost.

(Google calls the share of useful time goodput: https://github.com/AI-Hypercomputer/ml-goodput-measurement.)
"""

import json
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from src.background import yield_to_training

_FOLDER = "goodput"
_EVERY = 1.0  # seconds between entries: what a kill makes the account forget

_accounted_until = 0.0  # a sweep may have several runs in one process, one after the other


@dataclass
class Life:
    """One process's share of a run. Times in seconds."""

    began: float
    """When the process started, on the clock of `time.time()`."""
    starting: float
    """From there to the first step: imports, data, finding and loading the checkpoint."""
    first_step: int
    """Optimizer steps taken when it began."""
    last_step: int
    training: float = 0.0
    """From the first step on, all that follows included."""
    stalled: float = 0.0
    """For how much of that checkpoints held it up."""


@dataclass(frozen=True)
class Goodput:
    """The account of all lives of a run. Times in seconds."""

    lives: int
    total: float
    """What all processes took."""
    starting: float
    stalled: float
    repeated_steps: int
    """Steps that a kill made be taken again."""
    repeating: float
    """What those took."""

    @property
    def share(self) -> float:
        """Of the time, spent on training that was of use."""
        return (self.total - self.starting - self.stalled - self.repeating) / self.total if self.total else math.nan

    def __str__(self) -> str:
        lives = "1 life" if self.lives == 1 else f"{self.lives} lives"
        return (
            f"{self.share:.1%} of {_duration(self.total)} in {lives}; the rest: starting {_duration(self.starting)}, "
            f"held up by checkpoints {_duration(self.stalled)}, {self.repeated_steps} steps repeated "
            f"{_duration(self.repeating)}"
        )


class Ledger:
    """Keeps this process's entry in a run's account, so that a kill costs no more than its last second."""

    def __init__(self, directory: Path, global_step: int, stalled: Callable[[], float]) -> None:
        """
        Args:
            directory: The run directory.
            global_step: Where this process starts.
            stalled: For how many seconds checkpoints have held it up so far.
        """
        now = time.time()
        starting = min(_age_of_this_process(), now - _accounted_until)
        self.life = Life(began=now - starting, starting=starting, first_step=global_step, last_step=global_step)
        self._start = time.perf_counter()
        self._stalled = stalled
        self._folder = directory / _FOLDER
        self._file = self._folder / f"{int(self.life.began * 1000)}-{os.getpid()}.json"
        self._earlier = lives_of(directory)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="goodput", daemon=True)
        self._thread.start()

    def account(self) -> Goodput:
        """Of the run, up to now."""
        self._update()
        return account_of([*self._earlier, self.life])

    def close(self) -> None:
        """Make the last entry. Safe to call twice."""
        global _accounted_until
        self._over.set()
        self._thread.join()
        _accounted_until = time.time()

    def _update(self) -> None:
        self.life.training, self.life.stalled = time.perf_counter() - self._start, self._stalled()

    def _keep(self) -> None:
        yield_to_training()
        over = False
        while True:
            self._update()
            temporary = self._file.with_suffix(".tmp")
            with suppress(OSError):  # an account is not worth a run
                self._folder.mkdir(exist_ok=True)
                temporary.write_text(json.dumps(asdict(self.life)) + "\n", encoding="utf-8")
                temporary.replace(self._file)
            if over:
                return
            over = self._over.wait(_EVERY)


def lives_of(directory: Path) -> list[Life]:
    """What the processes of a run have entered, oldest first. Entries that are no good are left out."""
    lives = []
    for path in (directory / _FOLDER).glob("*.json"):
        with suppress(OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            lives.append(_parse(json.loads(path.read_text(encoding="utf-8"))))
    return sorted(lives, key=lambda life: life.began)


def account_of(lives: Sequence[Life]) -> Goodput:
    """Add up lives, oldest first."""
    repeated, repeating, reached = 0, 0.0, 0
    for life in lives:
        steps = life.last_step - life.first_step
        again = min(steps, max(0, reached - life.first_step))
        if again:
            repeated += again
            repeating += again * (life.training - life.stalled) / steps
        reached = max(reached, life.last_step)
    return Goodput(
        lives=len(lives),
        total=sum(life.starting + life.training for life in lives),
        starting=sum(life.starting for life in lives),
        stalled=sum(life.stalled for life in lives),
        repeated_steps=repeated,
        repeating=repeating,
    )


def _parse(entry: Any) -> Life:
    values = {field.name: entry[field.name] for field in fields(Life)}
    if any(isinstance(value, bool) or not math.isfinite(value) or value < 0 for value in values.values()):
        raise ValueError
    return Life(**values)


def _age_of_this_process() -> float:
    """Seconds since it was started; 0 where the system does not tell."""
    try:
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]  # proc(5): starttime, in ticks
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
