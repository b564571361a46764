"""Device -> host: a copy of the state that training can no longer change, at the price of one memcpy or less.

The copy goes into memory that is allocated and touched once and used again for every save: fresh memory
costs several times the copy itself, in page faults. (DCP's `cache_staged_state_dict` and torchtitan's
`async_with_pinned_mem` reuse their buffers for the same reason.)
"""

import ctypes
import logging
import mmap
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, UntypedStorage

log = logging.getLogger(__name__)

_ALIGNMENT = 64  # bytes: a cache line, and more than any dtype asks for
_COPY_THREADS = 4  # as a rule they saturate a socket's memory bandwidth
_PIECE = 2 * 1024 * 1024  # bytes

Copies = list[tuple[UntypedStorage, UntypedStorage]]
"""What to copy: (to, from), of the same size."""


class Snapshot:
    """One copy in progress. Two threads meet here: the training loop, and the one that writes."""

    def __init__(self, owner: "Snapshotter", state: Any, hosts: dict[int, UntypedStorage], rest: Copies) -> None:
        """
        Args:
            state: The state's containers, with its live tensors.
            hosts: For each of their storages, by its address, the copy in host memory.
            rest: What `complete` has to copy.
        """
        self.nbytes = sum(host.nbytes() for host in hosts.values())
        self._owner = owner
        self._state = state
        self._hosts = hosts
        self._rest = rest
        self._begun = owner.stream and torch.cuda.current_stream(owner.stream.device).record_event()
        self._copied = owner.stream and torch.cuda.Event(blocking=True)
        self._issued = threading.Event()
        self._waited = owner.stream is None and not rest

    def wait(self) -> None:
        """Parameters may change after this call. Normally free: on a GPU only the GPU waits."""
        if not self._waited:
            self._issued.wait()
            if self._owner.stream is not None:
                torch.cuda.current_stream(self._owner.stream.device).wait_event(self._copied)
            self._waited = True

    def complete(self) -> Any:
        """Copy what `Snapshotter.take` left to be copied. To be called once, in the thread that writes.

        Returns:
            The state, with tensors in host memory that are valid until the next snapshot is taken.
        """
        stream = self._owner.stream
        try:
            if stream is None:
                self._owner.copy(self._rest)
            else:
                with torch.cuda.stream(stream):
                    stream.wait_event(self._begun)
                    self._owner.copy(self._rest)
                    self._copied.record()
        finally:
            self._issued.set()  # a copy that failed must not hold up the loop: the save fails, training goes on
        if stream is not None:
            self._copied.synchronize()
        host_state = map_tensors(self._state, self._host_tensor)
        self._state, self._rest = None, []  # the live tensors are training's alone again
        return host_state

    def _host_tensor(self, tensor: Tensor) -> Tensor:
        storage = self._hosts[tensor.untyped_storage()._cdata]
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


class Snapshotter:
    """Takes snapshots of one training state, one at a time, into one block of host memory."""

    def __init__(self, device: torch.device, overlap: bool | None = None) -> None:
        """
        Args:
            device: Where training happens.
            overlap: Leave the copy of parameters and optimizer state to `Snapshot.complete`, which runs beside
                the next forward and backward. By default where a GPU's copy engine does it for nothing; on
                a CPU it would take from training what it saves (benchmarks/README.md).
        """
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._overlap = self.stream is not None if overlap is None else overlap
        self._memory = HostMemory(pin=self.stream is not None)
        self._sizes: list[int] = []
        self._hosts: list[UntypedStorage] = []
        self._threads = min(_COPY_THREADS, torch.get_num_threads())
        self._helpers = ThreadPoolExecutor(_COPY_THREADS, "snapshot")

    def prepare(self, state: Any) -> None:
        """Allocate and touch the memory that a snapshot of this state takes, so that the first costs no more than
        the others."""
        self._lay_out([storage.nbytes() for storage in _storages(state)[1].values()])

    def take(self, state: Any, updated: Iterable[Tensor]) -> Snapshot:
        """Begin a snapshot of nested containers of tensors and plain values.

        Tensors that share storage (tied weights, views) share it in the copy too, so it is saved once. Plain
        values and the containers are taken as they are at this moment.

        Args:
            updated: The tensors that nothing but `optimizer.step()` changes. All others (BatchNorm's
                statistics change in the next forward) are copied at once, in the order of the device's work.

        Returns:
            A snapshot whose `complete` has to be called before the next one is taken.
        """
        containers, storages = _storages(state)
        self._lay_out([storage.nbytes() for storage in storages.values()])
        later = {tensor.untyped_storage()._cdata for tensor in updated} if self._overlap else set()
        now: Copies = []
        rest: Copies = []
        for (address, storage), host in zip(storages.items(), self._hosts, strict=True):
            (rest if address in later else now).append((host, storage))
        self.copy(now)
        return Snapshot(self, containers, dict(zip(storages, self._hosts, strict=True)), rest)

    def copy(self, copies: Copies) -> None:
        """Copy into host memory: from the host right now, from a GPU by putting it on the current stream."""
        # Threads that take piece after piece, and one rendezvous at the end. (torch's own copy_ has one for
        # each tensor; where data loading competes for the cores, that took ten times as long.)
        pieces = _pieces([copy for copy in copies if copy[1].device.type == "cpu"])
        helpers = min(self._threads, len(pieces)) - 1
        others = [self._helpers.submit(_memmove, pieces) for _ in range(helpers)]
        _memmove(pieces)
        for other in others:
            other.result()
        on_device = [copy for copy in copies if copy[1].device.type != "cpu"]
        if on_device:
            targets, sources = ([_as_bytes(copy[side]) for copy in on_device] for side in (0, 1))
            torch._foreach_copy_(targets, sources, non_blocking=self.stream is not None)

    def close(self) -> None:
        """Give the memory back. What earlier snapshots returned is void."""
        self._helpers.shutdown()
        self._hosts, self._sizes = [], []
        self._memory.release()

    def _lay_out(self, sizes: list[int]) -> None:
        if sizes == self._sizes:
            return
        self._hosts, self._sizes = [], []
        offsets, end = [], 0
        for size in sizes:
            offsets.append(end)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._memory.reserve(end)
        self._hosts = [self._memory.storage(offset, size) for offset, size in zip(offsets, sizes, strict=True)]
        self._sizes = sizes


