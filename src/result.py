"""What came of a run. If it is done, the same command, run again, only has to say so."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from src.checkpoint.catalog import Catalog, verify
from src.checkpoint.manifest import CorruptCheckpoint
from src.errors import CheckpointError
from src.run import RESULT_NEUTRAL, Run, config_drift
from src.storage.local import LocalStorage, fsync_directory, write_durably

log = logging.getLogger(__name__)

_Content = TypeVar("_Content", "Result", "Failure")

RESULT_NAME = "result.json"
FAILURE_NAME = "failure.json"

_FREE = tuple(key for key in RESULT_NEUTRAL if key not in ("trainer.epochs", "checkpoint", "storage"))
"""What may differ from a run that is done: not its length, nor what it is to leave, and where."""


@dataclass(frozen=True)
class Result:
    """The contents of `result.json`, which is written when nothing is left to do, be it for the mirror."""

    metric: str
    """The monitored one."""
    value: float | None
    """The best; None if it never was a number."""
    step: int
    """Where it was reached."""
    last_step: int
    """Of the run; its checkpoint is the last one."""
    config: dict
    """The resolved config of the run."""


@dataclass(frozen=True)
class Failure:
    """The contents of `failure.json`, which a job of a sweep leaves if it fails; it is gone when it is tried again."""

    sweep: str
    """Which one, of those that have tried it."""
    job: list
    """Its overrides."""
    error: str
    exit_code: int


def write_result(run: Run, best: Mapping[str, Any], last_step: int) -> None:
    """Note durably that the run is done. If that fails, all that is lost is the time to find it out again.

    Args:
        best: As `TrainState.best_so_far` has it.
        last_step: Of the run.
    """
    value = best["value"] if math.isfinite(best["value"]) else None
    result = Result(best["metric"], value, best["global_step"], last_step, run.config)
    try:
        _write(run.directory / RESULT_NAME, result)
    except OSError as error:
        log.warning("%s cannot be written (%s)", run.directory / RESULT_NAME, error.strerror)


def write_failure(directory: Path, failure: Failure) -> None:
    """Note that a job has failed.

    Raises:
        OSError: the disk refused.
    """
    _write(directory / FAILURE_NAME, failure)


def read_result(directory: Path) -> Result | None:
    """What a run directory says of a run that is done; None if it does not, or nothing that makes sense."""
    return _read(directory / RESULT_NAME, Result)


def read_failure(directory: Path) -> Failure | None:
    """What it says of a job that failed when it was last tried."""
    return _read(directory / FAILURE_NAME, Failure)


def already_done(run: Run) -> float | None:
    """Whether this very run is done, so that there is no need to build anything.

    It is not trusted over `resume=never|PATH`, nor if anything has changed that there might be something to do for: it
    is then forgotten, because what was true of the run need not be true in a moment. Nor where there is a mirror: only
    a look there can tell whether it still has all of it.

    Returns:
        Its best metric; NaN if that never was a number; None if it is not known to be done.
    """
    result = read_result(run.directory)
    if (
        result is not None
        and run.config.get("resume") in ("auto", "required")
        and run.config.get("storage", {}).get("_target_") == f"{LocalStorage.__module__}.{LocalStorage.__name__}"
        and not config_drift(result.config, run.config, free=_FREE)
        and _is_whole(run.directory, result.last_step)
    ):
        value = math.nan if result.value is None else float(result.value)
        log.info(
            "already done: %s %.4f at step %d; trainer.epochs=N goes on, resume=never starts over",
            result.metric,
            value,
            result.step,
        )
        return value
    if (run.directory / RESULT_NAME).exists():
        (run.directory / RESULT_NAME).unlink()
        fsync_directory(run.directory)
    return None


def _is_whole(directory: Path, last_step: int) -> bool:
    """Whether the last checkpoint is there, byte for byte."""
    last = next(reversed(Catalog(directory / "checkpoints").by_step().items()), None)
    if last is None or last[0] != last_step:
        return False
    try:
        verify(last[1])
    except (CorruptCheckpoint, CheckpointError, OSError):
        return False
    return True


def _write(path: Path, content: Result | Failure) -> None:
    temporary = path.with_name(f".tmp_{path.name}")
    write_durably(temporary, json.dumps(asdict(content), indent=2) + "\n")
    temporary.rename(path)
    fsync_directory(path.parent)


def _read(path: Path, kind: type[_Content]) -> _Content | None:
    try:
        content = kind(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    is_one = all(isinstance(getattr(content, name), hint) for name, hint in get_type_hints(kind).items())
    return content if is_one else None
