"""Threads that work beside training, and give way to it."""

import os
import sys
import threading
from contextlib import suppress

_NICENESS = 15  # training goes first; a thread that now and then holds the GIL still always gets somewhere


def yield_to_training() -> None:
    """Lower the priority of the calling thread."""
    if sys.platform != "linux":  # elsewhere niceness is the whole process's
        return
    with suppress(OSError):  # a container may forbid it
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
