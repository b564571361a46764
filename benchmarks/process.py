"""Processes of their own for what is measured: savers must not get into each other's way."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

_LONGEST = 900.0  # seconds without a word


class SaverFailed(Exception):
    """It raised, or its process ended or hangs."""


@dataclass(frozen=True)
class Child:
    """A running process."""

    connection: Connection
    process: psutil.Process

    def send(self, message: Any) -> None:
        """Say something to it.

        Raises:
            SaverFailed: it is gone.
        """
        try:
            self.connection.send(message)
        except ConnectionError:
            raise SaverFailed("its process ended") from None

    def receive(self, meanwhile: Callable[[], None] = lambda: None, interval: float = _LONGEST) -> Any:
        """Wait for what it says.

        Args:
            meanwhile: What to do every `interval` seconds until then.

        Raises:
            SaverFailed: it has failed, with the reason in one line.
        """
        give_up = time.monotonic() + _LONGEST
        try:
            while not self.connection.poll(interval):
                if time.monotonic() >= give_up:
                    raise SaverFailed(f"no answer for {_LONGEST:.0f} s")
                meanwhile()
            message = self.connection.recv()
        except (EOFError, ConnectionError):
            raise SaverFailed("its process ended") from None
        if isinstance(message, SaverFailed):
            raise message
        return message


@contextmanager
def fresh_process(work: Callable[..., None], *arguments: Any) -> Iterator[Child]:
    """Run `work(*arguments, connection)` in a new process. Both it and what it starts are gone at the end."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_run, args=(work, arguments, there))
    try:
        process.start()
        there.close()
        yield Child(here, psutil.Process(process.pid))
        here.close()
        process.join(10)  # a peer's process may keep it from ending
    finally:
        here.close()
        if process.pid is not None:
            _end(process, process.pid)


def explain(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def _end(process: BaseProcess, group: int) -> None:
    process.kill()  # by itself, too: it may not have come as far as its group
    with suppress(ProcessLookupError):  # nobody is left
        for _ in range(100):
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.05)
            process.join(0)
    process.join()


def _run(work: Callable[..., None], arguments: tuple[Any, ...], connection: Connection) -> None:
    os.setpgrp()  # what it starts can be found by the group, also after it has died itself
    try:
        work(*arguments, connection)
    except Exception as error:
        with suppress(OSError):  # nobody listens any more
            connection.send(SaverFailed(explain(error)))
