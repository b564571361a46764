"""A DataLoader whose epoch can start at any sample, and whose samples do not depend on who loads them.

Order and augmentation are functions of (seed, epoch, sample), never of the loader's history: resuming
needs two numbers, and costs nothing however far into the epoch it is.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from src.errors import WorkerLost
from src.preemption import STOP_SIGNALS
from src.rng import cpu_rng_preserved, derive_seed, seed_cpu

Key = tuple[int, int]  # epoch, index of the sample in the data set; ~index of one that only fills a place
_DYING = 1.0  # seconds within which the end of a process is known, once its connection is closed
_NO_LABEL = -100  # what torch's cross_entropy leaves out

_lifelines: WeakSet[Connection] = WeakSet()


@atexit.register
def _end_workers() -> None:
    # multiprocessing's own exit handler, registered before this one and so run after it, sends the
    # workers SIGTERM, which they ignore, and then waits for them.
    for lifeline in list(_lifelines):
        lifeline.close()


class EpochSampler(Sampler[list[Key]]):
    """Yields this rank's share of the batches of one epoch, from the `start`-th sample of its order on.

    Order and batches do not depend on the number of ranks. A rank for which a batch has no sample gets one that does
    not count: all ranks take the same number of steps.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[list[Key]]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
            order = torch.randperm(self.size, generator=generator).tolist()
        else:
            order = list(range(self.size))
        for first in range(self.start, self.size, self.batch_size):
            batch = order[first : first + self.batch_size]
            yield [(self.epoch, index) for index in batch[self.rank :: self.world_size] or [~batch[0]]]

    def __len__(self) -> int:
        return -(-(self.size - self.start) // self.batch_size)


class SeededSamples(Dataset[Any]):
    """Fetches each sample with the generators seeded by (seed, epoch, index)."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        if get_worker_info() is not None:
            return [self._fetch(key) for key in keys]
        with cpu_rng_preserved():  # without workers this is the process whose generators train the model
            return [self._fetch(key) for key in keys]

    def _fetch(self, key: Key) -> Any:
        epoch, index = key
        if index < 0:
            return self._fetch((epoch, ~index))[0], _NO_LABEL
        seed_cpu(derive_seed(self.seed, epoch, index))
        return self.dataset[index]


class ResumableLoader:
    """Batches of a data set, epoch by epoch; of each, one rank's share."""

    def __init__(
        self,
        dataset: Dataset[Any],
        size: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        workers: int,
        pin: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            size: Number of samples in `dataset`.
            batch_size: Samples per batch, of all ranks together; the last one of an epoch may be smaller, none is
                dropped.
            workers: Processes that load; 0 loads in this one. Batches are the same either way.
            pin: Collate into pinned memory, for asynchronous copies to a GPU.
        """
        self.size = size
        self._sampler = EpochSampler(size, batch_size, seed, shuffle, rank, world_size)
        self._workers: set[BaseProcess] = set()
        worker_options: dict[str, Any] = {}
        if workers > 0:
            _start_fork_server()
            # Not forked from this process: it has threads, perhaps a CUDA context, and holds the run's lock.
            context = multiprocessing.get_context("forkserver")
            # Open for as long as this process lives; workers see it close, however this process ends.
            reader, self._lifeline = context.Pipe(duplex=False)
            _lifelines.add(self._lifeline)
            worker_options = {
                "multiprocessing_context": context,
                "persistent_workers": True,
                "worker_init_fn": partial(_start_worker, reader),
            }
        self._loader = DataLoader(
            SeededSamples(dataset, seed),
            batch_sampler=self._sampler,
            num_workers=workers,
            collate_fn=default_collate,
            pin_memory=pin,
            generator=torch.Generator(),  # its own, or each epoch would draw a seed from the global one
            **worker_options,
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch, in that epoch's order, without its first `start` samples.

        Raises:
            WorkerLost: a process that loads has ended by itself.
        """
        self._sampler.epoch, self._sampler.start = epoch, start
        try:
            others = set(multiprocessing.active_children())
            batches = iter(self._loader)  # in the first epoch this starts them
            self._workers |= set(multiprocessing.active_children()) - others
            yield from batches  # a generator also keeps this object, and with it the lifeline, alive
        except (RuntimeError, OSError, EOFError) as error:
            # What it is depends on what the worker was just doing.
            if not self._workers or not wait([worker.sentinel for worker in self._workers], timeout=_DYING):
                raise
            raise WorkerLost(
                "a process that loads data has died: most often the system kills one because memory ran out. Run the "
                "same command again to go on, perhaps with fewer of them (trainer.workers)"
            ) from error


def _start_fork_server() -> None:
    # A scheduler's SIGTERM, or torchrun's, reaches the whole process group. It would end the server, and with it the
    # workers, without which several ranks do not come to their last step. It inherits what is blocked.
    resource_tracker.ensure_running()  # first, because starting it lifts the block
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start_worker(lifeline: Connection, _worker_id: int) -> None:
    # ^C and a scheduler's SIGTERM reach the whole process group, but only the main process decides
    # what they mean: it still needs its workers to finish the step.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    # torch's own watchdog looks at the parent process, which here is the fork server. It outlives a
    # killed main process, and so would the workers.
    def exit_with_main_process() -> None:
        lifeline.poll(None)
        os._exit(0)

    # A main process that ends in the middle of a handover says itself why it does.
    show = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, EOFError | OSError) else show(kind, *rest)
    threading.Thread(target=exit_with_main_process, daemon=True).start()
