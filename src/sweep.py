"""A sweep: many runs by one command, which can be killed like a run, and run again."""

import json
import logging
import os
import signal
import sys
import uuid
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from src.errors import ConfigError
from src.launch import describe
from src.run import is_neutral, run_name
from src.worker import stop_file, sweep_is_over

log = logging.getLogger(__name__)

FAILURE_NAME = "failure.json"
_ID = "HOLDFAST_SWEEP"  # environment variable: jobs inherit it, whatever launcher starts them


class Sweep(Callback):
    """What a sweep needs beside Hydra's launcher and sweeper, whichever they are.

    A job that fails leaves a note in its directory and does not stop the others; at the end the notes are shown. The
    process that the command has started, if asked to stop, lets its workers save before it ends.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before the first job."""
        _refuse_shared_directories(config)
        os.environ[_ID] = uuid.uuid4().hex
        self.stopped_by = 0
        self.directory = Path(config.hydra.sweep.dir).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        stop_file(self.directory, os.getpid()).unlink(missing_ok=True)
        if config.hydra.launcher._target_.endswith(".JoblibLauncher"):  # others have no workers that wait for this one
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """In the job's process: it is tried again."""
        if config.hydra.mode is RunMode.MULTIRUN:
            Path(config.hydra.runtime.output_dir, FAILURE_NAME).unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """In the job's process. A failure is not left to Hydra, which would raise the first and forget the others."""
        if config.hydra.mode is not RunMode.MULTIRUN or job_return.status is not JobStatus.FAILED:
            return
        error = job_return._return_value
        job_return.status, job_return.return_value = JobStatus.COMPLETED, None
        text = describe(error)
        if sweep_is_over():
            log.info(text)
            return
        log.error("this job has failed: %s", text)
        note = {
            "sweep": os.environ.get(_ID),
            "job": list(config.hydra.overrides.task),
            "error": text,
            "exit_code": getattr(error, "exit_code", 1),
        }
        Path(config.hydra.runtime.output_dir, FAILURE_NAME).write_text(json.dumps(note, indent=2) + "\n")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """After the last job. Ends the program if not all is well."""
        stop_file(self.directory, os.getpid()).unlink(missing_ok=True)
        if self.stopped_by:
            name = signal.Signals(self.stopped_by).name
            print(f"the sweep was stopped by {name}; run the same command again to go on", file=sys.stderr)
            sys.exit(128 + self.stopped_by)
        failures = [note for path in sorted(self.directory.rglob(FAILURE_NAME)) if (note := read_failure(path.parent))]
        failures = [note for note in failures if note["sweep"] == os.environ[_ID]]
        for note in failures:
            print(f"failed: {' '.join(note['job'])}: {note['error']}", file=sys.stderr)
        if failures:
            print(f"{len(failures)} of the jobs failed; the same command tries only those again", file=sys.stderr)
            sys.exit(failures[0]["exit_code"])

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.stopped_by:
            print("stopped at once; what has been saved is whole", file=sys.stderr)
            sys.exit(128 + number)  # the launcher then kills its workers
        self.stopped_by = number
        stop_file(self.directory, os.getpid()).touch()
        print("asked to stop: waiting until the jobs have saved; once more to end at once", file=sys.stderr)


def read_failure(directory: Path) -> dict[str, Any] | None:
    """The note that a job has left that failed when it was last tried; None if it did not."""
    try:
        note = json.loads((directory / FAILURE_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    kinds = {"sweep": str, "job": list, "error": str, "exit_code": int}
    is_one = isinstance(note, dict) and all(isinstance(note.get(key), kind) for key, kind in kinds.items())
    return note if is_one else None


def _refuse_shared_directories(config: DictConfig) -> None:
    """Refuse a sweep of which two jobs would train in the same directory, at the same time or one over the other."""
    if any(str(override).startswith("hydra.sweep.subdir=") for override in config.hydra.overrides.hydra):
        return
    from_config = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    for override in OverridesParser.create().parse_overrides([*from_config, *config.hydra.overrides.task]):
        if override.is_sweep_override() and _is_shared(override):
            error = ConfigError(
                override.get_key_element(),
                override.get_value_string(),
                "two jobs would have one directory, whose name is made of what changes the result. Sweep over "
                "something that does, with each value once, or name the jobs yourself: "
                "'hydra.sweep.subdir=${hydra.job.override_dirname}'",
            )
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)


def _is_shared(override: Override) -> bool:
    key = override.get_key_element()
    if is_neutral(key.lstrip("+")):
        return True
    if not override.is_discrete_sweep() or isinstance(override.value(), Glob):
        return False
    values = list(override.sweep_string_iterator())
    return len({run_name(None, [f"{key}={value}"]) for value in values}) < len(values)
