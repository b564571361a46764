"""Ways to move a file to a bucket and back: ours and the peers', each with its defaults unless it says otherwise."""

import shutil
import subprocess
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import boto3
from botocore.config import Config

from src.storage import transfer
from src.storage.bucket import Bucket

_CHUNK = 8 * 1024 * 1024  # bytes


@dataclass(frozen=True)
class Place:
    """A bucket, and how to reach it. Credentials are in the environment."""

    endpoint: str
    bucket: str


class Carrier(ABC):
    """Moves files. Whatever it imports beyond boto3, it imports in `__init__`."""

    name: ClassVar[str]

    def __init__(self, place: Place) -> None:
        self.place = place

    @abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """Return when the store has said that it has it."""

    @abstractmethod
    def download(self, key: str, path: Path, size: int) -> None:
        """Return when the file is written, to the page cache at least."""


class Holdfast(Carrier):
    """Parts in parallel, a checksum of the whole that the store confirms; the download is fsynced."""

    name = "Holdfast"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._bucket = Bucket(place.bucket, endpoint_url=place.endpoint)

    def upload(self, path: Path, key: str) -> None:
        """What the mirror does with a checkpoint's file."""
        transfer.upload(self._bucket, path, key, path.stat().st_size)

    def download(self, key: str, path: Path, size: int) -> None:
        """What resuming on an empty machine does."""
        transfer.download(self._bucket, key, size, path)


class _Boto3(Carrier):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.client: Any = boto3.client("s3", endpoint_url=place.endpoint, config=Config())


class UploadFile(_Boto3):
    """boto3's managed transfers."""

    name = "boto3 upload_file / download_file"

    def upload(self, path: Path, key: str) -> None:
        """Multipart, ten threads."""
        self.client.upload_file(str(path), self.place.bucket, key)

    def download(self, key: str, path: Path, size: int) -> None:
        """Ranges, ten threads."""
        self.client.download_file(self.place.bucket, key, str(path))


class PutObject(_Boto3):
    """One request."""

    name = "boto3 put_object / get_object"

    def upload(self, path: Path, key: str) -> None:
        """From the open file."""
        with path.open("rb") as file:
            self.client.put_object(Bucket=self.place.bucket, Key=key, Body=file)

    def download(self, key: str, path: Path, size: int) -> None:
        """In chunks of 8 MB."""
        body = self.client.get_object(Bucket=self.place.bucket, Key=key)["Body"]
        with path.open("wb") as file:
            while chunk := body.read(_CHUNK):
                file.write(chunk)


class S3TorchConnector(Carrier):
    """AWS's connector for PyTorch, on its own runtime in C."""

    name = "s3torchconnector"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        from s3torchconnector import S3Checkpoint, S3ClientConfig

        config = S3ClientConfig(force_path_style=True)
        self._checkpoint = S3Checkpoint("us-east-1", endpoint=place.endpoint, s3client_config=config)

    def upload(self, path: Path, key: str) -> None:
        """Through its writer."""
        with path.open("rb") as file, self._checkpoint.writer(self._url(key)) as writer:
            while chunk := file.read(_CHUNK):
                writer.write(chunk)

    def download(self, key: str, path: Path, size: int) -> None:
        """Through its reader."""
        with path.open("wb") as file, self._checkpoint.reader(self._url(key)) as reader:
            while chunk := reader.read(_CHUNK):
                file.write(chunk)

    def _url(self, key: str) -> str:
        return f"s3://{self.place.bucket}/{key}"


class Obstore(Carrier):
    """Rust's object_store."""

    name = "obstore"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        import obstore
        from obstore.store import S3Store

        self._obstore: Any = obstore
        options: Any = {"allow_http": True}
        self._store: Any = S3Store(place.bucket, endpoint=place.endpoint, region="us-east-1", client_options=options)

    def upload(self, path: Path, key: str) -> None:
        """Multipart."""
        self._obstore.put(self._store, key, path)

    def download(self, key: str, path: Path, size: int) -> None:
        """One stream."""
        with path.open("wb") as file:
            for chunk in self._obstore.get(self._store, key).stream(min_chunk_size=_CHUNK):
                file.write(chunk)


class AwsCommand(Carrier):
    """The command line, in a process of its own."""

    name = "aws s3 cp"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        found = shutil.which("aws")
        if found is None:
            raise FileNotFoundError("the command aws is not installed")
        self._command = [found, "s3", "cp", "--quiet", "--endpoint-url", place.endpoint]

    def upload(self, path: Path, key: str) -> None:
        """Start it, and wait."""
        subprocess.run([*self._command, str(path), f"s3://{self.place.bucket}/{key}"], check=True)

    def download(self, key: str, path: Path, size: int) -> None:
        """Likewise."""
        subprocess.run([*self._command, f"s3://{self.place.bucket}/{key}", str(path)], check=True)


CARRIERS: list[type[Carrier]] = [Holdfast, UploadFile, PutObject, S3TorchConnector, Obstore, AwsCommand]
"""In the order of the tables."""
