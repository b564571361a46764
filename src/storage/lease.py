"""One writer per prefix: an object that its owner renews, and that nobody else may replace while he does.

Every write to it is conditional on its ETag (cf. Chubby's lock service, Burrows, OSDI '06, and its sequencers): of
two machines that both think the lease is theirs, the store lets only one renew it, and the other learns of it.
"""

import json
import logging
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

from src.background import yield_to_training
from src.errors import HoldfastError
from src.storage.bucket import Bucket
from src.storage.failures import Conflict, NotThere, StoreError

log = logging.getLogger(__name__)

_LOOK = 1.0  # seconds between looks at a lease that is another's


@dataclass(frozen=True)
class _Seen:
    """A lease as it stands in the bucket."""

    etag: str
    age: float
    """Seconds since it was last renewed, by the store's clock."""
    nonce: str
    home: str
    holder: str
    seconds: float


class Lease:
    """The right to write under a prefix. Renewed by a thread of its own from `acquire` to `release`."""

    def __init__(self, bucket: Bucket, key: str, *, home: str, holder: str, seconds: float) -> None:
        """
        Args:
            home: The run directory, as a name that no other directory on any machine has. A lease that was left
                behind there is taken over at once: only one process at a time runs in a run directory.
            holder: Who this is, for the message that another gets.
            seconds: For how long it is valid without being renewed.
        """
        self.lost = False
        """Whether another has taken it over. This machine must not write any more."""
        self._bucket = bucket
        self._key = key
        self._home = home
        self._holder = holder
        self._seconds = seconds
        self._nonce = uuid.uuid4().hex
        self._renewals = 0
        self._etag = ""
        self._renewed_at = 0.0  # by `_now`; 0 while it is not held
        self._one_at_a_time = threading.Lock()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)

    def acquire(self) -> None:
        """Take it: at once if it is free or was left behind here, else as soon as its time has run out.

        Raises:
            HoldfastError: another machine holds it, and is alive.
            StoreError: the store cannot be asked.
        """
        waiting_for: _Seen | None = None
        while not self._held:
            seen = self._look()
            try:
                if seen is None:
                    self._write(if_absent=True)
                elif seen.home == self._home or seen.age > seen.seconds:
                    if seen.home != self._home:
                        log.warning(
                            "%s: taken over from %s, which has not renewed it for %.0f s",
                            self._bucket.url(self._key),
                            seen.holder,
                            seen.age,
                        )
                    self._write(if_match=seen.etag)
            except Conflict:  # somebody was faster: look again
                time.sleep(_LOOK)
                continue
            if self._held or seen is None:
                continue
            if waiting_for is None:
                waiting_for = seen
                log.warning(
                    "%s is held by %s, who renewed it %.0f s ago: waiting up to %.0f s to see whether it is alive",
                    self._bucket.url(self._key),
                    seen.holder,
                    seen.age,
                    seen.seconds - seen.age,
                )
            elif waiting_for.etag != seen.etag:
                raise HoldfastError(
                    f"{self._bucket.url(self._key)}: {seen.holder} is writing there, and is alive; stop it, or give "
                    "this run a place of its own with run=NAME or storage.prefix=…"
                )
            time.sleep(_LOOK)
        self._thread.start()

    def confirm(self) -> None:
        """To be called before anything is written that two machines must not both write.

        Raises:
            StoreError: it is not known to be ours just now.
        """
        if not self.lost and _now() - self._renewed_at > self._seconds / 2:
            self._renew()
        if self.lost:
            raise StoreError(f"{self._bucket.url(self._key)} has been taken over by another machine")

    def release(self) -> None:
        """Stop renewing, and leave the prefix to whoever comes next. Never fails: in the worst case it runs out."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._held and not self.lost:
            try:
                self._renew()  # it is deleted only if it is still ours
                if not self.lost:
                    self._bucket.delete(self._key)
            except StoreError as error:
                log.debug("the lease is left to run out: %s", error)
        self._renewed_at = 0.0

    @property
    def _held(self) -> bool:
        return self._renewed_at > 0.0

    def _keep_renewing(self) -> None:
        yield_to_training()
        while not self._released.wait(self._seconds / 3) and not self.lost:
            try:
                self._renew()
            except Exception as error:  # the mirror is loud enough about an outage
                log.debug("the lease could not be renewed: %s", error)

    def _renew(self) -> None:
        with self._one_at_a_time:
            try:
                self._write(if_match=self._etag)
                return
            except Conflict:
                seen = self._look()
            except NotThere:
                seen = None
            if seen is not None and seen.nonce == self._nonce:
                # An earlier renewal arrived, only its answer did not. That may be long ago.
                self._write(if_match=seen.etag)
                return
            self.lost = True
            log.error(
                "%s has been taken over by %s: nothing more is mirrored from here",
                self._bucket.url(self._key),
                seen.holder if seen else "somebody who has deleted it",
            )

    def _write(self, *, if_absent: bool = False, if_match: str | None = None) -> None:
        self._renewals += 1  # another body each time, hence another ETag
        body = {
            "nonce": self._nonce,
            "home": self._home,
            "holder": self._holder,
            "seconds": self._seconds,
            "renewals": self._renewals,
        }
        asked_at = _now()  # its time runs from here at the latest
        self._etag = self._bucket.put(self._key, json.dumps(body).encode(), if_absent=if_absent, if_match=if_match)
        self._renewed_at = asked_at

    def _look(self) -> _Seen | None:
        try:
            found = self._bucket.get(self._key)
        except NotThere:
            return None
        try:
            data: Any = json.loads(found.body)
            nonce, home, holder, seconds = (data[key] for key in ("nonce", "home", "holder", "seconds"))
            valid = all(isinstance(text, str) for text in (nonce, home, holder)) and 0 < float(seconds) < 86_400
        except (ValueError, TypeError, KeyError):
            valid = False
        if not valid:  # not one of ours: it is in nobody's way for longer than one of ours would be
            return _Seen(found.etag, found.age, "", "", "something unreadable", self._seconds)
        return _Seen(found.etag, found.age, nonce, home, " ".join(holder.split())[:200], float(seconds))


def _now() -> float:
    """A monotonic clock that goes on while the machine sleeps, as the lease does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
