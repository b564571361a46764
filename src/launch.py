"""Everything between the command line and our own code: Hydra's objects, and how errors are shown."""

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from src.errors import ConfigError, HoldfastError

_WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR", "0") != "0"


def build(group: str, config: DictConfig, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a config group's `_target_`; if that fails, raise what the user can act on.

    Positional `args` are for a target marked `_partial_: true` (an optimizer waits for its
    parameters): it is then called with `args` and `kwargs`, which stay out of Hydra's hands.

    Raises:
        ConfigError: the target refused its values.
    """
    try:
        if config.get("_partial_"):
            return instantiate(config)(*args, **kwargs)
        return instantiate(config, **kwargs)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, HoldfastError):
            raise cause from None
        reason = f"{type(cause).__name__}: {cause}" if cause else str(error)
        raise ConfigError(group, _call(config), f"cannot be built ({reason})") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(group, _call(config), f"cannot be built ({error})") from error


def _call(config: DictConfig) -> str:
    settings = {str(key): value for key, value in config.items()}
    values = ", ".join(f"{key}={value}" for key, value in settings.items() if not key.startswith("_"))
    return f"{settings.get('_target_')}({values})"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Show what the user can act on as one line on stderr, and exit with its code.

    Needed twice: around `main()`, for what Hydra finds (a config that does not compose, a run directory
    that the operating system refuses), and inside, for what we find. Everything else is a bug and keeps
    its traceback; so does everything when HYDRA_FULL_ERROR=1 is set, Hydra's own switch for that. In a
    sweep a job's error is raised: what it means to the other jobs is the launcher's business.
    """
    logging.raiseExceptions = False  # a log file on a full disk must not bury the message in tracebacks
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands us the exception instead of printing it
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        in_job = HydraConfig.initialized()
        if in_job and HydraConfig.get().mode is RunMode.MULTIRUN:
            raise
        known = isinstance(error, HoldfastError | CompactHydraException | OmegaConfBaseException)
        refused = isinstance(error, OSError) and not in_job  # Hydra could not make the run directory
        if _WANTS_TRACEBACK or not (known or refused):
            traceback.print_exc()
        if known or refused:
            print(f"error: {' '.join(_describe(error).split())}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", ConfigError.exit_code if known or refused else 1))


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename:
        return (
            f"{error.filename}: {error.strerror}. The run directory must be writable and have free space; "
            "choose another with hydra.run.dir=PATH"
        )
    # Hydra keeps the telling half of some messages in the cause.
    cause = error.__cause__
    if isinstance(error, CompactHydraException) and isinstance(cause, OmegaConfBaseException):
        return f"{error} {cause}"
    return str(error) or type(error).__name__
