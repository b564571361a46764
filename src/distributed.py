"""Several processes that train one model: who is who, and what they tell each other.

torchrun starts them, and says in the environment who is who. Where it has not, a process is alone, and all of this
costs nothing.
"""

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from src.checkpoint.snapshot import OnTensor, TensorPath, is_dense, map_tensors, map_tensors_by_path
from src.errors import DivergedError, HoldfastError, PeerLost, WorkerLost

PARENT = os.getppid()
"""What started this process. Looked at as early as can be: it may die while this process imports, or downloads."""

TIMEOUT = timedelta(hours=1)
"""For how long a rank waits for others: rank 0 may have a large checkpoint to fetch, any of them a piece to write."""

_PATIENCE = timedelta(seconds=2)  # rank 0 finds the same error in a setting at about the same time
_ENDED = "holdfast/ended"


class World:
    """The processes that train together: this one, alone."""

    rank = 0
    size = 1
    local_rank = 0
    """Among the processes on this machine, hence the number of its GPU."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which saves, restores, logs and shows for all."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> None:
        """Make `tensor` the sum over all ranks. Nobody waits for a GPU."""

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Make each of `tensors` what it is on rank 0."""

    def agree(self, value: int) -> int:
        """The largest `value` among all ranks, of their calls before this one: nobody waits, and all get the same.

        Alone, that of this call.
        """
        return value

    def spread(self, saved: Any, read: OnTensor, own_part: OnTensor) -> Any:
        """What rank 0 gives as `saved`, for each rank.

        Args:
            saved: Tensors on the host, or outlines of them, in containers. Looked at on rank 0 only.
            read: The tensor itself, on rank 0.
            own_part: What a rank keeps of it.
        """
        return map_tensors_by_path(saved, read)

    def tell(self, value: bool) -> bool:
        """The `value` of rank 0, which alone does not wait for the others."""
        return value

    def wait(self) -> None:
        """Until all ranks are here."""

    @contextmanager
    def one_per_node_first(self) -> Iterator[None]:
        """Entered by one process on each machine, and by its others after it: what one downloads, all find there."""
        yield


ALONE = World()


class Ranks(World):
    """The processes that torchrun started."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        # What is on the host goes by gloo, also on machines with GPUs: nothing that is told each step waits for one.
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        store, _, _ = next(rendezvous("env://"))
        store = _store_of_this_round(store, self.rank, self.size)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=TIMEOUT)
        self._votes = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        self._voting: dist.Work | None = None
        self._told = torch.zeros(1, dtype=torch.uint8)

    def sum_(self, tensor: Tensor) -> None:
        """Make `tensor` the sum over all ranks. Nobody waits for a GPU."""
        dist.all_reduce(tensor)

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Make each of `tensors` what it is on rank 0."""
        for tensor in tensors:
            dist.broadcast(_flat(tensor), 0)

    def agree(self, value: int) -> int:
        """The largest `value` among all ranks, of their calls before this one: nobody waits, and all get the same."""
        if self._voting is not None:
            self._voting.wait()
        self._votes.reverse()
        before, now = self._votes
        agreed = int(before) if self._voting is not None else 0
        now.fill_(value)
        self._voting = dist.all_reduce(now, dist.ReduceOp.MAX, async_op=True)
        return agreed

    def spread(self, saved: Any, read: OnTensor, own_part: OnTensor) -> Any:
        """What rank 0 gives as `saved`, for each rank: one tensor after the other, whoever has the files."""
        tensors: list[Tensor] = []

        def outline(tensor: Tensor) -> Tensor:
            tensors.append(tensor.detach())
            return _dense(tensors[-1].to("meta"))

        box = [map_tensors(saved, outline) if self.is_main else None]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        sent = iter(tensors)

        def receive(path: TensorPath, outline: Tensor) -> Tensor:
            tensor = _dense(read(path, next(sent))) if self.is_main else torch.empty_like(outline, device="cpu")
            if tensor.numel():
                dist.broadcast(_flat(tensor).view(torch.uint8), 0)
            return own_part(path, tensor)

        return map_tensors_by_path(box[0], receive)

    def tell(self, value: bool) -> bool:
        """The `value` of rank 0, which alone does not wait for the others."""
        self._told.fill_(value)
        dist.broadcast(self._told, 0)
        return bool(self._told)

    def wait(self) -> None:
        """Until all ranks are here."""
        dist.all_reduce(torch.zeros(1))  # unlike a barrier never by way of the GPU

    def end_for_good(self) -> None:
        """Have torchrun not start anew what has ended on purpose. This process is about to end by itself."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends as soon as another has ended
        restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        if restarts and self.local_rank == 0 and os.getppid() == PARENT:
            os.kill(PARENT, signal.SIGTERM)

    @contextmanager
    def one_per_node_first(self) -> Iterator[None]:
        """Entered by one process on each machine, and by its others after it: what one downloads, all find there."""
        if self.local_rank > 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()


@contextmanager
def join() -> Iterator[World]:
    """Meet the other processes, if torchrun has started any.

    Raises:
        PeerLost: one of them has ended, so that training cannot go on here either.
        SystemExit: rank 0 has ended, and has said why.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    ranks = Ranks()
    if not ranks.is_main:
        logging.disable(logging.WARNING)  # rank 0 says it
    lost = False
    try:
        yield ranks
    except (HoldfastError, RuntimeError) as error:
        lost = isinstance(error, RuntimeError) and _is_of_a_lost_peer(error)
        if isinstance(error, RuntimeError) and not lost:
            raise
        # One that all ranks run into at the same step leaves rank 0 some uploading to do.
        patience = TIMEOUT if isinstance(error, DivergedError) else _PATIENCE
        mended_by_a_restart = isinstance(error, WorkerLost)
        if isinstance(error, HoldfastError) and not mended_by_a_restart and ranks.is_main:
            ranks.end_for_good()
            _say_goodbye(error.exit_code)
        elif (code := _goodbye_of_rank_0(patience)) is not None:
            ranks.end_for_good()
            sys.exit(code)
        if lost:
            raise PeerLost(
                f"rank {ranks.rank} of {ranks.size} has lost another ({' '.join(str(error).split())[-200:]}); run the "
                "same command again to go on, or have torchrun do so: --max-restarts=3"
            ) from error
        raise
    except BaseException as error:
        if hasattr(error, "exit_code"):  # asked to stop, and saved
            ranks.wait()  # torchrun ends all ranks when one ends: not before rank 0 has tidied up
            ranks.end_for_good()
        raise
    finally:
        if not lost:  # it might wait for the one that is lost
            dist.destroy_process_group()


