"""Work beside training: threads that give way to it, and a bar for those who wait for it."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm

_NICENESS = 15  # training goes first; a thread that now and then holds the GIL still always gets somewhere


def yield_to_training() -> None:
    """Lower the priority of the calling thread."""
    if sys.platform != "linux":  # elsewhere niceness is the whole process's
        return
    with suppress(OSError):  # a container may forbid it
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


@contextmanager
def byte_bar(title: str, total: int | None = None) -> Iterator["tqdm[None]"]:
    """A progress bar in bytes: from the first second on, where there is a terminal, and gone at the end."""
    with tqdm(desc=title, total=total, unit="B", unit_scale=True, delay=1, leave=False, disable=None) as bar:
        yield bar
