"""Saves in the background: what the loop waits for, what it is told, and what stays bounded."""

import errno
import gc
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from src import background, schedules
from src.checkpoint import saver, writer
from src.checkpoint.catalog import Catalog, verify
from src.checkpoint.checkpointer import Checkpointer, SaveReport
from src.checkpoint.cost import CostMeter
from src.checkpoint.finite import weights_are_finite
from src.checkpoint.policy import CheckpointPolicy, EverySteps
from src.errors import CheckpointError
from src.state import TrainState

LIMIT = 30  # seconds that a test waits for another thread before it fails


def new_state(width: int = 8) -> TrainState:
    model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return TrainState(model, optimizer, schedules.constant(optimizer, 1000), GradScaler("cpu", enabled=False))


def train_step(state: TrainState, checkpointer: Checkpointer) -> None:
    """What `Trainer.fit` does in a step, as far as it concerns checkpoints."""
    width = state.model[0].in_features  # type: ignore[index]
    state.optimizer.zero_grad()
    state.model(torch.randn(4, width)).square().sum().backward()
    checkpointer.wait_for_snapshot()
    state.optimizer.step()
    state.scheduler.step()
    state.advance(4)
    checkpointer.step(state)


class SlowDisk:
    """A disk that takes nothing until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.asked = threading.Event(), threading.Event()
        original = writer.write_checkpoint

        def write(*arguments: Any) -> Any:
            self.asked.set()
            assert self.free.wait(LIMIT)
            return original(*arguments)

        monkeypatch.setattr(saver, "write_checkpoint", write)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk(monkeypatch)
    yield disk
    disk.free.set()


Make = Callable[..., Checkpointer]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Checkpointer] = []

    def build(policy: CheckpointPolicy, state: TrainState, **options: Any) -> Checkpointer:
        made.append(Checkpointer(policy, Catalog(tmp_path), {}, {}, **options))
        made[-1].restore(state, "auto", None)
        return made[-1]

    yield build
    for checkpointer in made:
        checkpointer.__exit__(None)


def steps_in(directory: Path) -> list[int]:
    return [int(path.name[5:]) for path in Catalog(directory).paths()]


def test_training_goes_on_while_a_save_is_being_written(make: Make, slow_disk: SlowDisk, tmp_path: Path) -> None:
    state = new_state()
    checkpointer = make(EverySteps(every=5), state)
    for _ in range(9):
        train_step(state, checkpointer)
    assert slow_disk.asked.wait(LIMIT)
    assert state.global_step == 9
    assert steps_in(tmp_path) == []
    slow_disk.free.set()
    checkpointer.wait()
    assert steps_in(tmp_path) == [5]


def test_invariant_3_what_is_written_is_the_state_when_the_save_was_due(
    make: Make, slow_disk: SlowDisk, tmp_path: Path
) -> None:
    state = new_state()
    checkpointer = make(EverySteps(every=2), state)
    for _ in range(2):
        train_step(state, checkpointer)
    expected = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    moment = next(iter(state.optimizer.state.values()))["exp_avg"].clone()
    train_step(state, checkpointer)
    slow_disk.free.set()
    checkpointer.wait()
    saved = torch.load(tmp_path / "step_00000002/state.pt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(torch.equal(saved["model_state_dict"][name], tensor) for name, tensor in expected.items())
    assert torch.equal(saved["optimizer_state_dict"]["state"][0]["exp_avg"], moment)
    assert int(saved["model_state_dict"]["1.num_batches_tracked"]) == 2


def test_invariant_7_one_save_at_a_time_and_the_loop_says_what_it_waits_for(
    make: Make, slow_disk: SlowDisk, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.checkpoint.checkpointer._NOTICEABLE", 0.0)
    state = new_state()
    reports: list[SaveReport] = []
    checkpointer = make(EverySteps(every=2), state, on_saved=reports.append)
    for _ in range(3):
        train_step(state, checkpointer)
    assert slow_disk.asked.wait(LIMIT)
    loop = threading.Thread(target=train_step, args=(state, checkpointer))
    loop.start()
    loop.join(0.2)
    assert loop.is_alive(), "the step that is due waits for the save before it"
    slow_disk.free.set()
    loop.join(LIMIT)
    checkpointer.wait()
    assert steps_in(tmp_path) == [2, 4]
    assert [report.global_step for report in reports] == [2, 4]
    assert reports[1].stall >= 0.1, "the wait is part of what step 4 cost"
    assert "until step 2 was written" in caplog.text
    assert "raise checkpoint.every, or choose checkpoint=budget" in caplog.text


def test_invariant_11_errors_of_the_background_reach_the_loop_and_older_checkpoints_stay(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = new_state()
    checkpointer = make(EverySteps(every=1, max_failures=3, retry_after=0), state)
    train_step(state, checkpointer)
    checkpointer.wait()

    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "write_checkpoint", refuse)
    with pytest.raises(CheckpointError, match=r"No space left on device.*newest checkpoint \(step_00000001\)"):
        for _ in range(1000):
            train_step(state, checkpointer)
    assert "failure 1 of checkpoint.max_failures=3" in caplog.text
    assert "failure 2 of checkpoint.max_failures=3" in caplog.text
    assert steps_in(tmp_path) == [1]


def test_memory_that_runs_out_is_a_failed_save_not_the_end(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = new_state()
    checkpointer = make(EverySteps(every=1, retry_after=0), state)

    def none_left(*arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("src.checkpoint.snapshot.HostMemory.reserve", none_left)
        train_step(state, checkpointer)
    assert "cannot save step 1" in caplog.text
    assert "MemoryError" in caplog.text
    train_step(state, checkpointer)
    checkpointer.wait()
    assert steps_in(tmp_path) == [2]


def test_a_save_that_is_tried_again_is_tried_once_and_holds_nothing_up(
    make: Make, slow_disk: SlowDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = new_state()
    checkpointer = make(EverySteps(every=100, retry_after=0), state)
    slow = saver.write_checkpoint  # type: ignore[attr-defined]
    state.global_step = 99

    def refuse(*arguments: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(saver, "write_checkpoint", refuse)
    train_step(state, checkpointer)
    checkpointer.wait()
    monkeypatch.setattr(saver, "write_checkpoint", slow)
    for _ in range(5):  # the first of these tries again; the disk takes its time, the others go on
        train_step(state, checkpointer)
    slow_disk.free.set()
    checkpointer.wait()
    assert steps_in(tmp_path) == [101]
    assert "saves are due faster" not in caplog.text


def test_a_save_that_fails_while_the_next_is_due_is_not_tried_again_before_the_pause(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = new_state()
    checkpointer = make(EverySteps(every=1, retry_after=1000), state)
    refusing = threading.Event()

    def refuse(*arguments: Any) -> None:
        assert refusing.wait(LIMIT)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(saver, "write_checkpoint", refuse)
    train_step(state, checkpointer)
    refusing.set()
    for _ in range(5):
        train_step(state, checkpointer)
    assert caplog.text.count("cannot save step") == 1
    assert "failure 1 of" in caplog.text


def test_a_disk_that_cannot_even_be_listed_is_tried_again_like_any_other(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = new_state()
    checkpointer = make(EverySteps(every=1, retry_after=0, max_failures=2), state)

    def refuse(*arguments: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(saver, "write_checkpoint", refuse)
    monkeypatch.setattr(Catalog, "by_step", refuse)
    with pytest.raises(CheckpointError, match=r"cannot save step .* Stale file handle.*checkpoint \(unknown\)"):
        for _ in range(4):
            train_step(state, checkpointer)
            checkpointer.wait()
    assert "failure 1 of checkpoint.max_failures=2" in caplog.text
    assert checkpointer.newest_finite() is None


def test_a_bug_in_the_background_is_raised_in_the_loop(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    state = new_state()
    checkpointer = make(EverySteps(every=1), state)

    def bug(*arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(saver, "write_checkpoint", bug)
    with pytest.raises(ZeroDivisionError):
        for _ in range(1000):
            train_step(state, checkpointer)


def test_after_a_failure_the_state_of_the_moment_is_saved_and_the_end_insists(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = new_state()
    checkpointer = make(EverySteps(every=1000, retry_after=0.01, max_failures=5), state)
    train_step(state, checkpointer)
    original = writer.write_checkpoint
    refusals = iter([True, True, False])

    def sometimes(*arguments: Any) -> Any:
        if next(refusals):
            raise OSError(5, "Input/output error")
        return original(*arguments)

    monkeypatch.setattr(saver, "write_checkpoint", sometimes)
    checkpointer.finish(state)
    assert steps_in(tmp_path) == [1]


def test_leaving_waits_for_what_is_in_flight_also_when_training_fails(slow_disk: SlowDisk, tmp_path: Path) -> None:
    state = new_state()
    with pytest.raises(KeyError), Checkpointer(EverySteps(every=1), Catalog(tmp_path), {}, {}) as checkpointer:
        checkpointer.restore(state, "auto", None)
        train_step(state, checkpointer)
        threading.Timer(0.2, slow_disk.free.set).start()
        raise KeyError("a bug in training")
    assert steps_in(tmp_path) == [1]
    verify(tmp_path / "step_00000001")


def test_the_end_waits_with_a_progress_bar(
    make: Make, slow_disk: SlowDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, int]] = []

    class Bar:
        n = 0

        def __init__(self, desc: str, total: int, **options: Any) -> None:
            shown.append((desc, total))

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def update(self, count: int) -> None:
            self.n += count
            shown.append(("update", self.n))
            slow_disk.free.set()

    monkeypatch.setattr(background, "tqdm", Bar)
    state = new_state()
    checkpointer = make(EverySteps(every=1), state)
    train_step(state, checkpointer)
    checkpointer.finish(state)
    assert shown[0][0] == "writing the checkpoint of step 1"
    assert shown[0][1] > 8 * 8 * 4 * 3
    assert shown[1][0] == "update"


def test_invariant_7_a_thousand_saves_take_no_more_memory_files_or_threads_than_ten(tmp_path: Path) -> None:
    state = new_state(width=64)

    def footprint() -> tuple[int, int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    with Checkpointer(EverySteps(every=1, keep=2, keep_best=0), Catalog(tmp_path), {}, {}) as checkpointer:
        checkpointer.restore(state, "auto", None)
        for _ in range(10):
            train_step(state, checkpointer)
        checkpointer.wait()
        memory, files, threads = footprint()
        for _ in range(990):
            train_step(state, checkpointer)
        checkpointer.wait()
        later = footprint()
    assert later[0] - memory < 16 * 2**20
    assert later[1:] == (files, threads)
    assert checkpointer.saves == 1000
    assert steps_in(tmp_path) == [999, 1000]


def test_a_restored_state_keeps_nothing_of_the_file(make: Make, tmp_path: Path) -> None:
    """It was mapped: rotation, or another process, may delete or overwrite it."""
    state = new_state()
    checkpointer = make(EverySteps(every=1), state)
    train_step(state, checkpointer)
    checkpointer.finish(state)
    restored = new_state()
    make(EverySteps(every=1), restored)
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path) not in maps
    shutil.rmtree(tmp_path / "step_00000001")
    for one, other in zip(state.optimizer.state.values(), restored.optimizer.state.values(), strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="no niceness here")
def test_the_thread_that_writes_lets_training_go_first(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    state = new_state()
    note = lambda: seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))  # noqa: E731
    checkpointer = make(EverySteps(every=1), state, before_commit=note)
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    train_step(state, checkpointer)
    checkpointer.wait()
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
    assert seen[0] > own


def test_the_thread_that_writes_starts_no_threads_for_arithmetic(make: Make) -> None:
    """Two sets of OpenMP's threads on the same cores make every training step take twice as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    state = new_state(width=512)
    checkpointer = make(EverySteps(every=2), state)
    train_step(state, checkpointer)

    def unknown_to_python() -> set[int]:
        known = {thread.native_id for thread in threading.enumerate()}
        return {int(path.name) for path in Path("/proc/self/task").iterdir()} - known

    before = unknown_to_python()
    train_step(state, checkpointer)
    checkpointer.wait()
    torch.set_num_threads(threads)
    assert checkpointer.saves == 1
    assert unknown_to_python() <= before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_single_weight_that_is_no_number_is_found(dtype: torch.dtype) -> None:
    weights = torch.full((300, 300), 100.0, dtype=dtype)
    state = {"model_state_dict": {"weight": weights.t(), "count": torch.tensor(1)}}
    assert weights_are_finite(state)
    for wrong in (math.nan, math.inf):
        weights[299, 299] = wrong
        assert not weights_are_finite(state)


