"""Everything between the command line and our own code: Hydra's objects, and how errors are shown."""

import difflib
import inspect
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.experimental.callback import Callback
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from torch.distributed import is_torchelastic_launched

from src.distributed import is_main_process
from src.errors import ConfigError, HoldfastError, require_no_credentials
from src.preemption import Stopped
from src.run import locked
from src.worker import in_sweep, is_worker, sweep_is_over

log = logging.getLogger(__name__)

_PLAIN_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
_PATIENCE = 30.0  # seconds
_TRACEBACKS = "HOLDFAST_TRACEBACKS"
"""Environment variable: HYDRA_FULL_ERROR as the user has set it, for the jobs of a sweep, too."""


def build(group: str, config: DictConfig, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a config group's `_target_`; if that fails, raise what the user can act on.

    Positional `args` are for a target marked `_partial_: true` (an optimizer waits for its
    parameters): it is then called with `args` and `kwargs`, which stay out of Hydra's hands.

    Raises:
        ConfigError: the target refused its values.
    """
    check_types(group, config)
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
    except (TypeError, ValueError, LookupError, ArithmeticError, OmegaConfBaseException) as error:
        raise ConfigError(group, _call(config), f"cannot be built ({error})") from error


def check_types(group: str, config: DictConfig) -> None:
    """Hold settings against the parameters of the target that will receive them, and plain values against their
    annotations.

    What python would only trip over later, or not at all (`nesterov=perhaps`, `lr=nan`), is an error here.

    Raises:
        ConfigError: names the key, the value, and what it must be.
    """
    if not config.get("_target_"):
        raise ConfigError(group, dict(config), "names no _target_; choose another option of the group")
    target = get_object(config["_target_"])
    if not callable(target):
        raise ConfigError(f"{group}._target_", config["_target_"], "cannot be called; name a class or a function")
    known = _parameters(target)
    for name, value in _settings(config).items():
        if known is not None and name not in known:
            raise ConfigError(f"{group}.{name}", value, f"{config['_target_']} has no such setting; leave it out")
    try:
        hints = get_type_hints(target.__init__ if isinstance(target, type) else target)  # type: ignore[misc]
    except NameError:  # an annotation that only exists for type checkers
        return
    for name, value in _settings(config).items():
        hint = hints.get(name)
        plain = [kind for kind in (get_args(hint) or (hint,)) if kind in _PLAIN_TYPES]
        if not plain or not isinstance(value, tuple(_PLAIN_TYPES)):
            continue
        if type(value) not in plain and not (type(value) is int and float in plain):
            raise ConfigError(f"{group}.{name}", value, f"must be {' or '.join(_PLAIN_TYPES[kind] for kind in plain)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{group}.{name}", value, "must be a finite number")


def _parameters(target: Callable[..., Any]) -> Collection[str] | None:
    """The names that it takes; None if it takes any, or is built in and does not tell."""
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        return None
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return None if takes_any else parameters.keys()


def _settings(config: DictConfig) -> dict[str, Any]:
    return {str(key): value for key, value in config.items() if not str(key).startswith("_")}


def _call(config: DictConfig) -> str:
    return f"{config['_target_']}({', '.join(f'{name}={value}' for name, value in _settings(config).items())})"


@contextmanager
def ending_the_program() -> Iterator[None]:
    """For Hydra's callbacks: of what they raise, Hydra would only make a warning."""
    try:
        yield
    except Exception as error:
        if is_main_process():
            say(f"error: {describe(error)}")
        else:
            time.sleep(_PATIENCE)  # torchrun ends all ranks when one ends: not before rank 0 has said why
        sys.exit(getattr(error, "exit_code", ConfigError.exit_code if isinstance(error, OmegaConfBaseException) else 1))


class BeforeAnythingIsWritten(Callback):
    """Ends the program before Hydra writes a config to the disk that holds a password, or over that of a run that is
    alive."""

    @ending_the_program()
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at the command line, at what it came to, and into the run directory."""
        _refuse_credentials(config)
        directory = Path(config.hydra.run.dir)
        if directory.is_dir() and not is_torchelastic_launched():  # which has to be told not to try again
            with locked(directory):  # for good only later, when Hydra has set up the log
                pass

    @ending_the_program()
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at the command line: values that are swept over are there, or in the sweeper's config."""
        _refuse_credentials(config)


def _refuse_credentials(config: DictConfig) -> None:
    for override in (*config.hydra.overrides.task, *config.hydra.overrides.hydra):
        key, _, value = str(override).partition("=")
        require_no_credentials(key, value)
    for key, value in _texts(OmegaConf.to_container(config)):
        require_no_credentials(key, value)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts of a config, with their dotted keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(item, f"{key}.{name}" if key else str(name))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Show what the user can act on as one line on stderr, and exit with its code.

    Needed twice: around `main()`, where all that can go wrong is what Hydra finds (a config that does not
    compose, a run directory that the operating system refuses), and inside, for what we find. There,
    everything else is a bug and keeps its traceback; so does everything when HYDRA_FULL_ERROR=1 is set,
    Hydra's own switch for that. In a sweep a job's error is raised, and `src.sweep.Sweep` is told of it. That a
    job has stopped ends the sweep; where it is a worker that stops, the others are not to be disturbed, so there it
    is an error like any other.
    """
    logging.raiseExceptions = False  # a log file on a full disk must not bury the message in tracebacks
    os.environ.setdefault(_TRACEBACKS, os.environ.get("HYDRA_FULL_ERROR", "0"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands us the exception instead of printing it
    try:
        if reason := sweep_is_over():
            raise HoldfastError(f"not begun because of {reason}")
        yield
    except Stopped as stopped:
        if is_worker():
            raise HoldfastError(str(stopped)) from None
        if is_main_process():
            say(str(stopped))
        stopped.hand_on()
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:  # before training began
        say("interrupted; run the same command again to go on")
        sys.exit(130)
    except Exception as error:
        in_job = HydraConfig.initialized()
        known = not in_job or isinstance(error, HoldfastError | CompactHydraException | OmegaConfBaseException)
        if os.environ[_TRACEBACKS] != "0" or not known:
            say(traceback.format_exc().rstrip())
        if in_sweep():
            raise
        if known:
            say(f"error: {describe(error)}")
        sys.exit(getattr(error, "exit_code", ConfigError.exit_code if known else 1))


def say(text: str) -> None:
    """Say why the program ends: on the terminal, and in the run's log."""
    print(text, file=sys.stderr)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, text, (), None))


