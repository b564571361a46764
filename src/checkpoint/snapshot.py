"""Device -> host: a copy of the state that training can no longer change, at the price of one memcpy or less.

The copy goes into memory that is allocated and touched once and used again for every save: fresh memory
costs several times the copy itself, in page faults. (DCP's `cache_staged_state_dict` and torchtitan's
`async_with_pinned_mem` reuse their buffers for the same reason.)
"""

import ctypes
import logging
import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, UntypedStorage

log = logging.getLogger(__name__)

_ALIGNMENT = 64  # bytes: a cache line, and more than any dtype asks for

Copies = tuple[list[Tensor], list[Tensor]]
"""What to copy: to where, from where, one for one."""

TensorPath = tuple[str | int, ...]
"""Where in a state a tensor is: keys of dicts, indices of lists."""

OnTensor = Callable[[TensorPath, Tensor], Tensor]
"""What to make of a tensor at a place in a state."""

Storages = dict[int, tuple[UntypedStorage, Tensor]]
"""The storages of a state by address, each with the first tensor on it."""


class Snapshot:
    """One copy in progress. Two threads meet here: the training loop, and the one that writes."""

    def __init__(self, owner: "Snapshotter", state: Any, hosts: dict[int, Tensor], rest: Copies) -> None:
        """
        Args:
            state: The state's containers, with its live tensors.
            hosts: For each of their storages, by its address, a tensor on the copy of it in host memory.
            rest: What `complete` has to copy.
        """
        self.nbytes = owner.nbytes
        self._owner = owner
        self._state = state
        self._hosts = hosts
        self._rest = rest
        self._begun = owner.stream and torch.cuda.current_stream(owner.stream.device).record_event()
        self._copied = owner.stream and torch.cuda.Event(blocking=True)
        self._issued = threading.Event()
        self._waited = owner.stream is None and not rest[0]

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
                _copy(self._rest)
            else:
                torch.cuda.set_device(stream.device)  # a thread begins on GPU 0, where each rank would take up memory
                with torch.cuda.stream(stream):
                    stream.wait_event(self._begun)
                    _copy(self._rest)
                    self._copied.record()
        finally:
            self._issued.set()  # a copy that failed must not hold up the loop: the save fails, training goes on
        if stream is not None:
            self._copied.synchronize()
        host_state = map_tensors(self._state, self._host_tensor)
        self._state, self._rest = None, ([], [])  # the live tensors are training's alone again
        return host_state

    def _host_tensor(self, tensor: Tensor) -> Tensor:
        storage = self._hosts[tensor.untyped_storage()._cdata].untyped_storage()
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
        self._memory = HostMemory(device if self.stream is not None else None)
        self._layout: list[Any] = []
        self._hosts: list[Tensor] = []
        self._fills: list[bool] = []

    @property
    def nbytes(self) -> int:
        """Bytes of host memory in use."""
        return self._memory.nbytes

    def prepare(self, state: Any) -> None:
        """Allocate and touch the memory that a snapshot of this state takes, so that the first costs no more than
        the others."""
        self._lay_out(_by_storage(state)[1])

    def take(self, state: Any, updated: Iterable[Tensor]) -> Snapshot:
        """Begin a snapshot of nested containers of tensors and plain values.

        Tensors that share storage (tied weights, views) share it in the copy too, so it is saved once. Plain
        values and the containers are taken as they are at this moment.

        Args:
            updated: The tensors that nothing but `optimizer.step()` changes. All others (BatchNorm's
                statistics change in the next forward) are copied at once, in the order of the device's work.
                Not looked at where everything is.

        Returns:
            A snapshot whose `complete` has to be called before the next one is taken.
        """
        containers, storages = _by_storage(state)
        self._lay_out(storages)
        later = {tensor.untyped_storage()._cdata for tensor in updated} if self._overlap else set()
        now: Copies = ([], [])
        rest: Copies = ([], [])
        for (address, (storage, tensor)), host, fills in zip(storages.items(), self._hosts, self._fills, strict=True):
            targets, sources = rest if address in later else now
            targets.append(host)
            # A tensor that fills its storage is copied as it is; making a view of the bytes takes longer than
            # copying most of them.
            sources.append(tensor if fills else _as_bytes(storage))
        _copy(now)
        return Snapshot(self, containers, dict(zip(storages, self._hosts, strict=True)), rest)

    def close(self) -> None:
        """Give the memory back. What earlier snapshots returned is void."""
        self._hosts, self._layout = [], []
        self._memory.release()

    def _lay_out(self, storages: Storages) -> None:
        """Have a place in host memory for each storage."""
        layout = [(storage.nbytes(), t.dtype, t.shape, t.stride()) for storage, t in storages.values()]
        if layout == self._layout:
            return
        self._hosts, self._layout = [], []
        self._memory.reserve(sum(_aligned(nbytes) for nbytes, *_ in layout))
        self._fills = [_fills_its_storage(tensor) for _, tensor in storages.values()]
        offset = 0
        for fills, (nbytes, dtype, shape, stride) in zip(self._fills, layout, strict=True):
            host = _as_bytes(self._memory.storage(offset, nbytes))
            if fills:
                host = torch.empty(0, dtype=dtype).set_(host.untyped_storage(), 0, shape, stride)
            self._hosts.append(host)
            offset += _aligned(nbytes)
        self._layout = layout


