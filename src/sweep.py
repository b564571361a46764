"""A sweep: many runs by one command, which can be killed like a run, and run again."""

import atexit
import logging
import math
import multiprocessing
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write
from torch.distributed import is_torchelastic_launched

from src.errors import ConfigError
from src.launch import describe, ending_the_program
from src.preemption import STOP_SIGNALS
from src.result import FAILURE_NAME, Failure, read_failure, write_failure
from src.run import holder, holder_of, is_neutral, run_name
from src.worker import SWEEP, enter_job, in_sweep, is_worker, leave_job, stop_file, sweep_is_over

log = logging.getLogger(__name__)


class Sweep(Callback):
    """What a sweep needs beside Hydra's launcher and sweeper, whichever they are.

    A job that fails leaves a note in its directory and does not stop the others; at the end the notes are shown. The
    process that the command has started, if asked to stop, lets its workers save before it ends.
    """

    @ending_the_program()
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before the first job."""
        if is_torchelastic_launched():
            raise ConfigError(
                "hydra.mode",
                "MULTIRUN",
                "torchrun trains one run on many ranks; start a sweep without it, or one torchrun per job",
            )
        _refuse_shared_directories(config)
        if config.hydra.sweeper._target_.endswith(".OptunaSweeper"):
            from src.study import continue_study  # which takes a while to import

            continue_study(config)
        # A launcher may start its processes anywhere: they find the code as this one does.
        path = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self.name = os.environ[SWEEP] = f"{os.getpid()}-{uuid.uuid4().hex}"
        self.stopping = False
        self.shown: list[Failure] | None = None
        self.swept = tuple(f"{override.get_key_element()}=" for override in _swept(config))
        self.directory = Path(config.hydra.sweep.dir).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        atexit.register(self._show_failures)  # launcher or sweeper may give up before the end
        if config.hydra.launcher._target_.endswith(".JoblibLauncher"):  # others have no workers that live with it
            with read_write(config):
                # Else jobs that are done already teach it to hand out several at a time, for one worker after all.
                config.hydra.launcher.batch_size = "1"
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """In the job's process: it is tried again."""
        if is_worker():
            enter_job()
        if in_sweep():
            Path(config.hydra.runtime.output_dir, FAILURE_NAME).unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """In the job's process. A failure is not left to Hydra, which would raise the first and forget the others."""
        if is_worker():
            leave_job()
        if not in_sweep():
            return
        if job_return.status is not JobStatus.FAILED:
            if isinstance(job_return.return_value, float) and math.isnan(job_return.return_value):
                job_return.return_value = None  # for which Optuna's sweeper has a way
            return
        error = job_return._return_value
        text = describe(error)
        if sweep_is_over():
            log.info(text)
        else:
            log.error("this job has failed: %s", text)
            job = [str(override) for override in config.hydra.overrides.task]
            failure = Failure(os.environ[SWEEP], job, text, getattr(error, "exit_code", 1))
            write_failure(Path(config.hydra.runtime.output_dir), failure)
        job_return.status, job_return.return_value = JobStatus.COMPLETED, None  # if there is a note of it

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """After the last job. Ends the program if one has failed."""
        if failures := self._show_failures():
            sys.exit(failures[0].exit_code)

    def _show_failures(self) -> list[Failure]:
        if self.shown is not None:
            return self.shown
        noted = [read_failure(path.parent) for path in sorted(self.directory.rglob(FAILURE_NAME))]
        failures = [failure for failure in noted if failure is not None and failure.sweep == self.name]
        self.shown = failures
        for failure in failures:
            job = " ".join(override for override in failure.job if override.startswith(self.swept))
            print(f"failed: {job}: {failure.error}", file=sys.stderr)
        if failures:
            print(f"jobs that failed: {len(failures)}; the same command tries only these again", file=sys.stderr)
        return failures

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Wait, if asked once, until no worker trains any more. That the program ends has the launcher kill them."""
        if not self.stopping:
            self.stopping = True
            print("asked to stop: the jobs are saved; once more ends them at once", file=sys.stderr)
            file = stop_file(self.directory)
            file.touch()
            atexit.register(file.unlink, missing_ok=True)
            while self._are_training(multiprocessing.active_children()):
                time.sleep(0.1)
        print(f"stopped by {signal.Signals(number).name}; run the same command again to go on", file=sys.stderr)
        sys.exit(128 + number)

    def _are_training(self, workers: list[multiprocessing.process.BaseProcess]) -> bool:
        names = {holder(worker.pid) for worker in workers if worker.pid is not None}
        return any(holder_of(path.parent) in names for path in self.directory.rglob(".lock"))


def _refuse_shared_directories(config: DictConfig) -> None:
    """Refuse a sweep of which two jobs would train in the same directory, at the same time or one over the other."""
    if any(str(override).startswith("hydra.sweep.subdir=") for override in config.hydra.overrides.hydra):
        return
    for override in _swept(config):
        if _is_shared(override):
            raise ConfigError(
                override.get_key_element(),
                override.get_value_string(),
                "two jobs would have one directory, whose name is made of what changes the result. Sweep over "
                "something that does, with each value once, or name the jobs yourself: "
                "'hydra.sweep.subdir=${hydra.job.override_dirname}'",
            )


def _swept(config: DictConfig) -> list[Override]:
    """What has several values, by the command line or by the sweeper's own config."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task])
    return [override for override in overrides if override.is_sweep_override()]


def _is_shared(override: Override) -> bool:
    key = override.get_key_element()
    if is_neutral(key.lstrip("+")):
        return True
    if not override.is_discrete_sweep() or isinstance(override.value(), Glob):
        return False
    values = list(override.sweep_string_iterator())
    return len({run_name(None, [f"{key}={value}"]) for value in values}) < len(values)