class HostMemory:
    """One block of host memory, touched, and pinned where a GPU is to copy into it.

    Registered by hand rather than taken from torch's pinned allocator, which rounds up to a power of two.
    """

    def __init__(self, pin: bool) -> None:
        self._pin = pin
        self._block: mmap.mmap | None = None
        self._address = 0
        self.nbytes = 0

    def reserve(self, nbytes: int) -> None:
        """Hold at least `nbytes` bytes. What `storage` returned earlier is void if the block has to grow.

        Raises:
            MemoryError: there is not as much.
        """
        if nbytes <= self.nbytes:
            return
        self.release()
        try:
            self._block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"no {nbytes} bytes of host memory for a snapshot of the state") from error
        self._address = torch.frombuffer(self._block, dtype=torch.uint8).data_ptr()
        self.nbytes = nbytes
        ctypes.memset(self._address, 0, nbytes)
        if self._pin and int(torch.cuda.cudart().cudaHostRegister(self._address, nbytes, 0)) != 0:
            log.warning("%d bytes of host memory cannot be pinned: training will wait for snapshots of the GPU", nbytes)
            self._pin = False

    def storage(self, offset: int, nbytes: int) -> UntypedStorage:
        """`nbytes` bytes of the block, from `offset` on, as a storage of its own."""
        if nbytes == 0:
            return UntypedStorage(0)
        assert self._block is not None
        return torch.frombuffer(self._block, dtype=torch.uint8, offset=offset, count=nbytes).untyped_storage()

    def release(self) -> None:
        """Give the block back, as soon as nothing refers to it any more."""
        if self._block is not None and self._pin:
            torch.cuda.cudart().cudaHostUnregister(self._address)
        self._block, self.nbytes = None, 0


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Nested dicts, lists and tuples anew, with `change` applied to each tensor in them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        items = {key: map_tensors(item, change) for key, item in value.items()}
        if not isinstance(value, OrderedDict):
            return items
        ordered = OrderedDict(items)
        # Where torch.nn.Module.state_dict() keeps the versions that its modules' loading goes by.
        if hasattr(value, "_metadata"):
            ordered._metadata = value._metadata.copy()  # type: ignore[attr-defined]
        return ordered
    if isinstance(value, list | tuple):
        return type(value)([map_tensors(item, change) for item in value])
    return value


def _storages(state: Any) -> tuple[Any, dict[int, UntypedStorage]]:
    """The state in containers of its own, and the storages of its tensors by address, each once."""
    storages: dict[int, UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages.setdefault(storage._cdata, storage)
        return tensor

    return map_tensors(state, note), storages


def _pieces(copies: Copies) -> deque[tuple[int, int, int]]:
    """The copies as (to, from, bytes), none of many bytes."""
    return deque(
        (target.data_ptr() + start, source.data_ptr() + start, min(_PIECE, source.nbytes() - start))
        for target, source in copies
        for start in range(0, source.nbytes(), _PIECE)
    )


def _memmove(pieces: deque[tuple[int, int, int]]) -> None:
    while pieces:
        try:
            piece = pieces.popleft()
        except IndexError:  # another thread took the last one
            return
        ctypes.memmove(*piece)  # lets go of the GIL


def _as_bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
