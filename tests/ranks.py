"""Ways to run the real train.py on several ranks: by a real torchrun, with processes that can be killed."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from src.data.datasets import Data, synthetic
from tests.cluster import free_port
from tests.conftest import Training

_MOUNTS_OF_ITS_OWN = 0x20000  # CLONE_NEWNS


def torchrun(
    training: Training,
    ranks: int,
    *overrides: str,
    restarts: int = 0,
    where: Path | None = None,
    node: str = "",
    hidden: Path | None = None,
) -> subprocess.Popen[str]:
    """Start train.py on `ranks` ranks of this machine.

    Args:
        where: The directory that it is started in.
        node: Options of torchrun that make this one of several nodes.
        hidden: A directory in place of which they see an empty one.
    """

    def hide() -> None:
        assert ctypes.CDLL(None).unshare(_MOUNTS_OF_ITS_OWN) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(hidden)], check=True)

    launcher = ["-m", "torch.distributed.run", *(node.split() or ["--standalone"])]
    launcher += [f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    return training.launch(
        launcher,
        *overrides,
        cwd=where or training.directory,
        start_new_session=True,
        preexec_fn=hide if hidden else None,
    )


def two_nodes(
    training: Training, folders: Sequence[Path], *overrides: str, hidden: Path | None = None
) -> list[subprocess.Popen[str]]:
    """One rank in each of two directories.

    Args:
        hidden: A directory that the second does not see.
    """
    node = f"--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{free_port()} --rdzv-id=test"
    started = []
    for number, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        options = f"{node} --local-addr=127.0.0.1 --rdzv-conf=is_host={int(number == 0)}"
        unseen = hidden if number == 1 else None
        started.append(torchrun(training, 1, *overrides, where=folder, node=options, hidden=unseen))
    return started


def workers_of(agent: subprocess.Popen[str]) -> dict[int, int]:
    """The processes that a torchrun has started: their pids by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            settings = dict(
                entry.split("=", 1) for entry in (path / "environ").read_text().split("\0") if entry.startswith("RANK=")
            )
        except (OSError, ValueError):
            continue
        if parent == agent.pid and "RANK" in settings:
            found[int(settings["RANK"])] = int(path.name)
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


class Recorded(Dataset[Any]):
    """A data set that notes in a file which of its samples were read, and takes its time."""

    def __init__(self, dataset: Dataset[Any], file: Path, seconds: float) -> None:
        self.dataset, self.file, self.seconds = dataset, file, seconds

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.seconds)
        with self.file.open("a") as file:
            file.write(f"{index}\n")  # one write, however many ranks append
        return self.dataset[index]


def recorded(file: str, seconds: float = 0.0, **settings: Any) -> Data:
    """`data._target_=tests.ranks.recorded`: synthetic data; the samples that were trained on are in `file`."""
    data = synthetic(**settings)
    return Data(Recorded(data.train, Path(file), seconds), *list(vars(data).values())[1:])
