"""Invariant 4, the data's part: an epoch can start at any sample, and samples are the same whoever loads them."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from src.data.loader import EpochSampler, ResumableLoader
from src.errors import WorkerLost
from tests.conftest import REPOSITORY


class Noisy(Dataset[Any]):
    """Each sample is its index, and noise from all three generators."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, random.random(), np.random.rand(), torch.rand(()).item()


def loader(workers: int = 0, batch_size: int = 8, seed: int = 0) -> ResumableLoader:
    return ResumableLoader(Noisy(), 50, batch_size, seed=seed, shuffle=True, workers=workers, pin=False)


def samples(batches: Any) -> list[tuple[float, ...]]:
    return [row for batch in batches for row in zip(*(column.tolist() for column in batch), strict=True)]


def test_an_epoch_has_every_sample_once_and_drops_none() -> None:
    assert sorted(index for index, *_ in samples(loader().epoch(0))) == list(range(50))


def test_epochs_and_seeds_differ_in_order_and_augmentation() -> None:
    epochs = [samples(loader(seed=seed).epoch(epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(index for index, *_ in epoch) for epoch in epochs}) == 4
    assert len({row[1:] for epoch in epochs for row in epoch}) == 200


@pytest.mark.parametrize("start", [0, 8, 40, 48, 50, 13])
def test_invariant_4_an_epoch_goes_on_at_any_sample(start: int) -> None:
    assert samples(loader().epoch(3, start)) == samples(loader().epoch(3))[start:]


def test_invariant_4_with_another_batch_size_no_sample_is_repeated_or_skipped() -> None:
    whole = samples(loader().epoch(0))
    assert samples(loader(batch_size=8).epoch(0))[:24] + samples(loader(batch_size=5).epoch(0, 24)) == whole


def test_invariant_4_batches_do_not_depend_on_the_number_of_workers() -> None:
    alone, helped = loader(workers=0), loader(workers=2)
    for epoch, start in ((0, 0), (1, 16), (1, 16), (2, 0)):  # the same workers go from epoch to epoch
        assert samples(alone.epoch(epoch, start)) == samples(helped.epoch(epoch, start))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_generators_that_train_the_model_alone(workers: int) -> None:
    before = torch.get_rng_state(), random.getstate(), list(np.random.get_state())
    samples(loader(workers).epoch(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert str(list(np.random.get_state())) == str(before[2])


def test_a_start_deep_in_a_huge_epoch_reads_nothing_before_it() -> None:
    read = []

    class Counted(Noisy):
        def __getitem__(self, index: int) -> tuple[int, float, float, float]:
            read.append(index)
            return super().__getitem__(index)

    batches = ResumableLoader(Counted(), 50, 5, seed=0, shuffle=True, workers=0, pin=False)
    next(iter(batches.epoch(0, start=45)))
    assert len(read) == 5


def test_the_sampler_knows_how_many_batches_are_left() -> None:
    sampler = EpochSampler(50, 8, seed=0, shuffle=True)
    for start in (0, 8, 41, 42, 50):
        sampler.start = start
        assert len(sampler) == len(list(sampler))


def test_workers_end_with_a_main_process_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, multiprocessing\n"
        "from tests.test_loader import loader\n"
        "if __name__ == '__main__':\n"
        "    batches = loader(workers=2).epoch(0)\n"
        "    next(batches)\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    input()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    assert all(is_alive(pid) for pid in workers)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "orphaned workers"
        time.sleep(0.05)


def test_workers_ignore_the_signals_that_the_main_process_decides_about() -> None:
    batches = loader(workers=1).epoch(0)
    next(batches)
    for child in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM):
            assert child.pid is not None
            os.kill(child.pid, number)
    assert len(samples(batches)) == 42


def test_nor_does_the_server_that_they_are_forked_from_end(tmp_path: Path) -> None:
    """torchrun and Slurm send SIGTERM to all processes, and the last step still needs its batch."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from multiprocessing import forkserver\n"
        "from src.preemption import STOP_SIGNALS\n"
        "from tests.test_loader import loader, samples\n"
        "if __name__ == '__main__':\n"
        "    loading = loader(workers=1)\n"
        "    for epoch in range(2):\n"
        "        batches = loading.epoch(epoch)\n"
        "        next(batches)\n"
        "        for number in STOP_SIGNALS:\n"
        "            os.kill(forkserver._forkserver._forkserver_pid, number)\n"
        "        assert len(samples(batches)) == 42\n"
        "    assert os.waitpid(forkserver._forkserver._forkserver_pid, os.WNOHANG) == (0, 0)\n"
    )
    subprocess.run([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=True)


@pytest.mark.parametrize("idle", [False, True])
def test_a_worker_that_dies_is_named(idle: bool) -> None:
    others = set(multiprocessing.active_children())
    loading = loader(workers=1)
    batches = loading.epoch(0)
    next(batches)
    if idle:
        samples(batches)
        batches = loading.epoch(1)
    for worker in set(multiprocessing.active_children()) - others:
        worker.kill()
        worker.join()
    with pytest.raises(WorkerLost, match=r"trainer\.workers"):
        samples(batches)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