def is_main_process() -> bool:
    """Whether this is rank 0, or alone. Known before anything is set up."""
    return not dist.is_torchelastic_launched() or os.environ.get("RANK", "0") == "0"


def leave_files_to_rank_0() -> None:
    """Have Hydra write no files and no logs on other ranks. Call it before Hydra reads the command line."""
    if not is_main_process():
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]


def _store_of_this_round(store: Store, rank: int, size: int) -> Store:
    """A part of torchrun's store that no earlier processes have left anything in.

    torchrun keeps one store over all its restarts, in which the addresses of ranks that were killed still stand, and
    those that follow would wait for them (pytorch/pytorch#135712). Its count of restarts is no help: on several nodes
    each has its own.
    """
    own, answer = uuid.uuid4().hex, ""
    store.set(f"holdfast/hello/{rank}", own)
    if rank > 0:
        answer = store.get(f"holdfast/round/{own}").decode()
        store.add(f"holdfast/arrived/{answer}", 1)
    else:
        while store.add(f"holdfast/arrived/{own}", 0) < size - 1:
            # Some of these may be from a process that is no more, until the one in its place has said hello.
            for other in range(1, size):
                store.set(f"holdfast/round/{store.get(f'holdfast/hello/{other}').decode()}", own)
            time.sleep(0.01)
    return PrefixStore(answer or own, store)


def _say_goodbye(exit_code: int) -> None:
    """Have the other ranks know that rank 0 has ended on purpose, and has said why."""
    with suppress(RuntimeError):
        _store().set(_ENDED, str(exit_code))


def _goodbye_of_rank_0(patience: timedelta) -> int | None:
    """Its exit code, if it ends on purpose."""
    with suppress(RuntimeError):
        _store().wait([_ENDED], patience)
        return int(_store().get(_ENDED))
    return None


def _store() -> Store:
    store: Store = dist.distributed_c10d._get_default_store()
    return store


def _is_of_a_lost_peer(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if is_dense(tensor) else tensor.contiguous()


def _flat(tensor: Tensor) -> Tensor:
    """All elements of a dense tensor in the order of memory: collectives want tensors that are contiguous."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