def test_what_is_no_parameter_may_be_infinite_or_no_tensor(make: Make, tmp_path: Path) -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))

        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

        def set_extra_state(self, state: Any) -> None:
            assert state == {"calls": 3}

    def state() -> TrainState:
        model = nn.Sequential(Masked())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return TrainState(model, optimizer, schedules.constant(optimizer, 1000), GradScaler("cpu", enabled=False))

    saved = state()
    assert saved.checkpoint_bytes() > 0
    checkpointer = make(EverySteps(every=1), saved)
    train_step(saved, checkpointer)
    checkpointer.wait()
    assert verify(tmp_path / "step_00000001").finite
    make(EverySteps(every=1), state()).restore(state(), "required", None)


def test_the_cost_of_a_save_is_its_stall_and_the_slowness_of_the_steps_beside_it() -> None:
    meter = CostMeter()
    assert meter.cost is None
    for _ in range(3):
        meter.step(30.0, saving=False)  # the very first, which do what is done only once
    for _ in range(10):
        meter.step(0.1, saving=False)
    for _ in range(5):
        meter.step(0.12, saving=True)
    meter.saved(stall=0.03)
    assert meter.cost == pytest.approx(0.03 + 5 * 0.02)


def test_steps_that_happen_to_be_fast_beside_a_save_earn_nothing() -> None:
    meter = CostMeter()
    for _ in range(5):
        meter.step(0.1, saving=False)
    meter.step(0.05, saving=True)
    meter.saved(stall=0.01)
    assert meter.cost == pytest.approx(0.01)


def test_a_failed_save_is_charged_to_none() -> None:
    meter = CostMeter()
    for _ in range(5):
        meter.step(0.1, saving=False)
    meter.step(9.0, saving=True)
    meter.failed()
    meter.saved(stall=0.01)
    assert meter.cost == pytest.approx(0.01)


def test_one_odd_save_does_not_set_the_cost() -> None:
    meter = CostMeter()
    for stall in (0.01, 5.0, 0.01):
        meter.saved(stall)
    assert meter.cost == pytest.approx(0.01)


def test_the_loop_measures_what_the_budget_policy_goes_by(make: Make) -> None:
    state = new_state()
    checkpointer = make(EverySteps(every=3), state)
    for _ in range(3):
        train_step(state, checkpointer)
    checkpointer.wait()
    cost = checkpointer._progress(state).save_cost
    assert cost is not None
    assert cost > 0
