"""A run and its directory: what names it, who may write to it, and when its config has drifted."""

import fcntl
import logging
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from src.errors import ConfigError, HoldfastError
from src.worker import in_sweep

log = logging.getLogger(__name__)

RESULT_NEUTRAL = (
    "checkpoint",
    "storage",
    "run",
    "resume",
    "trainer.epochs",
    "trainer.device",
    "trainer.strategy",
    "trainer.workers",
    "trainer.deterministic",
    "trainer.log_every",
    "trainer.grace",
    "trainer.on_nan",
    "preemption",
    "data.download",
)
"""Config keys, with all below them, that do not say what is trained, only how long, where, or how it is watched.

They are no part of a run's name, and changing them does not keep a run from going on.
"""

_NEUTRAL_CHOICES = ("trainer=default", "trainer=ddp", "trainer=fsdp")
"""Options of a group that differ in nothing else."""

_NAME_ONLY = ("init_from", "data.root")
"""Part of the name, yet free to change later: weights matter only at step 0, and data may move (what is in
them is compared by itself, as `data_set`)."""

_NAME_LIMIT = 120  # characters; file systems allow 255, and tools add to it
_LOCK_PATIENCE = 3.0  # seconds: a process that was just killed takes a moment to let go
_SWEEP_LOCK_PATIENCE = 90.0  # and the workers of a sweep that was killed save what they are at
_SUBMITIT = "SUBMITIT_EXECUTOR"  # environment variable of jobs that outlive the sweep they come from


