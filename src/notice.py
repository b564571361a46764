"""Notices that a machine will be taken back, beside the signals that every scheduler sends."""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from botocore.exceptions import BotoCoreError
from botocore.utils import BadIMDSRequestError, IMDSFetcher

from src.background import yield_to_training
from src.errors import ConfigError, require_endpoint, require_number
from src.preemption import Stop

log = logging.getLogger(__name__)

_PATHS = {
    "spot/instance-action": "an EC2 spot interruption notice",
    "events/recommendations/rebalance": "an EC2 rebalance recommendation",
}


class SignalsOnly:
    """No other notices than signals."""

    @contextmanager
    def watch(self, stop: Stop) -> Iterator[None]:
        """Watch for notices while entered: there are none."""
        yield


class Ec2Notice:
    """EC2's word, two minutes before, that it takes a spot instance back.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    """

    def __init__(self, endpoint_url: str, every: float = 5.0, rebalance: bool = False) -> None:
        """
        Args:
            endpoint_url: Of the instance's metadata service.
            every: Seconds between questions.
            rebalance: Stop at a rebalance recommendation, too: the instance is at a higher risk than others.

        Raises:
            ConfigError: a value cannot work; this is no EC2 instance, or its metadata service is out of reach.
        """
        require_endpoint("preemption.endpoint_url", endpoint_url, "http://169.254.169.254/")
        require_number("preemption.every", every, "seconds between questions", above=0, below=120)
        self.every = every
        self._metadata = _Metadata(timeout=2, base_url=endpoint_url, env={})
        self._paths = list(_PATHS) if rebalance else list(_PATHS)[:1]
        try:
            self._notice()
        except _NoAnswer as error:
            raise ConfigError(
                "preemption",
                "ec2",
                f"there is no metadata service at {self._metadata.get_base_url()}; is this an EC2 instance, "
                "and its hop limit 2 or more for a container? Else use preemption=signals",
            ) from error

    @contextmanager
    def watch(self, stop: Stop) -> Iterator[None]:
        """Ask in the background while entered; a notice is a request to stop."""
        over = threading.Event()
        thread = threading.Thread(target=self._ask, args=(stop, over), name="ec2-notice", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _ask(self, stop: Stop, over: threading.Event) -> None:
        yield_to_training()
        warned = False
        while True:
            try:
                notice = self._notice()
                warned = False
            except _NoAnswer:
                notice = None
                if not warned:
                    log.warning("the metadata service does not answer any more; it is asked again")
                warned = True
            if notice is not None:
                log.warning("%s: training stops here", notice)
                stop.request(notice)
                return
            if over.wait(self.every):
                return

    def _notice(self) -> str | None:
        for path in self._paths:
            text = self._metadata.read(path)
            if text is not None:
                return f"{_PATHS[path]}{_when(text)}"
        return None


class _NoAnswer(Exception):
    """The metadata service cannot be asked just now."""


class _Metadata(IMDSFetcher):  # the part of botocore that gets credentials on EC2: tokens, proxies, time-outs
    _RETRIES_EXCEEDED_ERROR_CLS = _NoAnswer

    def read(self, path: str) -> str | None:
        """Returns what is there; None for 404, which is how the service says that there is nothing of the kind.

        Raises:
            _NoAnswer: it cannot be asked.
        """
        try:
            token = self._fetch_metadata_token()
            answer = self._get_request(f"latest/meta-data/{path}", _is_no_answer, token)
        except (BotoCoreError, BadIMDSRequestError) as error:
            raise _NoAnswer from error
        return answer.text if answer.status_code == 200 else None


def _is_no_answer(response: Any) -> bool:
    return response.status_code not in (200, 404)


def _when(text: str) -> str:
    try:
        notice = json.loads(text)
        return f" ({notice.get('action', 'since')} {notice.get('time') or notice.get('noticeTime')})"
    except (ValueError, AttributeError):
        return ""
