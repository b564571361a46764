"""Being asked to stop: training comes to a point where nothing is half-done, saves, and ends; nothing is lost."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Self, TypeVar

from src.distributed import ALONE, World

log = logging.getLogger(__name__)

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers and people send: SIGTERM by default, SIGUSR1 and SIGUSR2 by Slurm's --signal, SIGINT by ^C."""


_ONE_REQUEST = 0.5  # seconds: one ^C may arrive twice, from the terminal and from a parent that passes it on


class Interrupted(BaseException):
    """Raised in the loop where it may be left at once. No error, so no Exception."""


class Stopped(BaseException):
    """Training has ended early, after a save, because it was asked to. No error, so no Exception."""

    def __init__(self, signals: Sequence[int], reason: str, global_step: int) -> None:
        """
        Args:
            signals: The numbers of all that came, the first one first.
        """
        super().__init__(
            f"stopped by {reason} after step {global_step}, which is saved; run the same command again to go on"
        )
        self.exit_code = 128 + signals[0]
        self._signals = signals
        self._by_signal = reason == signal.Signals(signals[0]).name

    def hand_on(self) -> None:
        """Raise the signals again for whoever handled them before training began: a scheduler's handler that queues the
        job anew, say. Python's own handlers would only end the process, which its caller does anyway."""
        for number in self._signals:
            handler = signal.getsignal(number)
            if callable(handler) and handler is not signal.default_int_handler:
                signal.raise_signal(number)
        if self._signals[0] == signal.SIGTERM and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            if not self._by_signal:  # but by a notice that Slurm knows nothing of
                signal.raise_signal(signal.SIGUSR2)  # has submitit queue the job anew
                return
            # So begins the grace of a job that is preempted. One that ends by itself in it is not queued anew; one that
            # waits until Slurm ends it is, or is told by another signal to see to that itself.
            signal.pause()


class Stop:
    """A request to stop, by a signal or by whoever calls `request`. Signals are heeded while it is entered.

    The loop asks `check` after each step. Where it may wait for long without changing anything (for data, for an
    evaluation), it can be left in the middle: there, `leaving_allowed` has the signal's handler raise.

    Python's own KeyboardInterrupt is no way to stop a training: it is raised wherever the interpreter happens to be,
    and where that is a finalizer or a callback from C it is printed and forgotten. Here that costs nothing but the
    time until the next `check`.

    Of several ranks all stop after the same step, the one after that in which one of them was asked, or after the same
    batch of an evaluation. A rank that left by itself would have the others wait for it.
    """

    def __init__(self, grace: float = 60.0, world: World = ALONE) -> None:
        """
        Args:
            grace: Seconds from the first signal after which a loop that hangs in a step is given up, and after which
                nothing is uploaded any more.
            world: The ranks that stop together.
        """
        self.reason = ""
        self._grace = grace
        self._world = world
        self._signals: dict[int, None] = {}  # a set in order, which two threads may add to at once
        self._deadline = float("inf")
        self._may_leave = False
        self._out_of_the_loop = threading.Event()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # python allows it nowhere else
            # Python runs a handler when its main thread gets to it. In a step that hangs in C it never does, so a
            # thread is told, too.
            self._bell, ring = socket.socketpair()
            ring.setblocking(False)
            self._ring = ring
            self._previous_bell = signal.set_wakeup_fd(ring.fileno(), warn_on_full_buffer=False)
            self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
            self._watch = threading.Thread(target=self._listen, name="stop-signals", daemon=True)
            self._watch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._out_of_the_loop.set()
        if self._previous:
            for number, handler in self._previous.items():
                if handler is not None:  # which stands for one that is none of Python's
                    signal.signal(number, handler)  # type: ignore[arg-type]
            signal.set_wakeup_fd(self._previous_bell)
            self._previous = {}
            self._ring.close()  # which ends the thread
            self._watch.join()
            self._bell.close()

    @property
    def signals(self) -> list[int]:
        """The numbers of all that came, each once, the first one first."""
        return list(self._signals)

    @property
    def requested(self) -> int | None:
        """The number of the signal that came first, if one did."""
        return next(iter(self.signals), None)

    def request(self, reason: str) -> None:
        """Ask from another thread, as SIGTERM would."""
        self.reason = self.reason or reason
        if self._previous:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._note(signal.SIGTERM)

    def check(self) -> None:
        """To be called between two steps, by all ranks; nearly free.

        Raises:
            Interrupted: it has been asked to stop, or another rank has.
        """
        number = self._world.agree(self.requested or 0)
        if number:
            self._note(number)
            raise Interrupted

    @contextmanager
    def leaving_allowed(self) -> Iterator[None]:
        """While entered, nothing changes that is part of a checkpoint, so it may be left at any moment.

        Raises:
            Interrupted: it has been asked to stop, before or in the meantime.
        """
        if self._world.size > 1:
            yield
            return
        self._may_leave = True
        try:
            self.check()
            yield
        finally:
            self._may_leave = False

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """The items; waiting for one may be left at any moment.

        Raises:
            Interrupted: it has been asked to stop.
        """
        iterator = iter(items)
        while True:
            self.check()
            with self.leaving_allowed():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def together(self, items: Iterable[T]) -> Iterator[T]:
        """The items, as many on each rank; between two of them all ranks may leave.

        Raises:
            Interrupted: one of several ranks has been asked to stop.
        """
        for item in items:
            if self._world.size > 1:
                self.check()
            yield item

    def settle(self) -> None:
        """To be called by all ranks at the end: have all know whether one has been asked."""
        for _ in range(2):  # what is agreed is what was so one call ago
            if number := self._world.agree(self.requested or 0):
                self._note(number)

    def heeded(self) -> None:
        """The loop has been left: there is nothing any more that could hang in a step."""
        self._out_of_the_loop.set()

    def seconds_left(self) -> float:
        """Of the grace, if it has been asked to stop; else infinitely many."""
        return max(0.0, self._deadline - time.monotonic())

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._note(number)
        if self._may_leave:
            self._may_leave = False
            raise Interrupted

    def _note(self, number: int) -> None:
        if self.requested is None:
            self._deadline = time.monotonic() + self._grace
            self.reason = self.reason or signal.Signals(number).name
        self._signals.setdefault(number)

    def _listen(self) -> None:
        first: float | None = None
        while numbers := self._wait_for_signals(until=None if first is None else self._deadline):
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._note(number)
                    first = first or time.monotonic()
                    if number == signal.SIGINT and time.monotonic() - first > _ONE_REQUEST:
                        print("stopped at once; what has been saved is whole", file=sys.stderr, flush=True)
                        os._exit(128 + number)

    def _wait_for_signals(self, until: float | None) -> bytes:
        while True:
            left = None if until is None or self._out_of_the_loop.is_set() else max(0.0, until - time.monotonic())
            self._bell.settimeout(left)
            with suppress(TimeoutError, BlockingIOError):
                return self._bell.recv(64)
            if not self._out_of_the_loop.is_set():
                self._give_up()

    def _give_up(self) -> None:
        assert self.requested is not None
        status = 128 + self.requested
        # The main thread may hang with the log in its hands.
        threading.Timer(2.0, os._exit, (status,)).start()
        log.error(
            "asked to stop by %s, training still hangs in a step after trainer.grace=%g s: it is given up, and goes "
            "back to the newest checkpoint when the same command is run again",
            self.reason,
            self._grace,
        )
        logging.shutdown()
        os._exit(status)
