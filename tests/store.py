"""A real S3 server (SeaweedFS), and a network to it that can be made to fail."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from src.checkpoint.manifest import FORMAT, summed

KEY, SECRET = "holdfast-test-key", "holdfast-test-secret-Zq9"
READER, READER_SECRET = "holdfast-reader-key", "holdfast-reader-secret-Xw3"


def free_port() -> int:
    """A port that is free together with the one 10,000 above, where the server's gRPC goes."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            if port > 55_000:
                continue
            with suppress(OSError):
                two.bind(("127.0.0.1", port + 10_000))
                return port


RUN = Path("outputs/tiny")
"""The run directory of conftest.TINY; below it, in a bucket: ROOT."""
ROOT = "holdfast/tiny"


class Store:
    """One server, with a folder of its own."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        users = [
            (KEY, SECRET, ["Admin", "Read", "Write", "List", "Tagging"]),
            (READER, READER_SECRET, ["Read", "List"]),
        ]
        identities = [
            {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
            for key, secret, actions in users
        ]
        (directory / "s3.json").write_text(json.dumps({"identities": identities}))
        names = ("s3.port", "master.port", "filer.port", "volume.port", "admin.port")
        ports = {name: free_port() for name in names}
        self.port = ports["s3.port"]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._command = [
            str(Path(sys.executable).with_name("weed")),
            "mini",
            f"-dir={directory}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.autoCreateBucket=false",
            f"-s3.config={directory / 's3.json'}",
            "-volume.max=1000",  # each bucket takes several, however little is in it
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            *(f"-{name}={port}" for name, port in ports.items()),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        with (self._directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self._directory)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.client().list_buckets()
                return
            except Exception:
                assert self._process.poll() is None, (self._directory / "server.log").read_text()[-3000:]
                assert time.monotonic() < deadline, "the server does not come up"
                time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=Config(connect_timeout=2, read_timeout=20, retries={"total_max_attempts": 2}),
        )

    def remove(self, bucket: str) -> None:
        """Delete a bucket with all that is in it: each takes up a share of what the server can hold."""
        client = self.client()
        while found := client.list_objects_v2(Bucket=bucket).get("Contents", []):
            client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": entry["Key"]} for entry in found]})
        client.delete_bucket(Bucket=bucket)

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def read(self, bucket: str, key: str) -> bytes:
        body: bytes = self.client().get_object(Bucket=bucket, Key=key)["Body"].read()
        return body

    def write(self, bucket: str, key: str, body: bytes) -> None:
        self.client().put_object(Bucket=bucket, Key=key, Body=body)


class Network:
    """A proxy between a client and a store. What it does to the traffic can be changed at any time."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[str] = []
        """The first line of every request, and its x-amz headers."""
        self.drop = False
        """Refuse connections, and cut those that there are."""
        self.silent = False
        """Take everything, answer nothing."""
        self.answer: bytes | None = None
        """Answer every request with this."""
        self.corrupt_uploads = 0
        """In so many of the next large pieces sent to the store one bit is flipped."""
        self.corrupt_downloads = 0
        self.truncate_downloads = 0
        """So many of the next large answers are cut off in the middle."""
        self.delay = 0.0
        """Seconds before each piece is passed on."""
        self._open: set[socket.socket] = set()
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closed = True
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Cut all connections that there are."""
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.drop:
                client.close()
                continue
            self._open.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client, socket.create_connection(("127.0.0.1", self._upstream)) as server:
            self._open.add(server)
            back = threading.Thread(target=self._pass_back, args=(server, client), daemon=True)
            back.start()
            while (data := client.recv(1 << 16)) and not self.drop:
                if re.match(rb"(GET|PUT|POST|HEAD|DELETE) ", data):
                    head = data.split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
                    self.requests.append(
                        "\n".join([head[0], *(line for line in head if line.lower().startswith("x-amz"))])
                    )
                    if self.answer is not None:
                        client.sendall(self.answer)
                        break
                if self.silent:
                    continue
                time.sleep(self.delay)
                if self.corrupt_uploads and len(data) > 32_000:
                    self.corrupt_uploads -= 1
                    data = _flip(data)
                server.sendall(data)
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            self._open.discard(server)
        self._open.discard(client)

    def _pass_back(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while (data := server.recv(1 << 16)) and not self.drop:
                time.sleep(self.delay)
                if self.corrupt_downloads and len(data) > 32_000:
                    self.corrupt_downloads -= 1
                    data = _flip(data)
                if self.truncate_downloads and len(data) > 32_000:
                    self.truncate_downloads -= 1
                    client.sendall(data[:1000])
                    break
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


def error_answer(status: int, code: str) -> bytes:
    """What S3 answers when it refuses."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>As the test wants it.</Message></Error>".encode()
    head = (
        f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close"
    )
    return head.encode() + b"\r\n\r\n" + body


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def on_s3(place: Store | Network, bucket: str, *more: str) -> tuple[str, ...]:
    where = ("storage=s3", f"storage.bucket={bucket}", f"storage.endpoint_url={place.endpoint}")
    return (*where, "storage.lease_seconds=3", *more)


def steps_there(store: Store, bucket: str, root: str = ROOT) -> list[int]:
    manifests = re.findall(
        r"step_(\d{8})/manifest\.json\n", "\n".join(store.keys(bucket, f"{root}/checkpoints")) + "\n"
    )
    return sorted(map(int, manifests))


def steps_here(run: Path = RUN) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_????????"))


def damage(store: Store, bucket: str, step: int, how: str) -> None:
    folder = f"{ROOT}/checkpoints/step_{step:08d}"
    if how == "a flipped bit":
        state = bytearray(store.read(bucket, f"{folder}/state.pt"))
        state[len(state) // 2] ^= 1
        store.write(bucket, f"{folder}/state.pt", bytes(state))
    elif how == "truncated":
        store.write(bucket, f"{folder}/state.pt", store.read(bucket, f"{folder}/state.pt")[:-1000])
    elif how == "missing":
        store.client().delete_object(Bucket=bucket, Key=f"{folder}/state.pt")
    elif how == "no manifest of ours":
        evil = {"format": FORMAT, "files": {"../../../../evil": {}}}
        store.write(bucket, f"{folder}/manifest.json", summed(json.dumps(evil, indent=2)).encode())


def drop(network: Network) -> None:
    network.drop = True
    network.cut()
