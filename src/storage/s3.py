"""The `storage=s3` group: where the mirror is, and the check that it can be written to before the run begins."""

import re
import uuid
from contextlib import suppress
from pathlib import Path

from src.errors import CheckpointError, ConfigError, require_choice, require_endpoint, require_int, require_number
from src.storage.bucket import Bucket
from src.storage.failures import Conflict, Refused, StoreError
from src.storage.local import LocalStorage

_MB = 1e6
_OTHER_ETAG = f'"{"0" * 32}"'


class S3Storage(LocalStorage):
    """Keep checkpoints in the run directory, and mirror them to a bucket: AWS S3, or what speaks its protocol."""

    def __init__(
        self,
        bucket: str | None,
        prefix: str = "holdfast",
        endpoint_url: str | None = None,
        region: str | None = None,
        profile: str | None = None,
        encryption: str | None = None,
        kms_key_id: str | None = None,
        storage_class: str | None = None,
        every: int = 1,
        keep: int | None = None,
        max_mb_per_second: float | None = None,
        flush_timeout: float = 600.0,
        lease_seconds: float = 60.0,
        min_free_gb: float = 1.0,
    ) -> None:
        """
        Args:
            bucket: The bucket's name. It must exist.
            prefix: What stands before the run's name in all keys; "" for nothing.
            endpoint_url: Of an S3-compatible store; None for AWS, or what boto3's own settings say.
            region: Of the bucket; None for what boto3's own settings say.
            profile: Of ~/.aws. There is no setting for a secret: boto3 finds credentials by its own chain.
            encryption: `AES256` or `aws:kms` on the server; None for the bucket's default.
            kms_key_id: The key for `aws:kms`; None for the account's.
            storage_class: As S3 calls it, `STANDARD_IA` say; None for the bucket's default.
            every: Mirror one out of so many checkpoints; the last one of a run always.
            keep: Newest checkpoints to keep in the bucket; None for as many as `checkpoint.keep`.
            max_mb_per_second: Upper bound of the traffic (10⁶ bytes), in each direction; None for none.
            flush_timeout: Seconds that the end of a run waits for what is not mirrored yet.
            lease_seconds: After this long without a sign of life another machine may go on with the run.
            min_free_gb: Disk space (10⁹ bytes) that the run's checkpoints must leave free.

        Raises:
            ConfigError: a value cannot work.
        """
        super().__init__(min_free_gb)
        if not bucket:
            raise ConfigError("storage.bucket", bucket, "name the bucket to mirror to: storage.bucket=NAME")
        if "/" in bucket:
            raise ConfigError("storage.bucket", bucket, "must be a bucket's name alone; a path goes in storage.prefix")
        if not re.fullmatch(r"([\w.-]+(/[\w.-]+)*)?", prefix) or {".", ".."} & set(prefix.split("/")):
            raise ConfigError("storage.prefix", prefix, "must be names of letters, digits, '.', '_', '-' between '/'s")
        if endpoint_url is not None:
            require_endpoint("storage.endpoint_url", endpoint_url, "https://host:port")
        if encryption is not None:
            require_choice("storage.encryption", encryption, ("AES256", "aws:kms"))
        if kms_key_id is not None and encryption != "aws:kms":
            raise ConfigError("storage.kms_key_id", kms_key_id, "takes storage.encryption=aws:kms")
        require_int("storage.every", every, 1, "mirror one out of so many checkpoints")
        if keep is not None:
            require_int("storage.keep", keep, 1, "newest checkpoints to keep in the bucket; or null")
        if max_mb_per_second is not None:
            require_number("storage.max_mb_per_second", max_mb_per_second, "megabytes per second; or null", above=0)
        require_number("storage.flush_timeout", flush_timeout, "seconds to wait at the end of a run", at_least=0)
        require_number(
            "storage.lease_seconds", lease_seconds, "seconds without a sign of life", at_least=3, below=86_400
        )
        self.bucket = bucket
        self.prefix = prefix
        self.every = every
        self.keep = keep
        self.flush_timeout = flush_timeout
        self.lease_seconds = lease_seconds
        self._connection = {"endpoint_url": endpoint_url, "region": region, "profile": profile}
        options = {"ServerSideEncryption": encryption, "SSEKMSKeyId": kms_key_id, "StorageClass": storage_class}
        self._write_options = {name: value for name, value in options.items() if value is not None}
        self._bytes_per_second = max_mb_per_second and max_mb_per_second * _MB

    def connect(self, bucket: str | None = None, **options: float) -> Bucket:
        """A client for the bucket, or for another one that a URL names, at the same place."""
        return Bucket(
            bucket or self.bucket,
            write_options=self._write_options,
            bytes_per_second=self._bytes_per_second,
            **self._connection,  # type: ignore[arg-type]
            **options,  # type: ignore[arg-type]
        )

    def key(self, name: str) -> str:
        """The full key of something below the prefix."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def preflight(self, directory: Path, checkpoint_bytes: int, copies: int, makes_room: bool = True) -> None:
        """Besides the disk, find out whether the bucket can be listed, written to, read from and deleted in.

        Raises:
            ConfigError: it cannot, and why; or the disk is not fit.
            CheckpointError: it cannot just now; that may pass.
        """
        # Rotation leaves alone what is being uploaded.
        super().preflight(directory, checkpoint_bytes, copies + 1, makes_room)
        key, body = self.key(f".probe-{uuid.uuid4().hex}"), b"Is this place fit to hold checkpoints?"
        try:
            bucket = self.connect(read_timeout=5, tries=2)
            next(bucket.keys(key), None)
            try:
                try:
                    written = bucket.put(key, body, if_absent=True)
                except Conflict:  # it arrived, and only the answer was lost: nobody else has this name
                    written = bucket.get(key).etag
                if bucket.get(key).body != body:
                    raise Refused(f"{bucket.url(key)}: what was read is not what was written")
                bucket.put(key, body, if_match=written)
                for condition in ({"if_absent": True}, {"if_match": _OTHER_ETAG}):
                    with suppress(Conflict):
                        bucket.put(key, body, **condition)
                        raise Refused(
                            f"{bucket.url(key)}: the store overwrites what it was told not to (If-None-Match, "
                            "If-Match), so two machines could not be kept apart; use a newer version of it, or another"
                        )
            finally:
                bucket.delete(key)
        except StoreError as error:
            if error.passing:
                raise CheckpointError(f"storage.bucket={self.bucket}: {error}") from error
            raise ConfigError("storage.bucket", self.bucket, str(error)) from error
