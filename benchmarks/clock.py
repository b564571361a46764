"""Seconds that a stretch of training takes, on the host's clock or by the GPU's own events."""

import sys
import time
from typing import Protocol

import torch


class Clock(Protocol):
    """A stopwatch."""

    def start(self) -> None:
        """Begin a stretch, with nothing unfinished from before it."""

    def stop(self) -> float:
        """End it when everything that it started on the device is done. Returns seconds."""


class HostClock:
    """The host's monotonic clock."""

    def start(self) -> None:
        """Begin."""
        self._start = time.perf_counter()

    def stop(self) -> float:
        """End."""
        return time.perf_counter() - self._start


class GpuClock:
    """CUDA events on the stream that trains: also sees copies on other streams that this one has to wait for."""

    def start(self) -> None:
        """Begin, with an empty queue."""
        self._first, self._last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self._first.record()

    def stop(self) -> float:
        """End, and wait for it."""
        self._last.record()
        self._last.synchronize()
        milliseconds: float = self._first.elapsed_time(self._last)
        return milliseconds / 1e3


def clock_of(device: str) -> Clock:
    """The clock to time training steps on `device` with."""
    return GpuClock() if device == "cuda" else HostClock()


def require_device(device: str) -> None:
    """Exit with one line if the device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: torch finds no GPU on this machine")
