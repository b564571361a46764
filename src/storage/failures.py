"""What can go wrong between here and an object store, in one line each, with what to do about it."""

import http.client
from collections.abc import Iterator
from contextlib import contextmanager

import urllib3.exceptions
from boto3.exceptions import Boto3Error
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)


class StoreError(Exception):
    """The store did not do what it was asked to. The text is one line."""

    passing = True
    """Whether the same request may well succeed a little later."""
    code = ""
    """The store's own name for it."""


class Refused(StoreError):
    """The store understood, and will refuse the same request again."""

    passing = False


class NotThere(Refused):
    """There is no such object."""


class Conflict(Refused):
    """A conditional write found another state than it was conditional on."""


_CREDENTIALS = "(boto3 looks at the environment, ~/.aws, and the machine's role; storage.profile chooses a profile)"
_PERMISSIONS = "it takes s3:ListBucket, GetObject, PutObject, DeleteObject and AbortMultipartUpload"
_REGION = "the bucket is in another region; name it in storage.region"
_NO_BUCKET = "there is no bucket of that name; create it, or correct storage.bucket"

# By the store's error code: what it means, and what to do. A HEAD request has no body: its code is the status.
_REFUSALS = {
    "NoSuchBucket": _NO_BUCKET,
    "InvalidBucketName": "that is no valid bucket name; correct storage.bucket",
    "InvalidAccessKeyId": f"the access key is unknown there; renew the credentials {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key does not fit the access key; correct the credentials {_CREDENTIALS}",
    "ExpiredToken": f"the credentials have expired; renew them {_CREDENTIALS}",
    "InvalidToken": f"the session token is not valid; renew the credentials {_CREDENTIALS}",
    "AccessDenied": f"permission denied; {_PERMISSIONS}",
    "Forbidden": f"permission denied; {_PERMISSIONS}",
    "403": f"permission denied; {_PERMISSIONS}",
    "RequestTimeTooSkewed": "this machine's clock is off by minutes; set it (by NTP, say)",
    "RequestExpired": "this machine's clock is off by minutes; set it (by NTP, say)",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "301": _REGION,
    "InvalidStorageClass": "the store has no such storage class; correct storage.storage_class",
}
_NOT_THERE = {"NoSuchKey", "NoSuchUpload", "404", "NotFound"}
_CONFLICTS = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
# What boto3 lets through as it is. Not OSError in general: a disk that is full is another matter.
_NETWORK = (urllib3.exceptions.HTTPError, http.client.HTTPException, ConnectionError, TimeoutError)
# The store is busy, or the bytes were damaged on the way to it: again, please.
_PASSING = {"SlowDown", "ServiceUnavailable", "RequestTimeout", "429"}
_PASSING |= {"BadDigest", "XAmzContentChecksumMismatch", "InvalidDigest", "IncompleteBody"}


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Raise what boto3 and the network raise as a StoreError that says what to do.

    Args:
        where: What is being talked to, for the text; a URL.
    """
    try:
        yield
    except ClientError as error:
        raise _of_response(where, error) from error
    except (BotoCoreError, Boto3Error, *_NETWORK) as error:
        raise _of_connection(where, error) from error


def _of_response(where: str, error: ClientError) -> StoreError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    message = " ".join(str(error.response.get("Error", {}).get("Message", "")).split())[:200]
    answer = f"{code}: {message}" if message and message != code else code
    remedy = _REFUSALS.get(code)
    text = f"{where}: {remedy} (it says {answer})" if remedy else f"{where}: the store says {answer}"
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    passing = code in _PASSING or not 400 <= status < 500
    kind = NotThere if code in _NOT_THERE else Conflict if code in _CONFLICTS else StoreError if passing else Refused
    translated_error = kind(text)
    translated_error.code = code
    return translated_error


def _of_connection(where: str, error: Exception) -> StoreError:
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return Refused(f"{where}: no credentials were found {_CREDENTIALS}")
    if isinstance(error, ProfileNotFound):
        return Refused(f"{where}: {error}; correct storage.profile")
    if isinstance(error, SSLError):
        return Refused(f"{where}: no trusted TLS connection ({_brief(error)}); correct storage.endpoint_url")
    if isinstance(error, EndpointConnectionError | ConnectTimeoutError):
        return StoreError(f"{where}: cannot be reached; check storage.endpoint_url and the network")
    if isinstance(error, ReadTimeoutError):
        return StoreError(f"{where}: does not answer; is the store overloaded, or the network down?")
    if isinstance(error, (ConnectionClosedError, HTTPClientError, ResponseStreamingError, *_NETWORK)):
        return StoreError(f"{where}: the connection broke ({_brief(error)})")
    return Refused(f"{where}: {_brief(error)}")


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
