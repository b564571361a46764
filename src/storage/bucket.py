"""One S3 bucket, by way of boto3: small objects by value, with errors that say what to do."""

import base64
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

import boto3
import botocore.retryhandler
import botocore.utils
from awscrt.checksums import crc64nvme
from botocore.config import Config

from src.storage.failures import NotThere, Refused, StoreError, translated

# botocore draws its pauses from python's global generator, also in the background, when it renews credentials. That
# generator is part of a checkpoint, so it gets one of its own.
botocore.utils.random = botocore.retryhandler.random = random.Random()  # noqa: S311

logging.getLogger("botocore.credentials").setLevel(logging.WARNING)  # it tells of each client where it found them

_SMALL = 64 * 1024 * 1024  # bytes
_CONNECTIONS = 32


class Cancelled(Refused):
    """The request was given up because the process is about to end."""


@dataclass(frozen=True)
class Object:
    """A small object, read as a whole."""

    body: bytes
    etag: str
    age: float
    """Seconds since it was written, by the store's own clock."""


@dataclass(frozen=True)
class Stat:
    """What the store says of an object."""

    size: int
    crc: int | None
    """CRC-64/NVME of the whole object; None if the store keeps none."""

    def __str__(self) -> str:
        return f"{self.size} bytes, checksum {'unknown' if self.crc is None else f'crc64nvme:{self.crc:016x}'}"


