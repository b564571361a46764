"""Learning rate schedules are closed forms of the step."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from src import schedules
from src.errors import ConfigError

Builder = Callable[..., LambdaLR]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)


def rates(scheduler: LRScheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_constant_stays() -> None:
    assert rates(schedules.constant(optimizer(), 10), 10) == [0.5] * 10


def test_warmup_rises_evenly_to_the_full_rate() -> None:
    found = rates(schedules.constant(optimizer(), 10, warmup=0.4), 10)
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4] + [0.5] * 6)


def test_cosine_falls_from_full_to_final() -> None:
    found = rates(schedules.cosine(optimizer(), 100, final=0.1), 101)
    assert found[0] == 0.5
    assert found[50] == pytest.approx(0.5 * 0.55)
    assert found[100] == pytest.approx(0.05)


def test_step_drops() -> None:
    found = rates(schedules.step(optimizer(), 40, drops=3, gamma=0.1), 40)
    assert [found[index] for index in (0, 9, 10, 20, 30, 39)] == pytest.approx([0.5, 0.5, 0.05, 5e-3, 5e-4, 5e-4])


def test_one_cycle_has_the_shape_of_torchs() -> None:
    ours = rates(schedules.one_cycle(optimizer(), 1000), 1000)
    theirs = rates(OneCycleLR(optimizer(), max_lr=0.5, total_steps=1000, cycle_momentum=False), 1000)
    assert ours == pytest.approx(theirs, abs=0.5 * 0.01)


@pytest.mark.parametrize("build", [schedules.constant, schedules.cosine, schedules.one_cycle, schedules.step])
def test_resume_gives_the_same_rates_and_more_epochs_follow_the_longer_schedule(build: Builder) -> None:
    first = build(optimizer(), 100)
    rates(first, 60)

    def resumed(total_steps: int) -> list[float]:
        again = build(optimizer(), total_steps)
        again.optimizer.load_state_dict(first.optimizer.state_dict())
        again.load_state_dict(first.state_dict())
        assert again.optimizer.param_groups[0]["lr"] == again.get_last_lr()[0]
        return rates(again, 40)

    assert resumed(100) == rates(build(optimizer(), 100), 100)[60:]
    assert resumed(200) == rates(build(optimizer(), 200), 100)[60:]


@pytest.mark.parametrize("build", [schedules.constant, schedules.cosine, schedules.one_cycle, schedules.step])
def test_the_state_is_plain(build: Builder) -> None:
    state = build(optimizer(), 100).state_dict()
    assert all(not callable(function) for function in state["lr_lambdas"])


@pytest.mark.parametrize("warmup", [-0.1, 1.0, math.nan, "half"])
def test_an_impossible_warmup_is_refused(warmup: float) -> None:
    with pytest.raises(ConfigError, match=r"^scheduler\.warmup="):
        schedules.cosine(optimizer(), 100, warmup=warmup)


@pytest.mark.parametrize("peak", [0, 1, 2])
def test_an_impossible_peak_is_refused(peak: float) -> None:
    with pytest.raises(ConfigError, match=r"^scheduler\.peak="):
        schedules.one_cycle(optimizer(), 100, peak=peak)
