"""What the tests share: ways to run the real train.py, in a process of its own or in this one."""

import json
import logging
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hypothesis import HealthCheck, settings

from src import result, summary
from src.checkpoint.manifest import summed
from tests.store import KEY, SECRET, Network, Store

# Several tests run at the same time: with more of OpenMP's threads than cores, they wait far longer than they work.
torch.set_num_threads(1)

# Processes that tests start come from a server that has imported what they need, once for all of them.
multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", "tests.test_writer", "tests.test_loader"])

# The same made-up input every time; --hypothesis-profile=long makes up more, and other.
_FUZZING: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("short", max_examples=100, derandomize=True, **_FUZZING)
settings.register_profile("long", max_examples=5000, **_FUZZING)
settings.load_profile("short")

REPOSITORY = Path(__file__).resolve().parent.parent

TINY_DATA = (
    "data=synthetic",
    "data.train_size=200",
    "data.val_size=40",
    "data.image_size=8",
    "data.batch_size=16",  # 13 steps per epoch, the last one of 8 samples
    "optimizer.lr=0.01",
    "trainer.log_every=1",
    "storage.min_free_gb=0",
    "run=tiny",
)
TINY = (*TINY_DATA, "model=small_cnn", "model.width=8")
"""A run of a few seconds that has all that exact resume must get right: BatchNorm, dropout, momentum, a schedule."""
LONG = (*TINY, "trainer.epochs=8", "checkpoint.every=3", "checkpoint.keep=2", "checkpoint.retry_after=0.1")
LAST = "step_00000104"
"""Its last checkpoint."""


@dataclass
class Result:
    """How a training ended."""

    status: int
    metric: float | None
    output: str


@dataclass
class Training:
    """Runs train.py with its outputs/ in `directory`."""

    directory: Path
    _started: list[subprocess.Popen[str]]

    @property
    def run(self) -> Path:
        return self.directory / "outputs" / "tiny"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def start(self, *overrides: str, **options: Any) -> subprocess.Popen[str]:
        """The real thing, in a process of its own, with its output in a pipe."""
        return self.launch([], *overrides, **options)

    def launch(self, launcher: Sequence[str], *overrides: str, **options: Any) -> subprocess.Popen[str]:
        """The same by a launcher: options of python that come before train.py."""
        process = subprocess.Popen(
            [sys.executable, *launcher, str(REPOSITORY / "train.py"), *overrides],
            **{"cwd": self.directory, **options},
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._started.append(process)
        return process

    def fork(self, *overrides: str) -> multiprocessing.process.BaseProcess:
        """The same in a process that has imported everything already: for tests that need many."""
        process = multiprocessing.get_context("forkserver").Process(target=_train, args=(self.directory, overrides))
        process.start()
        return process

    def finish(self, process: subprocess.Popen[str]) -> Result:
        output, _ = process.communicate(timeout=120)
        return Result(process.returncode, None, output)

    def wait_until(self, process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
        """Wait, while the process runs, until `condition` holds."""
        deadline = time.monotonic() + 120
        while not condition():
            if process.poll() is not None:
                raise AssertionError(f"ended with {process.returncode}: {process.communicate()[0]}")
            assert time.monotonic() < deadline, "did not come to that"
            time.sleep(0.01)

    def kill_when(self, process: subprocess.Popen[str], condition: Callable[[], bool]) -> bool:
        """SIGKILL as soon as `condition` holds. Returns whether that was before the process ended."""
        deadline = time.monotonic() + 120
        while process.poll() is None:
            assert time.monotonic() < deadline, "neither ended nor met the condition"
            if condition():
                process.send_signal(signal.SIGKILL)
                process.communicate()
                return process.returncode == -signal.SIGKILL
            time.sleep(0.0005)
        process.communicate()
        return False


def _train(directory: Path, overrides: tuple[str, ...]) -> None:
    os.chdir(directory)
    torch.set_num_threads(1)
    log = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["train.py", *overrides]
    runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")


def resummed(manifest: str) -> str:
    """A manifest that was changed on purpose, with the checksum that it then has."""
    data = json.loads(manifest)
    data.pop("checksum", None)
    return summed(json.dumps(data, indent=2))


def children_of(process: int) -> list[int]:
    """The processes that this one has started and that still live."""
    return [
        int(child) for path in Path(f"/proc/{process}/task").glob("*/children") for child in path.read_text().split()
    ]


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    started: list[subprocess.Popen[str]] = []
    yield Training(tmp_path, started)
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a `LONG` run that was left alone."""
    training = Training(tmp_path_factory.mktemp("uninterrupted"), [])
    assert training.finish(training.start(*LONG)).status == 0
    return training.run


@pytest.fixture
def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Result]]:
    """Runs train.py in this process, which saves the start-up time, with its outputs/ in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    for name in ("HYDRA_FULL_ERROR", "HOLDFAST_TRACEBACKS"):
        monkeypatch.setenv(name, "0")  # so that they are put back after one_line_errors has set them
    deterministic = torch.are_deterministic_algorithms_enabled()
    returned: list[float] = []

    def noted(function: Callable[..., float | None]) -> Callable[..., float | None]:
        def call(*arguments: Any) -> float | None:
            metric = function(*arguments)
            if metric is not None:
                returned.append(metric)
            return metric

        return call

    def run(*overrides: str) -> Result:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        returned.clear()
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
        status = 0
        try:
            runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
        except SystemExit as error:
            status = int(error.code or 0)
        for handler in logging.getLogger().handlers[:]:
            if isinstance(handler, logging.FileHandler):  # Hydra's, of the run that has ended
                logging.getLogger().removeHandler(handler)
                with suppress(OSError):  # a full disk, at which logging.shutdown() shrugs too
                    handler.close()
        return Result(status, returned[0] if returned else None, "".join(capsys.readouterr()))

    # Hydra swallows what main returns.
    monkeypatch.setattr(summary, "summarize", noted(summary.summarize))
    monkeypatch.setattr(result, "already_done", noted(result.already_done))
    yield run
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A real S3 server for all tests; one that a test takes down is that test's own."""
    server = Store(tmp_path_factory.mktemp("store"))
    yield server
    server.kill()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """boto3 finds these, and nothing of this machine's own."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no_config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no_credentials"))


@pytest.fixture
def bucket(store: Store, credentials: None) -> Iterator[str]:
    """A new bucket on the server."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    store.client().create_bucket(Bucket=name)
    yield name
    store.remove(name)


@pytest.fixture
def network(store: Store) -> Iterator[Network]:
    """A way to the server that a test can disturb."""
    proxy = Network(store.port)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
