"""Sweeps: killed anywhere, run again, nothing is lost and nothing done twice."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import optuna
import pytest
from optuna.distributions import BaseDistribution, UniformDistribution
from optuna.trial import TrialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from src.checkpoint.__main__ import main
from src.result import read_failure, read_result
from src.study import queue_lost_trials
from tests.conftest import LONG, TINY, Result, Training, children_of
from tests.test_resume import differences, state

Train = Callable[..., Result]

RUN = Path("outputs/tiny")
SWEEP = Path("outputs/sweeps/tiny")
SHORT = (*TINY, "data.train_size=32", "data.val_size=16", "trainer.epochs=2", "checkpoint.every=1")
"""Four steps."""


def steps(sweep: Path) -> dict[str, int]:
    """The newest checkpoint of each job."""
    return {path.parent.parent.name: int(path.name[5:]) for path in sorted(sweep.glob("*/checkpoints/step_????????"))}


def job(sweep: Path, override: str) -> Path:
    """The directory of the job with this override."""
    return next(path.parent.parent for path in sweep.glob("*/.hydra/overrides.yaml") if override in path.read_text())


def done(sweep: Path) -> int:
    return len(list(sweep.glob("*/result.json")))


# --- a run that is done ---


def test_a_run_that_is_done_says_so_before_anything_is_built(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(*SHORT)
    assert first.metric is not None
    saved = read_result(RUN)
    assert saved is not None
    assert (saved.metric, saved.value, saved.last_step) == ("val/accuracy", first.metric, 4)
    monkeypatch.setattr("src.launch.build", lambda *_, **__: pytest.fail("something was built"))
    for more in ((), ("resume=required",), ("trainer.workers=1", "trainer.log_every=2")):
        again = train(*SHORT, *more)
        assert (again.status, again.metric) == (0, first.metric)
        assert f"already done: val/accuracy {first.metric:.4f} at step" in again.output


def test_what_may_be_something_to_do_is_looked_into(train: Train) -> None:
    train(*SHORT)
    for more, says in (
        (("optimizer.lr=0.02",), "error: resume=step 4: this checkpoint was trained with other settings"),
        (("checkpoint.monitor=val/loss",), "nothing left to train"),
        (("checkpoint.keep=2",), "nothing left to train"),
        (("resume=outputs/tiny/checkpoints/step_00000003",), "step_00000003: step 3"),
        (("trainer.epochs=3",), "step_00000004: step 4"),
        (("resume=never",), "starting afresh"),
    ):
        result = train(*SHORT, *more)
        assert says in result.output
        assert "already done" not in result.output


def _other_run(result: Path) -> None:
    data = json.loads(result.read_text())
    data["config"]["optimizer"]["lr"] = 0.5
    result.write_text(json.dumps(data))


def _checkpoint_gone(result: Path) -> None:
    shutil.rmtree(result.parent / "checkpoints/step_00000004")


def _checkpoint_cut_short(result: Path) -> None:
    os.truncate(result.parent / "checkpoints/step_00000004/state.pt", 100)


def test_a_result_that_is_damaged_or_not_this_runs_is_ignored(train: Train) -> None:
    metric = train(*SHORT).metric
    for damage in (
        lambda result: result.write_bytes(b""),
        lambda result: result.write_bytes(b"\xff{"),
        lambda result: result.write_bytes(b"[" * 100_000),
        lambda result: result.write_text('{"metric": "val/accuracy", "value": 1.0}'),
        lambda result: result.write_text(result.read_text().replace('"last_step": 4', '"last_step": "4"')),
        _other_run,
        _checkpoint_gone,
        _checkpoint_cut_short,
    ):
        damage(RUN / "result.json")
        result = train(*SHORT)
        assert (result.status, result.metric) == (0, metric)
        assert "resumed from" in result.output
    assert "already done" in train(*SHORT).output


# --- failures, and what is refused ---


def test_a_job_that_fails_does_not_stop_the_others_and_is_tried_again(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("-m", *SHORT, "trainer.seed=1,2", "optimizer.lr=-1,0.01")
    for life in range(2):
        result = train(*command)
        assert result.status == 2
        assert result.output.count("ERROR   this job has failed: optimizer=") == 2
        for seed in (1, 2):  # and at the end, without what all jobs share
            assert f"\nfailed: optimizer.lr=-1 trainer.seed={seed}: optimizer=torch.optim.SGD(" in result.output
        assert "jobs that failed: 2; the same command tries only these again" in result.output
        assert result.output.count("already done") == 2 * life
        assert done(SWEEP) == 2
    failures = [failure for path in sorted(SWEEP.iterdir()) if (failure := read_failure(path))]
    assert len(failures) == 2
    assert all("optimizer" in failure.error for failure in failures)

    capsys.readouterr()
    assert main(("ls", str(SWEEP))) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 5
    assert table[0].split() == ["job", "state", "step", "best"]
    assert sum("failed" in line for line in table[3:]) == 2


@pytest.mark.parametrize(
    ("sweep", "key"),
    [
        (("checkpoint.every=10,20",), "checkpoint.every=10,20"),
        (("model.width=8,16", "trainer.epochs=choice(1,2)"), "trainer.epochs=choice(1,2)"),
        (("optimizer.lr=0.1,1e-1",), "optimizer.lr=0.1,1e-1"),
    ],
)
def test_jobs_that_would_share_a_directory_are_refused(train: Train, sweep: tuple[str, ...], key: str) -> None:
    result = train("-m", *SHORT, *sweep)
    assert result.status == 2
    assert f"error: {key}: two jobs would have one directory" in result.output
    assert not Path("outputs").exists()


# --- kills ---


def run_killed(training: Training, command: tuple[str, ...], due: Callable[[], bool]) -> None:
    """SIGKILL while `due()` holds."""
    process = training.fork(*command)
    assert process.pid is not None
    deadline = time.monotonic() + 120
    while True:
        if due():
            os.kill(process.pid, signal.SIGSTOP)
            if due():  # still, now that nothing moves
                break
            os.kill(process.pid, signal.SIGCONT)
        assert process.is_alive(), (training.directory / "output.txt").read_text()
        assert time.monotonic() < deadline, "did not come to that"
        time.sleep(0.0005)
    process.kill()
    process.join()


def run_to_the_end(training: Training, command: tuple[str, ...]) -> str:
    """Returns what it printed."""
    (training.directory / "output.txt").unlink(missing_ok=True)
    process = training.fork(*command)
    process.join()
    output = (training.directory / "output.txt").read_text()
    assert process.exitcode == 0, output
    return output


def test_twenty_jobs_killed_five_times_end_like_twenty_left_alone(training: Training) -> None:
    command = ("-m", *SHORT, "trainer.seed=range(20)")
    alone, sweep = training.directory / "alone", training.directory / SWEEP
    run_to_the_end(training, (*command, f"hydra.sweep.dir={alone}"))
    for jobs in (2, 5, 9, 13, 17):
        run_killed(training, command, lambda jobs=jobs: done(sweep) >= jobs and len(steps(sweep)) > done(sweep))  # type: ignore[misc]
    finished = {path: path.stat().st_mtime_ns for path in sweep.glob("*/result.json")}
    output = run_to_the_end(training, command)
    assert output.count("already done") == len(finished) >= 17
    assert output.count("resumed from") == 1
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    names = sorted(path.parent.name for path in alone.glob("*/result.json"))
    assert len(names) == 20
    for name in names:
        one, other = read_result(alone / name), read_result(sweep / name)
        assert one is not None
        assert one == other
        assert differences(state(4, alone / name), state(4, sweep / name)) == []


# --- in processes of their own ---


def workers_of(process: int) -> list[Path]:
    """In /proc."""
    processes = [Path(f"/proc/{child}") for child in children_of(process)]
    return [path for path in processes if b"LokyProcess" in (path / "cmdline").read_bytes()]


def test_parallel_jobs_save_when_the_sweep_is_stopped_or_killed(training: Training, uninterrupted: Path) -> None:
    command = ("-m", *LONG, "trainer.seed=0,1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    sweep = training.directory / SWEEP

    def two_are_beyond(step: int) -> Callable[[], bool]:
        return lambda: len(found := steps(sweep)) == 2 and min(found.values()) > step

    process = training.start(*command)
    training.wait_until(process, two_are_beyond(0))
    process.send_signal(signal.SIGTERM)
    result = training.finish(process)
    assert result.status == 128 + signal.SIGTERM, result.output
    assert "stopped by SIGTERM; run the same command again to go on" in result.output
    assert result.output.count("its sweep, which was asked to stop after step") == 2
    assert read_failure(job(sweep, "trainer.seed=0")) is None

    reached = min(steps(sweep).values())
    process = training.start(*command)
    training.wait_until(process, two_are_beyond(reached))
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)  # its workers notice, and save
    process.wait()
    result = training.finish(training.start(*command))
    assert result.status == 0, result.output
    assert done(sweep) == 3
    assert not [worker for worker in workers if worker.exists()]
    assert differences(state(104, job(sweep, "trainer.seed=0")), state(104, uninterrupted)) == []


def test_jobs_that_submitit_starts_are_runs_like_any_other(training: Training) -> None:
    command = ("-m", *SHORT, "trainer.seed=1", "optimizer.lr=0.01,-1", "hydra/launcher=submitit_local")
    result = training.finish(training.start(*command))
    assert result.status == 2, result.output
    assert "jobs that failed: 1" in result.output
    assert done(training.directory / SWEEP) == 1
    said = "".join(path.read_text() for path in training.directory.rglob("*_log.*"))
    assert "this job has failed" in said
    assert "Traceback" not in said


def test_jobs_that_outlive_their_sweep_are_waited_for(training: Training, uninterrupted: Path) -> None:
    command = ("-m", *LONG, "trainer.seed=0", "hydra/launcher=submitit_local")
    sweep = training.directory / SWEEP
    process = training.start(*command)
    training.kill_when(process, lambda: bool(steps(sweep)))
    result = training.finish(training.start(*command))
    assert result.status == 0, result.output
    said = "".join(path.read_text() for path in training.directory.rglob("*_log.*"))
    assert said.count("starting afresh") == 1
    assert differences(state(104, job(sweep, "trainer.seed=0")), state(104, uninterrupted)) == []


def test_a_signal_is_handed_on_to_the_handler_that_was_there_before(train: Train) -> None:
    """A scheduler's handler, submitit's say, queues the job again: after it has been saved, not instead."""
    train(*SHORT)
    found: list[int] = []

    def handler(number: int, _frame: FrameType | None) -> None:
        found.append(max(steps(RUN.parent).values()))

    def send_when_it_goes_on() -> None:
        while len(list(RUN.glob("goodput/*"))) < 2:
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)

    previous = signal.signal(signal.SIGUSR2, handler)
    threading.Thread(target=send_when_it_goes_on, daemon=True).start()
    try:
        result = train(*SHORT, "trainer.epochs=1000", "checkpoint.every=100000", "checkpoint.keep_best=0")
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert result.status == 128 + signal.SIGUSR2
    assert f"after step {found[0]}, which is saved" in result.output
    assert len(found) == 1
    assert not (RUN / "result.json").exists()  # the run that goes on is done no more


# --- Optuna ---


def test_a_study_that_was_killed_goes_on_to_its_total(training: Training) -> None:
    sweeper = ("hydra/sweeper=optuna", "hydra/sweeper/sampler=random", "hydra.sweeper.n_trials=4")
    command = ("-m", *SHORT, "optimizer.momentum=interval(0.1,0.9)", *sweeper)
    sweep = training.directory / SWEEP
    run_killed(training, command, lambda: done(sweep) == 1 and len(steps(sweep)) == 2)
    begun = set(steps(sweep))
    for life in range(2):
        output = run_to_the_end(training, command)
        assert ("resumed from" in output) == (life == 0)
        assert done(sweep) == len(steps(sweep)) == 4
        assert begun < set(steps(sweep))


def test_trials_without_a_result_are_queued_once(tmp_path: Path) -> None:
    study = optuna.create_study()
    distribution: dict[str, BaseDistribution] = {"lr": UniformDistribution(0, 1)}
    done, failed, running, not_begun = (study.ask(distribution) for _ in range(4))
    study.tell(done, 1.0)
    study.tell(failed, state=TrialState.FAIL)
    for _ in range(2):
        assert queue_lost_trials(study) == 3
    again = [study.ask(distribution).params for _ in range(3)]
    assert again == [failed.params, running.params, not_begun.params]
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, 0.5)
    assert queue_lost_trials(study) == 0


def test_a_trial_that_was_killed_while_it_was_drawn_is_done_once_the_whole_of_it_is(tmp_path: Path) -> None:
    study = optuna.create_study()
    distributions: dict[str, BaseDistribution] = {name: UniformDistribution(0, 1) for name in ("lr", "momentum")}
    study.ask({"lr": distributions["lr"]})
    assert queue_lost_trials(study) == 1
    study.tell(study.ask(distributions), 0.5)
    assert queue_lost_trials(study) == 0


def test_what_optuna_is_to_look_for_is_said_in_one_place(train: Train) -> None:
    result = train("-m", *SHORT, "hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "optimizer.lr=0.1,0.2")
    assert result.status == 2
    assert "error: hydra.sweeper.direction=maximize: leave it out: see checkpoint.mode" in result.output
    assert not Path("outputs").exists()


# --- looking at it ---


def test_tensorboard_compares_the_jobs(train: Train) -> None:
    train("-m", *SHORT, "optimizer.lr=0.01,0.02")
    found = {}
    for job in sorted(path.parent for path in SWEEP.glob("*/tensorboard")):
        events = EventAccumulator(str(job / "tensorboard")).Reload()
        content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
        start = metadata.parse_session_start_info_plugin_data(content)
        assert isinstance(start, plugin_data_pb2.SessionStartInfo)
        result = read_result(job)
        assert result is not None
        assert events.Scalars("val/accuracy")[-1].value <= (result.value or 0) + 1e-6
        found[job.name] = start.hparams["optimizer.lr"].number_value
        assert "optimizer.momentum" not in start.hparams, "the same in all"
    assert sorted(found.values()) == [0.01, 0.02]
