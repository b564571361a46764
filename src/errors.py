"""The errors a user can act on, and the checks that raise them. Each is shown as one line."""

import json
import math
import re
from typing import Any
from urllib.parse import urlsplit


class HoldfastError(Exception):
    """Something the user can put right. Its text is one line: what was found, and what to do."""

    exit_code = 1


class ConfigError(HoldfastError):
    """A config value that cannot work. Names the key, the value, and the remedy."""

    exit_code = 2

    def __init__(self, key: str, value: Any, remedy: str) -> None:
        as_written = json.dumps(value) if value is None or isinstance(value, bool) else value
        super().__init__(f"{key}={as_written}: {remedy}")


class CheckpointError(HoldfastError):
    """Checkpoints can not be written, or exist and can not be read."""

    exit_code = 3


class MirrorError(HoldfastError):
    """Training has done what it could, but the mirror is not what it should be."""

    exit_code = 4


class PeerLost(HoldfastError):
    """Another of the processes that train together has ended."""


class WorkerLost(HoldfastError):
    """One of the processes that load data has ended."""


class DivergedError(HoldfastError):
    """The loss is NaN or infinite."""

    exit_code = 5


def require_int(key: str, value: Any, minimum: int, what: str) -> None:
    """Raise ConfigError unless `value` is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(key, value, f"must be a whole number >= {minimum} ({what})")


def require_number(
    key: str,
    value: Any,
    what: str,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raise ConfigError unless `value` is a finite number within the bounds."""
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or value < at_least or value <= above or value >= below:
        bounds = ((">=", at_least), (">", above), ("<", below))
        wanted = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if math.isfinite(bound))
        raise ConfigError(key, value, f"must be a number {wanted} ({what})")


def require_endpoint(key: str, url: str, example: str) -> None:
    """Raise ConfigError unless `url` is one of HTTP that names a host and holds no credentials."""
    require_no_credentials(key, url)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(key, url, f"must be like {example}")


# Up to the @ there is no slash in a URL, or one in the password, which is then no port.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/\s]*@|[^/\s:]+:(?!\d*(?:/|$))[^\s@]*@)")


def require_no_credentials(key: str, text: str) -> None:
    """Raise ConfigError, without repeating them, if a URL in `text` holds a user's name or password."""
    if _CREDENTIALS.search(text):
        raise ConfigError(
            key,
            _CREDENTIALS.sub("", text),
            "must not hold credentials, which would end up in files and logs; boto3 finds them in the environment, "
            "~/.aws, or the machine's role",
        )


def require_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(key, value, f"must be one of {', '.join(choices)}")
