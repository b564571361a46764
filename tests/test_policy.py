"""WHEN to save and WHAT to keep: pure decisions."""

import itertools
import math
from dataclasses import replace

import pytest

from src.checkpoint.policy import Budget, CheckpointPolicy, EveryEpochs, EveryMinutes, EverySteps, Progress, Saved
from src.errors import ConfigError


def progress(
    step: int, *, epoch: int = 0, seconds: float = 0.0, epoch_end: bool = False, best: bool = False
) -> Progress:
    return Progress(step, epoch, seconds, epoch_end, best)


START = progress(0)


def saved_steps(policy: CheckpointPolicy, run: list[Progress]) -> list[int]:
    last, saved = run[0], []
    for now in run[1:]:
        if policy.should_save(now, last):
            saved.append(now.global_step)
            last = now
    return saved


def test_every_steps_saves_at_its_multiples_wherever_the_process_began() -> None:
    policy = EverySteps(every=100)
    assert saved_steps(policy, [progress(step) for step in range(301)]) == [100, 200, 300]
    assert saved_steps(policy, [progress(step) for step in range(150, 301)]) == [200, 300]


def test_every_minutes_counts_from_the_last_save() -> None:
    policy = EveryMinutes(every=1)
    assert saved_steps(policy, [progress(step, seconds=25 * step) for step in range(10)]) == [3, 6, 9]


