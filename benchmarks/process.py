"""Processes of their own for what is measured: savers must not get into each other's way."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
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
        """Say something to it."""
        self.connection.send(message)

    def receive(self) -> Any:
        """Wait for what it says.

        Raises:
            SaverFailed: it has failed, with the reason in one line.
        """
        try:
            if not self.connection.poll(_LONGEST):
                raise SaverFailed(f"no answer for {_LONGEST:.0f} s")
            message = self.connection.recv()
        except EOFError:
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
    process.start()
    there.close()
    observed = psutil.Process(process.pid)
    try:
        yield Child(here, observed)
        here.close()
        process.join(10)
    finally:
        here.close()
        with suppress(psutil.Error):  # a peer's process may keep it from ending
            for child in [*observed.children(recursive=True), observed]:
                child.kill()
        process.join()


def explain(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def _run(work: Callable[..., None], arguments: tuple[Any, ...], connection: Connection) -> None:
    try:
        work(*arguments, connection)
    except Exception as error:
        with suppress(OSError):  # nobody listens any more
            connection.send(SaverFailed(explain(error)))