def describe(error: BaseException) -> str:
    """What the user should know of an error, in one line."""
    return " ".join(_text_of(error).split())


def _text_of(error: BaseException) -> str:
    if isinstance(error, HoldfastError):
        return str(error)
    chain = [error]  # what led to it, as far back as there is anything new
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None and earlier not in chain:
        chain.append(earlier)
    for refusal in chain:
        if isinstance(refusal, OSError) and refusal.filename:
            return (
                f"{refusal.filename}: {refusal.strerror}. The run directory must be writable and have free space; "
                "choose another with hydra.run.dir=PATH"
            )
    if isinstance(error, CompactHydraException | OmegaConfBaseException):
        for refusal in chain:
            if isinstance(refusal, HoldfastError):
                return str(refusal)
            if isinstance(refusal, ConfigKeyError | ConfigAttributeError) and refusal.full_key:
                return _no_such_setting(str(refusal.full_key), refusal.parent_node)
            if isinstance(refusal, MissingMandatoryValue) and refusal.full_key:
                return f"{refusal.full_key}: is required; say {refusal.full_key}=VALUE"
        # Hydra keeps the telling half of some messages in the cause.
        if isinstance(error.__cause__, OmegaConfBaseException):
            return f"{error} {error.__cause__}"
    return str(error).partition("\nConfig search path:")[0] or type(error).__name__


def _no_such_setting(key: str, group: Any) -> str:
    """
    Args:
        key: The dotted key that does not exist.
        group: The node of the config in which the last part of it was looked for.
    """
    if not isinstance(group, DictConfig) or not group:  # but a value
        return f"{key}: there is no such setting"
    *path, name = key.split(".")
    beside = {str(other): ".".join((*path, str(other))) for other in group if not str(other).startswith("_")}
    groups = OmegaConf.to_container(group._get_root())
    assert isinstance(groups, dict)
    elsewhere = [f"{other!s}.{name}" for other, keys in groups.items() if isinstance(keys, dict) and name in keys]
    close = [beside[other] for other in difflib.get_close_matches(name, beside, n=1)] or elsewhere
    remedy = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(beside.values())}"
    return f"{key}: there is no such setting; {remedy}"
