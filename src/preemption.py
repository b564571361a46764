"""Being asked to stop: the loop finishes its step, saves, and ends; nothing is lost."""

import os
import signal
import threading
from types import FrameType
from typing import Self


class Stopped(BaseException):
    """Training has ended early, after a save, because a signal asked for it. No error, so no Exception."""

    def __init__(self, signal_number: int, global_step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} after step {global_step}, which is saved; "
            "run the same command again to go on"
        )
        self.exit_code = 128 + signal_number


class StopSignals:
    """While entered, SIGINT (^C) and SIGTERM only set `requested`; the loop looks at it after each step.

    Python's own KeyboardInterrupt is no way to stop a training: it is raised wherever the interpreter
    happens to be, and where that is a finalizer or a callback from C it is printed and forgotten.
    A second ^C ends the process at once, as an unhandled one would; the last commit stays whole.
    """

    requested: int | None = None
    """The number of the signal that came, if one did."""

    def __enter__(self) -> Self:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # python allows it nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = number
