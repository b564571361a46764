"""A real Slurm of one node: munge, the controller, and the node's daemon, all on this machine."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "srun", "squeue")

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmctldPort={controller}
SlurmdPort={node}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
CommunicationParameters=NoInAddrAny
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
JobRequeue=1
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=2
"""


class Cluster:
    """Runs while it is entered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        # Without a name resolver that knows this machine, gloo has to be told where it is.
        more = {"PATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.environment = {**os.environ, **more, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        host = socket.gethostname().partition(".")[0]
        conf = _CONF.format(folder=self.folder, host=host, controller=free_port(), node=free_port())
        (self.folder / "slurm.conf").write_text(conf)
        munge = [f"--{name}={self.folder}/munge.{name.partition('-')[0]}" for name in ("socket", "key-file")]
        munge += [f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", *munge)
        self.wait_for(lambda: (self.folder / "munge.socket").exists(), "munge")
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D", "-N", host)
        self.wait_for(lambda: "idle" in self.call("sinfo", "--noheader", "--format=%T"), "the node")
        return self

    def __exit__(self, *exception: object) -> None:
        subprocess.run(["scancel", "--user=root", "--full"], env=self.environment, capture_output=True)
        with suppress(AssertionError):
            self.wait_for(lambda: not self.call("squeue", "--noheader"), "the end of all jobs")
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()

    def call(self, *command: str, cwd: str | None = None, **environment: str) -> str:
        """What a command of Slurm's prints."""
        settings = {**self.environment, **environment}
        done = subprocess.run(command, env=settings, capture_output=True, text=True, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state(self, job: str) -> str:
        """Of a job: PENDING, RUNNING, COMPLETED, …"""
        shown = self.call("scontrol", "show", "job", job)
        return shown.partition("JobState=")[2].partition(" ")[0]

    def _start(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("wb")
        self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until `condition` holds."""
        deadline = time.monotonic() + 90
        while not condition():
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.out"))
            assert time.monotonic() < deadline, f"{what} did not come up: {logs}"
            time.sleep(0.1)


def missing() -> list[str]:
    """Which of Slurm's programs are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