def test_every_epochs_saves_when_the_epoch_has_ended() -> None:
    policy = EveryEpochs(every=2, keep_best=0)
    run = [progress(step, epoch=step // 10, epoch_end=step > 0 and step % 10 == 0) for step in range(41)]
    assert saved_steps(policy, run) == [20, 40]


def budget_run(policy: Budget, seconds_per_step: float, cost: float, steps: int) -> list[float]:
    """When it saves, if each save is measured to cost `cost` seconds and is written within one step."""
    last, costs, times = START, None, []
    for step in range(1, steps):
        now = replace(progress(step, seconds=step * seconds_per_step), save_cost=costs)
        if policy.should_save(now, last):
            last, costs = now, cost
            times.append(now.seconds)
    return times


@pytest.mark.parametrize("cost", [0.01, 0.1, 1.0])
def test_budget_spaces_saves_so_that_they_take_their_share_of_the_time(cost: float) -> None:
    times = budget_run(Budget(overhead=0.02, keep_best=0), seconds_per_step=0.1, cost=cost, steps=10_000)
    assert times[0] == pytest.approx(1.0), "the first one is for measuring"
    assert len(times) * cost / 1000 == pytest.approx(0.02, rel=0.1)


def test_budget_never_saves_further_apart_than_its_limit() -> None:
    policy = Budget(overhead=0.01, max_minutes=2, keep_best=0)
    times = budget_run(policy, seconds_per_step=1, cost=60, steps=1000)
    assert all(later - earlier == 120 for earlier, later in itertools.pairwise(times))


def test_budget_is_not_due_while_a_save_is_being_written() -> None:
    now = replace(progress(1000, seconds=1e6), saving=True, save_cost=0.01)
    assert not Budget().due(now, START)
    assert Budget().due(replace(now, saving=False), START)


@pytest.mark.parametrize(("key", "value"), [("overhead", 0), ("overhead", 1), ("max_minutes", 0), ("overhead", "1%")])
def test_an_impossible_budget_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"(?i)^checkpoint\.{key}={value}: must be"):
        Budget(**{key: value})  # type: ignore[arg-type]


def test_a_new_best_is_saved_between_intervals_if_the_best_is_kept() -> None:
    now = progress(7, epoch=1, epoch_end=True, best=True)
    assert EverySteps(every=100, keep_best=1).should_save(now, START)
    assert not EverySteps(every=100, keep_best=0).should_save(now, START)


def test_a_step_is_not_saved_twice() -> None:
    assert not EverySteps(every=10).should_save(progress(10, best=True), progress(10))


def test_the_best_beats_the_reigning_one_in_its_mode() -> None:
    policy = EverySteps(monitor="val/loss")
    first = policy.best_of(None, {"val/loss": 0.5}, 10)
    assert first == {"metric": "val/loss", "mode": "min", "value": 0.5, "global_step": 10}
    assert policy.best_of(first, {"val/loss": 0.6}, 20) == first
    assert policy.best_of(first, {"val/loss": 0.5}, 20) == first, "a tie leaves the older one"
    assert policy.best_of(first, {"val/loss": 0.4}, 20) == {**first, "value": 0.4, "global_step": 20}


@pytest.mark.parametrize(
    ("monitor", "mode", "direction"),
    [
        ("val/loss", "auto", "min"),
        ("val/accuracy", "auto", "max"),
        ("val/loss", "max", "max"),
        ("val/accuracy", "min", "min"),
    ],
)
def test_the_best_of_a_loss_is_the_smallest_unless_it_is_said_otherwise(
    monitor: str, mode: str, direction: str
) -> None:
    assert EverySteps(monitor=monitor, mode=mode).direction == direction


def test_nan_is_never_the_best() -> None:
    policy = EverySteps()
    assert policy.best_of(None, {"val/accuracy": math.nan}, 1) is None
    good = policy.best_of(None, {"val/accuracy": 0.1}, 2)
    assert policy.best_of(good, {"val/accuracy": math.nan}, 3) == good


@pytest.mark.parametrize("other", [{"metric": "val/loss", "mode": "max"}, {"metric": "val/accuracy", "mode": "min"}])
def test_a_best_by_another_metric_or_mode_does_not_reign(other: dict[str, str]) -> None:
    best = EverySteps().best_of({**other, "value": 9.0, "global_step": 5}, {"val/accuracy": 0.3}, 9)
    assert best == {"metric": "val/accuracy", "mode": "max", "value": 0.3, "global_step": 9}


def checkpoints(**accuracy: float | None) -> list[Saved]:
    return [Saved(int(name[1:]), {} if value is None else {"val/accuracy": value}) for name, value in accuracy.items()]


def test_rotation_keeps_the_newest_by_step() -> None:
    shuffled = [Saved(step) for step in (300, 100, 500, 200, 400)]
    assert EverySteps(keep=3, keep_best=0).to_keep(shuffled) == {300, 400, 500}


def test_rotation_keeps_the_best_beside_the_newest() -> None:
    saved = checkpoints(s100=0.5, s200=0.9, s300=0.7, s400=None, s500=0.6)
    assert EverySteps(keep=1, keep_best=1).to_keep(saved) == {200, 500}
    assert EverySteps(keep=1, keep_best=2).to_keep(saved) == {200, 300, 500}
    assert EverySteps(keep=1, keep_best=1, mode="min").to_keep(saved) == {100, 500}


def test_rotation_keeps_the_older_of_two_equally_good() -> None:
    assert EverySteps(keep=1, keep_best=1).to_keep(checkpoints(s100=0.9, s200=0.9, s300=0.1)) == {100, 300}


def test_rotation_keeps_the_newest_in_which_all_are_numbers() -> None:
    saved = [Saved(step, finite=step <= 20) for step in (10, 20, 30, 40, 50)]
    assert EverySteps(keep=2, keep_best=0).to_keep(saved) == {20, 40, 50}


def test_keep_every_keeps_one_per_stretch_for_ever_under_repeated_rotation() -> None:
    policy = EverySteps(keep=1, keep_best=0, keep_every=1000)
    kept: set[int] = set()
    for step in range(300, 5000, 300):
        kept = policy.to_keep([Saved(s) for s in kept | {step}])
    assert kept == {1200, 2100, 3000, 4200, 4800}


@pytest.mark.parametrize(
    ("key", "value"),
    [("every", 0), ("every", "abc"), ("every", True), ("every", 1.5), ("keep", 0), ("keep_best", -1)]
    + [("keep_every", 0), ("mode", "best"), ("max_failures", 0), ("retry_after", -1)],
)
def test_an_impossible_policy_names_the_key_and_the_value(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"(?i)^checkpoint\.{key}={value}: must be"):
        EverySteps(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf, "ten"])
def test_an_impossible_number_of_minutes_is_refused(minutes: float) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.every="):
        EveryMinutes(every=minutes)