def is_neutral(key: str, neutral: Sequence[str] = RESULT_NEUTRAL) -> bool:
    """Whether a dotted config key leaves the result as it is."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in neutral)


def run_name(name: str | None, overrides: Sequence[str]) -> str:
    """The name of the run directory: `name` if given, else made from the overrides that change the result.

    The same command, also with its overrides in another order or written otherwise (`1e-1`, `0.1`), has
    the same name. It holds no `=` or `,`, which Hydra's command line would need quoted in
    `resume=outputs/…`. Where making it readable lost something, a hash keeps names apart.

    Raises:
        ConfigError: `name` would not be a plain folder name.
    """
    if name is not None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", str(name)):
            raise ConfigError("run", name, "must be a plain name of letters, digits, '.', '_' and '-'")
        return str(name)
    exact = [f"{key}={_written(override)}" for key, override in sorted(_changing_the_result(overrides).items())]
    if not exact:
        return "default"
    readable = [re.sub(r"[^A-Za-z0-9._-]+", "-", part.replace("=", "-", 1).replace("e+", "e")) for part in exact]
    slug = "__".join(readable)
    lossless = all(re.fullmatch(r"[A-Za-z0-9._]+=[A-Za-z0-9._-]*", part) and "__" not in part for part in exact)
    if lossless and len(slug) <= _NAME_LIMIT:
        return slug
    digest = blake2b("\n".join(exact).encode(), digest_size=4).hexdigest()
    return f"{slug[:_NAME_LIMIT].rstrip('-._')}-{digest}"


def _changing_the_result(overrides: Sequence[str]) -> dict[str, Override]:
    """Those that do, by key."""
    found = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.get_key_element().lstrip("+")
        if not is_neutral(key) and f"{key}={_written(override)}" not in _NEUTRAL_CHOICES:
            found[key] = override
    return found


def _written(override: Override) -> str:
    """Its value, the same however it was typed."""
    return str(override.get_value_string() if override.is_sweep_override() else override.get_value_element_as_str())


def register_resolvers() -> None:
    """Make `${run_name:…}` available to conf/config.yaml."""
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)


@dataclass(frozen=True)
class Run:
    """One run: its directory is its identity, and the key of resume."""

    directory: Path
    name: str
    """Of the run among all others, on whatever machine: its directory as the command names it, without `outputs/`."""
    config: dict[str, Any]
    """The resolved config, without Hydra's own part."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that tell runs apart, by dotted key, for people to compare; those of a sweep's job are its
        overrides."""
        if in_sweep():
            overrides = _changing_the_result(HydraConfig.get().overrides.task)
            return {key: override.value() for key, override in overrides.items()}
        return {
            key.removesuffix("._target_"): value
            for key, value in flatten(self.config).items()
            if not is_neutral(key) and not key.endswith("._partial_")
        }

    @classmethod
    @contextmanager
    def open(cls, config: DictConfig, is_main: bool = True) -> Iterator["Run"]:
        """The run that Hydra made a directory for, locked.

        Args:
            is_main: Whether this is the process that writes; of several ranks only one is.

        Raises:
            HoldfastError: another process has the lock; names it.
        """
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        assert isinstance(resolved, dict)
        directory = Path(HydraConfig.get().runtime.output_dir)
        with locked(directory) if is_main else nullcontext():
            name = name_of(directory, Path(HydraConfig.get().runtime.cwd))
            yield cls(directory, name, {str(key): value for key, value in resolved.items()})


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Be the only process that writes to a run directory. The kernel lets go of the lock when the process ends,
    however it ends.

    Raises:
        HoldfastError: another process has the lock; names it.
        ConfigError: the directory cannot be written to.
    """
    # Not inheritable, so neither workers nor helpers keep a dead run locked.
    try:
        file = (directory / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError("hydra.run.dir", directory, f"cannot be written to ({error.strerror})") from error
    with file:
        _acquire(file, directory)
        file.seek(0)
        file.truncate()
        file.write(holder(os.getpid()))
        file.flush()
        yield


def holder(process: int) -> str:
    """What a process of this machine is called in the locks that it holds."""
    return f"process {process} on {socket.gethostname()}"


def holder_of(directory: Path) -> str | None:
    """Who writes to a run directory just now, if anybody does."""
    try:
        with (directory / ".lock").open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read()
    except OSError:  # none there, or a file system without locks
        pass
    return None


def name_of(directory: Path, start: Path) -> str:
    """What a run is called among all others, on whatever machine.

    Args:
        directory: The run directory.
        start: Where the command was given.

    Returns:
        Its path from `outputs/`; from `start` if it is not there; or all of it if it is elsewhere altogether.
    """
    for base in (start / "outputs", start):
        if directory.is_relative_to(base) and directory != base:
            return directory.relative_to(base).as_posix()
    return directory.as_posix().strip("/") or "root"


def _acquire(file: IO[str], directory: Path) -> None:
    patience = _LOCK_PATIENCE
    if in_sweep():
        patience = math.inf if _SUBMITIT in os.environ else _SWEEP_LOCK_PATIENCE
    started = time.monotonic()
    deadline = started + patience
    said = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                raise HoldfastError(
                    f"{directory} is being written by {file.read() or 'another process'}; wait for it or stop it, "
                    "or give this run a directory of its own with run=NAME"
                ) from None
            if not said and time.monotonic() > started + _LOCK_PATIENCE:
                log.info("waiting for another process to let go of %s", directory)
                said = True
            time.sleep(0.1)
        except OSError as error:
            log.warning("%s cannot be locked (%s): see to it that only one process trains there", directory, error)
            return


def config_drift(
    saved: Mapping[str, Any], current: Mapping[str, Any], free: Sequence[str] = RESULT_NEUTRAL + _NAME_ONLY
) -> list[str]:
    """The settings that change the result (all but the `free` ones) and differ, each as `key: saved -> current`."""
    before, now = flatten(saved), flatten(current)
    absent = "(absent)"
    return [
        f"{key}: {before.get(key, absent)} -> {now.get(key, absent)}"
        for key in sorted(before.keys() | now.keys())
        if not is_neutral(key, free) and before.get(key, absent) != now.get(key, absent)
    ]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + str(key)] = value
    return flat
