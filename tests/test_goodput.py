"""Where the time of a run has gone, over all its lives."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.checkpoint.__main__ import main
from src.goodput import Life, account_of, lives_of
from tests.conftest import LONG, TINY, Result, Training
from tests.store import RUN, Store, on_s3


def life(began: float, first_step: int, last_step: int, training: float = 100.0) -> Life:
    return Life(began, starting=10.0, first_step=first_step, last_step=last_step, training=training, stalled=1.0)


def test_a_run_left_alone_has_lost_its_start_and_what_checkpoints_took() -> None:
    account = account_of([life(0, 0, 50)])
    assert (account.total, account.starting, account.stalled, account.repeated_steps) == (110, 10, 1, 0)
    assert account.share == pytest.approx(99 / 110)


def test_steps_that_are_taken_again_are_no_progress() -> None:
    account = account_of([life(0, 0, 50), life(200, 40, 90), life(400, 90, 140)])
    assert account.repeated_steps == 10
    assert account.repeating == pytest.approx(10 * 99 / 50)
    assert account.share == pytest.approx((300 - 3 - account.repeating) / 330)


def test_a_life_too_short_to_catch_up_repeats_what_it_does() -> None:
    assert account_of([life(0, 0, 50), life(200, 20, 25), life(400, 20, 60)]).repeated_steps == 5 + 30


def test_entries_that_are_no_good_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "goodput").mkdir()
    endless = json.dumps(vars(life(0, 0, 5)) | {"began": 10**400})
    for number, text in enumerate(["", "[]", "{", "[" * 100_000, endless, '{"began": 1}', '{"began": "x"}']):
        (tmp_path / "goodput" / f"{number}-1.json").write_text(text)
    (tmp_path / "goodput" / "9-1.json").write_text(json.dumps(vars(life(0, 0, 5))))
    assert len(lives_of(tmp_path)) == 1


def test_a_killed_run_shows_all_its_lives(training: Training, capsys: pytest.CaptureFixture[str]) -> None:
    process = training.start(*LONG, "checkpoint.every=1000", "checkpoint.keep_best=0", "trainer.epochs=100000")
    training.wait_until(process, lambda: any(life.last_step > 20 for life in lives_of(training.run)))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    result = training.finish(training.start(*LONG))
    assert result.status == 0
    assert re.search(r"goodput +\d+\.\d% of .* in 2 lives; the rest: starting .*, \d\d+ steps repeated", result.output)
    first, second = lives_of(training.run)
    assert first.first_step == second.first_step == 0
    assert second.last_step == 104
    assert 0.5 < first.starting < 60
    assert main(["ls", str(training.run)]) == 0
    assert "goodput: " in capsys.readouterr().out
    events = EventAccumulator(str(training.run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert all(0 <= event.value <= 1 for event in events.Scalars("goodput/share"))


def test_lives_on_a_machine_that_is_gone_count_too(train: Callable[..., Result], store: Store, bucket: str) -> None:
    train(*TINY, *on_s3(store, bucket), "trainer.epochs=1")
    shutil.rmtree(RUN)
    train(*TINY, *on_s3(store, bucket), "trainer.epochs=2")
    assert [(life.first_step, life.last_step) for life in lives_of(RUN)] == [(0, 13), (13, 26)]