class HostMemory:
    """One block of host memory, touched, and pinned where a GPU is to copy into it.

    Registered by hand rather than taken from torch's pinned allocator, which rounds up to a power of two.
    """

    def __init__(self, pin_for: torch.device | None = None) -> None:
        """
        Args:
            pin_for: The GPU that is to copy into it.
        """
        self._pin_for = pin_for
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
        if self._pin_for is not None:
            # In a thread of its own: CUDA keeps an error for the thread that got it, and raises it at its next kernel.
            with ThreadPoolExecutor(1) as thread:
                pinned = thread.submit(self._register).result()
            if not pinned:
                log.warning(
                    "%d bytes of host memory cannot be pinned: training will wait for the GPU's snapshots", nbytes
                )
                self._pin_for = None

    def storage(self, offset: int, nbytes: int) -> UntypedStorage:
        """`nbytes` bytes of the block, from `offset` on, as a storage of its own."""
        if nbytes == 0:
            return UntypedStorage(0)
        assert self._block is not None
        return torch.frombuffer(self._block, dtype=torch.uint8, offset=offset, count=nbytes).untyped_storage()

    def release(self) -> None:
        """Give the block back, as soon as nothing refers to it any more."""
        if self._block is not None and self._pin_for is not None:
            with torch.cuda.device(self._pin_for):
                torch.cuda.cudart().cudaHostUnregister(self._address)
        self._block, self.nbytes = None, 0

    def _register(self) -> bool:
        with torch.cuda.device(self._pin_for):
            return int(torch.cuda.cudart().cudaHostRegister(self._address, self.nbytes, 0)) == 0


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


def map_tensors_by_path(value: Any, change: OnTensor) -> Any:
    """As `map_tensors`, for a `change` that goes by where a tensor is."""
    paths = _tensor_paths(value)  # in the same order
    return map_tensors(value, lambda tensor: change(next(paths), tensor))


def tensors_by_path(value: Any) -> dict[TensorPath, Tensor]:
    """All tensors, with where they are."""
    tensors: dict[TensorPath, Tensor] = {}
    map_tensors_by_path(value, tensors.setdefault)
    return tensors


def _tensor_paths(value: Any, path: TensorPath = ()) -> Iterator[TensorPath]:
    if isinstance(value, Tensor):
        yield path
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensor_paths(item, (*path, key))


def _copy(copies: Copies) -> None:
    # One call for all, and without the GIL: into pinned memory it only puts the copies on the current stream, on
    # a CPU all of torch's threads take part, which are still awake from the optimizer's step.
    if copies[0]:
        with torch.no_grad():  # a user's state may hold parameters
            torch._foreach_copy_(*copies, non_blocking=True)


def _by_storage(state: Any) -> tuple[Any, Storages]:
    """The state in containers of its own, and the storages of its tensors."""
    storages: Storages = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages.setdefault(storage._cdata, (storage, tensor))
        return tensor

    return map_tensors(state, note), storages


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie side by side, as those of images and convolutions may do in two orders."""
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _fills_its_storage(tensor: Tensor) -> bool:
    return is_dense(tensor) and tensor.nbytes == tensor.untyped_storage().nbytes()


def _as_bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
