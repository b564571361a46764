"""A store that does not answer for a while: how long to pause between tries, and when to say so again."""

import logging
import random
import time

log = logging.getLogger(__name__)

_FIRST_PAUSE = 1.0  # seconds, then twice as long each time
_LONGEST_PAUSE = 60.0
_LONGEST_PAUSE_AT_THE_END = 5.0  # while the end of the run waits
_WARN_AGAIN = 60.0  # seconds after the first warning; then ever more seldom


class Outage:
    """One outage, or none."""

    def __init__(self) -> None:
        self.reason = ""
        """What is wrong just now; empty if nothing is."""
        self._since: float | None = None
        self._warn_at = 0.0
        self._pause = _FIRST_PAUSE
        # Of its own: python's global generator is part of a checkpoint.
        self._jitter = random.Random()  # noqa: S311

    @property
    def because(self) -> str:
        """The reason in brackets, to be put after a sentence."""
        return f" ({self.reason})" if self.reason else ""

    def failed(self, error: Exception, at_risk: str, hurry: bool) -> float:
        """Note a try that failed, and warn unless that was done a moment ago.

        Args:
            at_risk: What the outage puts at risk, for people.
            hurry: Whether somebody waits for it to end.

        Returns:
            Seconds to pause before the next try.
        """
        now = time.monotonic()
        self.reason = str(error)
        if self._since is None:
            self._since = self._warn_at = now
        if now >= self._warn_at:
            lasting = now - self._since
            self._warn_at = now + max(_WARN_AGAIN, lasting)
            since = f" (since {lasting:.0f} s)" if lasting >= 1 else ""
            log.warning("mirror: %s. Training goes on, and so do the tries%s; %s", error, since, at_risk)
        pause = min(self._pause, _LONGEST_PAUSE_AT_THE_END if hurry else _LONGEST_PAUSE)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return pause * self._jitter.uniform(0.5, 1.0)

    def over(self) -> None:
        """Note a try that worked."""
        if self._since is not None:
            log.info("mirror: works again, after %.0f s", time.monotonic() - self._since)
        self._since, self.reason, self._pause = None, "", _FIRST_PAUSE