class Bucket:
    """One bucket, and how to reach it. Safe to be used by several threads."""

    def __init__(
        self,
        name: str,
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        profile: str | None = None,
        write_options: dict[str, str] | None = None,
        bytes_per_second: float | None = None,
        read_timeout: float = 30.0,
        tries: int = 5,
    ) -> None:
        """
        Args:
            endpoint_url: Of an S3-compatible store; None for AWS.
            profile: Of ~/.aws; credentials come from boto3's own chain in any case.
            write_options: Arguments of `put_object` and `create_multipart_upload`: encryption, storage class.
            bytes_per_second: Upper bound of what `pace` lets through; None for none.
            read_timeout: Seconds without a byte, after which a connection is taken to be dead.
            tries: Of each request, if what goes wrong may pass; with pauses of 0.2, 0.8, 3.2 … seconds.

        Raises:
            StoreError: the settings make no client (an unknown profile, a malformed URL).
        """
        self.name = name
        self.write_options = write_options or {}
        self._tries = tries
        self._rate = bytes_per_second
        self._line = threading.Lock()
        self._line_is_free_at = 0.0
        self._cancelled = threading.Event()
        config = Config(
            connect_timeout=5,
            read_timeout=read_timeout,
            # Ours instead: botocore draws its pauses from python's global generator, which is part of a checkpoint.
            retries={"total_max_attempts": 1, "mode": "standard"},
            max_pool_connections=_CONNECTIONS,
            request_checksum_calculation="when_required",  # ours is sent instead
            response_checksum_validation="when_required",
            # What is signed is the checksum's header; hashing the body too would take longer than sending it.
            s3={"payload_signing_enabled": False},
        )
        with translated(self.url("")):
            try:
                session = boto3.session.Session(profile_name=profile, region_name=region)
                self._client: Any = session.client("s3", endpoint_url=endpoint_url, config=config)
            except ValueError as error:  # a URL that is none
                raise Refused(f"{endpoint_url}: {error}; correct storage.endpoint_url") from error

    def url(self, key: str) -> str:
        """How a person would write it."""
        return f"s3://{self.name}/{key}"

    def cancel(self) -> None:
        """Have requests from now on end with `Cancelled`, and those that wait for their turn or a retry at once."""
        self._cancelled.set()

    def pace(self, nbytes: int) -> None:
        """Wait until the line is free for another `nbytes` bytes, all threads taken together."""
        delay = 0.0
        if self._rate is not None:
            with self._line:
                now = time.monotonic()
                start = max(now, self._line_is_free_at)
                self._line_is_free_at = start + nbytes / self._rate
                delay = start - now
        if self._cancelled.wait(delay):
            raise Cancelled("given up")

    def ask(
        self, operation: str, key: str | None = None, confirm: Callable[[], None] = lambda: None, /, **parameters: Any
    ) -> Any:
        """One request of boto3's client, tried again if what went wrong may pass.

        A response's `Body`, if there is one, is read: what the network does to it counts as part of the request.

        Args:
            operation: As boto3 calls it; "put_object", say.
            key: Of the object, if it is about one.
            confirm: Called before each try; if it raises, there is none.

        Raises:
            StoreError: it failed.
        """
        if key is not None:
            parameters["Key"] = key
        for attempt in itertools.count(1):
            if self._cancelled.is_set():
                raise Cancelled("given up")
            confirm()
            try:
                with translated(self.url(key or parameters.get("Prefix", ""))):
                    answer = getattr(self._client, operation)(Bucket=self.name, **parameters)
                    if "Body" in answer:
                        answer["Body"] = answer["Body"].read()
                    return answer
            except StoreError as error:
                if not error.passing or attempt >= self._tries:
                    raise
                self._cancelled.wait(0.2 * 4 ** (attempt - 1))
        raise AssertionError

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        """All keys that begin with `prefix`, in order, with their sizes in bytes; a request per thousand."""
        more: dict[str, str] = {}
        while True:
            page = self.ask("list_objects_v2", Prefix=prefix, **more)
            yield from ((entry["Key"], entry["Size"]) for entry in page.get("Contents", ()))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def get(self, key: str) -> Object:
        """Read a small object: of a larger one, no more than the first 64 MB, so that nobody can fill our memory.

        Raises:
            NotThere: there is none.
        """
        try:
            answer = self.ask("get_object", key, Range=f"bytes=0-{_SMALL - 1}")
        except Refused as error:
            if error.code not in ("InvalidRange", "416"):
                raise
            answer = self.ask("get_object", key)  # it is empty
        return Object(
            answer["Body"], answer["ETag"], _age(answer["ResponseMetadata"]["HTTPHeaders"], answer["LastModified"])
        )

    def put(
        self,
        key: str,
        body: bytes,
        *,
        if_absent: bool = False,
        if_match: str | None = None,
        confirm: Callable[[], None] = lambda: None,
    ) -> str:
        """Write a small object; on a condition: there is none of that name, or it has this ETag.

        Args:
            confirm: As in `ask`.

        Returns:
            Its ETag.

        Raises:
            Conflict: the condition does not hold; or does not any more when the request is repeated, because the
                first time it succeeded and only the answer was lost.
        """
        conditions = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_match} if if_match else {}
        checksum = encode_crc(crc64nvme(body))
        options = {"ChecksumCRC64NVME": checksum, **conditions, **self.write_options}
        answer = self.ask("put_object", key, confirm, Body=body, **options)
        return str(answer["ETag"])

    def delete(self, key: str, confirm: Callable[[], None] = lambda: None) -> None:
        """Delete an object. No error if there is none."""
        self.ask("delete_object", key, confirm)

    def stat(self, key: str) -> Stat | None:
        """Size and checksum; None if there is no such object."""
        try:
            answer = self.ask("head_object", key, ChecksumMode="ENABLED")
        except NotThere:
            return None
        checksum = answer.get("ChecksumCRC64NVME")
        crc = int.from_bytes(base64.b64decode(checksum), "big") if checksum else None
        return Stat(answer["ContentLength"], crc)


def encode_crc(crc: int) -> str:
    """A CRC-64 as S3's headers write it."""
    return base64.b64encode(crc.to_bytes(8, "big")).decode()


def _age(headers: dict[str, str], written: datetime) -> float:
    now = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(written.tzinfo)
    return (now - written).total_seconds()
