"""A process that a sweep (hydra/launcher=joblib) or torchrun has started: it works no longer than they do."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from torch.distributed import is_torchelastic_launched

from src.background import yield_to_training
from src.distributed import PARENT
from src.preemption import STOP_SIGNALS, Stop

SWEEP = "HOLDFAST_SWEEP"
"""Environment variable, set by a sweep and inherited by its jobs, whatever launcher starts them: `process-id`."""

_EVERY = 0.2  # seconds between looks
_IDLE_WATCH = "idle-watch"
_at_work = threading.Event()


def in_sweep() -> bool:
    """Whether this process is just now at a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def is_worker() -> bool:
    """Whether it does so for another process, its parent, which waits for what comes of it."""
    parent = multiprocessing.parent_process()
    return parent is not None and in_sweep() and os.environ.get(SWEEP, "").startswith(f"{parent.pid}-")


def enter_job() -> None:
    """To be called by a worker before each of its jobs."""
    # Between trainings it is the sweep's process that is asked to stop. A worker that ends by itself looks to the
    # launcher like one that has crashed: it then kills the others, whatever they are just saving.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _at_work.set()
    if not any(thread.name == _IDLE_WATCH for thread in threading.enumerate()):
        threading.Thread(target=_end_with_the_sweep, name=_IDLE_WATCH, daemon=True).start()


def leave_job() -> None:
    """To be called after each. From then on the worker ends if its sweep does: of a sweep that was killed, the launcher
    leaves idle workers waiting for minutes, with all that they hold of a GPU."""
    _at_work.clear()


def _end_with_the_sweep() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == parent.pid or _at_work.is_set():
        time.sleep(_EVERY)
    os._exit(0)


def stop_file(directory: Path) -> Path:
    """What is there in the directory of this sweep when it has been asked to stop."""
    return directory / f".stop_{os.environ[SWEEP]}"


def sweep_is_over() -> str | None:
    """Why this worker should stop; None if it should not, or if it is none."""
    if not is_worker():
        return None
    parent = multiprocessing.parent_process()
    assert parent is not None
    if os.getppid() != parent.pid:
        return "the death of its sweep"
    config = HydraConfig.get()
    if stop_file(Path(config.runtime.cwd, config.sweep.dir)).exists():
        return "its sweep, which was asked to stop"
    return None


@contextmanager
def watch_parent(stop: Stop) -> Iterator[None]:
    """While entered, the end of what started this process, a sweep or torchrun, is a request to stop: the same command
    would find the run being written."""

    def reason() -> str | None:
        if is_torchelastic_launched():
            return "the death of torchrun" if os.getppid() != PARENT else None
        return sweep_is_over()

    if not is_worker() and not is_torchelastic_launched():
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_look, args=(stop, done, reason), name="parent-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _look(stop: Stop, done: threading.Event, reason_to_stop: Callable[[], str | None]) -> None:
    yield_to_training()
    while not done.wait(_EVERY):
        if reason := reason_to_stop():
            stop.request(reason)
            return
