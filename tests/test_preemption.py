"""Being asked to stop: where the loop is left, what is saved, and what happens if it hangs."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.checkpoint.catalog import verify
from src.data.datasets import synthetic
from src.models import small_cnn
from src.preemption import STOP_SIGNALS, Interrupted, Stop, Stopped
from tests.conftest import LONG, REPOSITORY, TINY, Result, Training
from tests.test_resume import differences
from tests.test_trainer import fit
from tests.test_training import final_state

FOR_MINUTES = "hashlib.pbkdf2_hmac('sha256', b'', b'', 1_000_000_000)"  # in C, where no handler of Python's is run


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with Stop() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.requested == number
        assert stop.reason == number.name
        with pytest.raises(Interrupted):
            stop.check()
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_waiting_for_data_is_left_at_once() -> None:
    def batches() -> Iterator[int]:
        yield 1
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Event().wait(60)
        yield 2

    seen = []
    start = time.monotonic()
    with Stop() as stop, pytest.raises(Interrupted):
        for batch in stop.between(batches()):
            seen.append(batch)
    assert seen == [1]
    assert time.monotonic() - start < 30


def test_a_step_is_never_left_in_the_middle() -> None:
    finished = False
    with Stop() as stop, pytest.raises(Interrupted):
        for _ in stop.between(range(2)):
            assert not finished
            os.kill(os.getpid(), signal.SIGTERM)
            finished = True
    assert finished


def test_another_thread_can_ask() -> None:
    with Stop() as stop, pytest.raises(Interrupted), stop.leaving_allowed():
        threading.Timer(0.05, stop.request, ("a notice",)).start()
        threading.Event().wait(60)
    assert (stop.requested, stop.reason) == (signal.SIGTERM, "a notice")


def in_a_script(body: str, *signals: signal.Signals, grace: float = 60) -> tuple[int, str]:
    """Run `body` in the context of a `Stop` and send it signals, one after the other."""
    script = (
        f"import hashlib\nfrom src.preemption import Stop\nwith Stop({grace}):\n    print('in', flush=True)\n    {body}"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    process.stdout.readline()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.7)  # any sooner, and two are taken for one
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_control_c_ends_the_process_at_once(first: signal.Signals) -> None:
    assert in_a_script(FOR_MINUTES, first, signal.SIGINT) == (130, "stopped at once; what has been saved is whole\n")


def test_a_step_that_hangs_is_given_up_after_the_grace() -> None:
    status, errors = in_a_script(FOR_MINUTES, signal.SIGUSR1, grace=0.5)
    assert status == 128 + signal.SIGUSR1
    assert "asked to stop by SIGUSR1, training still hangs in a step after trainer.grace=0.5 s" in errors


def test_a_notice_that_slurm_knows_nothing_of_has_submitit_queue_the_job_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    seen: list[int] = []
    previous = signal.signal(signal.SIGUSR2, lambda number, _frame: seen.append(number))
    try:
        Stopped([signal.SIGTERM], "an EC2 rebalance recommendation", 5).hand_on()
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert seen == [signal.SIGUSR2]


# --- the real thing ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])  # SIGTERM: below
def test_asked_to_stop_it_saves_the_step_and_goes_on_later_with_the_same_bits(
    training: Training, uninterrupted: Path, number: signal.Signals
) -> None:
    command = (*LONG, "checkpoint.every=1000", "checkpoint.keep_best=0", "trainer.workers=1")
    process = training.start(*command)
    training.wait_until(process, lambda: (training.run / "tensorboard").exists())
    process.send_signal(number)
    result = training.finish(process)
    assert result.status == 128 + number, result.output
    assert "Traceback" not in result.output
    after = re.search(rf"^stopped by {number.name} after step (\d+), which is saved", result.output, re.MULTILINE)
    assert after, result.output
    assert verify(training.checkpoints / f"step_{int(after[1]):08d}")
    assert training.finish(training.start(*LONG)).status == 0
    assert differences(final_state(uninterrupted), final_state(training.run)) == []


@pytest.mark.parametrize(("part", "saved", "workers"), [("train", None, 1), ("val", 13, 0)])
def test_data_that_hangs_does_not_keep_it_from_saving(
    training: Training, uninterrupted: Path, part: str, saved: int | None, workers: int
) -> None:
    file = training.directory / "broken"
    file.touch()
    command = (
        *LONG,
        "checkpoint=epochs",
        "checkpoint.every=1",
        "data._target_=tests.hanging.data",
        *(f"+data.{key}={value}" for key, value in {"hanging_part": part, "index": 3, "file": file}.items()),
        f"trainer.workers={workers}",
    )
    process = training.start(*command)
    training.wait_until(process, file.with_suffix(".hangs").exists)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    result = training.finish(process)
    assert result.status == 128 + signal.SIGTERM, result.output
    assert time.monotonic() - asked < 30  # and not trainer.grace
    if saved:
        assert verify(training.checkpoints / f"step_{saved:08d}").metrics == {}
    file.unlink()
    assert training.finish(training.start(*command)).status == 0
    assert differences(final_state(uninterrupted), final_state(training.run)) == []
    if saved:  # the evaluation has been made up for, and the checkpoint with it, where it is still kept
        assert all(verify(path).metrics for path in training.checkpoints.glob("step_????????"))


def test_a_sweep_that_is_asked_to_stop_stops_and_finishes_later(training: Training) -> None:
    command = ("-m", *TINY, "trainer.seed=1,2", "trainer.epochs=30", "checkpoint.every=1000", "checkpoint.keep_best=0")
    sweep = training.directory / "outputs/sweeps/tiny"
    process = training.start(*command)
    training.wait_until(process, lambda: any(sweep.glob("*/tensorboard")))
    process.send_signal(signal.SIGTERM)
    result = training.finish(process)
    assert result.status == 128 + signal.SIGTERM, result.output
    assert len(list(sweep.glob("*/checkpoints/step_*"))) == 1
    result = training.finish(training.start(*command))
    assert result.status == 0, result.output
    assert result.output.count("resumed from") == 1
    assert len(list(sweep.glob("*/checkpoints/step_00000390"))) == 2


class LongToCompile(nn.Module):
    """Does what a forward does to buffers and random generators, then is asked to stop."""

    def __init__(self, model: nn.Module, at_call: int) -> None:
        super().__init__()
        self.model, self.calls, self.at_call = model, 0, at_call

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.model(images)
        if self.calls == self.at_call:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(60)
        return logits


@pytest.mark.parametrize("at_call", [1, 4])
def test_compiling_for_minutes_does_not_keep_it_from_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_call: int
) -> None:
    """At the first batch, and at the last of an epoch, which is smaller."""
    data = synthetic(batch_size=20, train_size=70, val_size=4, image_size=8)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return small_cnn(10, 3, 8, width=4)

    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    expected = fit(tmp_path / "whole", data, model(), epochs=2, compile=True)
    monkeypatch.setattr(torch, "compile", lambda model, **options: LongToCompile(model, at_call))
    with Stop() as stop, pytest.raises(Stopped) as stopped:
        fit(tmp_path / "cut", data, model(), epochs=2, compile=True, stop=stop)
    assert f"after step {at_call - 1}," in str(stopped.value)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    state = fit(tmp_path / "cut", data, model(), epochs=2, compile=True)
    assert differences(state.state_dict(), expected.state_dict()) == []


# --- EC2 ---


class Metadata(BaseHTTPRequestHandler):
    """What an instance's metadata service answers, version 2: nothing without a token."""

    notices: dict[str, str]
    down = False

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        assert int(self.headers["x-aws-ec2-metadata-token-ttl-seconds"]) > 0
        self._answer(200, "a-token")

    def do_GET(self) -> None:
        if self.headers["x-aws-ec2-metadata-token"] != "a-token":
            return self._answer(401, "")
        notice = self.notices.get(self.path.removeprefix("/latest/meta-data/"))
        return self._answer(404, "Not Found") if notice is None else self._answer(200, notice)

    def _answer(self, status: int, body: str) -> None:
        self.send_response(503 if self.down else status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[tuple[type[Metadata], str]]:
    handler = type("Handler", (Metadata,), {"notices": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def on_ec2(url: str, *more: str) -> tuple[str, ...]:
    return ("preemption=ec2", f"preemption.endpoint_url={url}", "preemption.every=0.05", *more)


def test_a_spot_notice_is_a_request_to_stop(
    training: Training, uninterrupted: Path, metadata: tuple[type[Metadata], str]
) -> None:
    handler, url = metadata
    process = training.start(*LONG, *on_ec2(url))
    training.wait_until(process, lambda: any(training.checkpoints.glob("step_*")))
    handler.notices["events/recommendations/rebalance"] = '{"noticeTime": "2026-11-24T08:22:00Z"}'  # not heeded
    handler.down = True  # for a while
    training.wait_until(process, lambda: len(list(training.checkpoints.glob("step_*"))) >= 2)
    handler.notices["spot/instance-action"] = '{"action": "terminate", "time": "2026-11-24T08:24:00Z"}'
    handler.down = False
    result = training.finish(process)
    assert result.status == 128 + signal.SIGTERM, result.output
    reason = "an EC2 spot interruption notice (terminate 2026-11-24T08:24:00Z)"
    assert f"stopped by {reason} after step" in result.output
    handler.notices.clear()
    assert training.finish(training.start(*LONG, *on_ec2(url))).status == 0
    assert differences(final_state(uninterrupted), final_state(training.run)) == []


def test_a_rebalance_recommendation_is_heeded_if_wanted(
    train: Callable[..., Result], metadata: tuple[type[Metadata], str]
) -> None:
    handler, url = metadata
    handler.notices["events/recommendations/rebalance"] = '{"noticeTime": "2026-11-24T08:22:00Z"}'
    assert train(*TINY, *on_ec2(url), "trainer.epochs=1").status == 0
    result = train(*TINY, *on_ec2(url, "preemption.rebalance=true"), "trainer.epochs=100000")
    assert result.status == 128 + signal.SIGTERM
    assert "stopped by an EC2 rebalance recommendation (since 2026-11-24T08:22:00Z)" in result.output


def test_where_there_is_no_metadata_service_it_is_said_before_the_first_step(train: Callable[..., Result]) -> None:
    result = train(*TINY, *on_ec2("http://127.0.0.1:9/"))
    assert result.status == 2
    assert "error: preemption=ec2: there is no metadata service at http://127.0.0.1:9/" in result.output
    assert "starting afresh" not in result.output
