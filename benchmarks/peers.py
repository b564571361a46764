"""The peers, each used as its authors say, in its fastest configuration that the device allows."""

import ctypes
import io
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save

from benchmarks.savers import TIMEOUT, Saver, contents, fill
from benchmarks.workloads import state_tensors
from src.state import TrainState

_CHUNK = 8 * 1024 * 1024  # bytes


class Memcpy(Saver):
    """The floor: one copy of as many bytes into memory that was written to before. On a GPU: into pinned memory.

    Takes the faster of C's memmove, on one thread, and torch's `copy_`, on all.
    """

    name = "memcpy: the floor"
    in_background = False

    def __init__(self, state: TrainState, directory: Path) -> None:
        super().__init__(state, directory)
        size = sum(tensor.nbytes for tensor in state_tensors(state))
        device = next(state.model.parameters()).device
        self._source = torch.ones(size, dtype=torch.uint8, device=device)
        self._target = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        ways = [self._copy] if device.type == "cuda" else [self._copy, self._memmove]
        self._way = min(ways, key=_fastest_of_three)

    def save(self, step: int) -> None:
        """Copy."""
        self._way()

    def _copy(self) -> None:
        self._target.copy_(self._source)

    def _memmove(self) -> None:
        ctypes.memmove(self._target.data_ptr(), self._source.data_ptr(), self._source.nbytes)


class RawWrite(Saver):
    """A plain sequential write of as many bytes from memory, then fsync: what the disk can do."""

    name = "write + fsync: the disk"
    in_background = False

    def __init__(self, state: TrainState, directory: Path) -> None:
        super().__init__(state, directory)
        size = sum(tensor.nbytes for tensor in state_tensors(state))
        self._bytes = memoryview(bytearray(b"\x01") * size)

    def save(self, step: int) -> None:
        """Write, fsync."""
        descriptor = os.open(self.path(step), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            for start in range(0, len(self._bytes), _CHUNK):
                os.write(descriptor, self._bytes[start : start + _CHUNK])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class TorchSave(Saver):
    """`torch.save` to a file, and that is all."""

    name = "torch.save"
    restore_name = "torch.load"
    fsyncs = False
    in_background = False

    def save(self, step: int) -> None:
        """Write the file."""
        torch.save(contents(self.state), self.path(step))

    def restore(self, step: int, target: TrainState) -> None:
        """Read the file, then copy."""
        fill(target, torch.load(self.path(step), weights_only=True))


class TorchSaveMapped(TorchSave):
    """The same file, mapped into memory when it is loaded."""

    name = "torch.save, loaded by mmap"
    restore_name = "torch.load(mmap=True)"

    def restore(self, step: int, target: TrainState) -> None:
        """Map the file, then copy. The optimizer keeps the mapping itself as its state."""
        fill(target, torch.load(self.path(step), weights_only=True, mmap=True))


class TorchSaveDurably(TorchSave):
    """The same, safe against kills and power cuts: a temporary file, fsync, rename, fsync of the folder."""

    name = "torch.save + fsync + rename"
    fsyncs = True

    def save(self, step: int) -> None:
        """Write the file, durably and atomically."""
        save_durably(contents(self.state), self.path(step))


def save_durably(state: Any, path: Path) -> None:
    """`torch.save` to a temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


class BufferAndThread(TorchSave):
    """What tutorials call an asynchronous saver: pickled into memory by the training thread, written by another."""

    name = "BytesIO, then a thread"
    in_background = True

    def __init__(self, state: TrainState, directory: Path) -> None:
        super().__init__(state, directory)
        self._thread: threading.Thread | None = None

    def save(self, step: int) -> None:
        """Pickle now, write later."""
        buffer = io.BytesIO()
        torch.save(contents(self.state), buffer)
        self._thread = threading.Thread(target=self.path(step).write_bytes, args=(buffer.getvalue(),))
        self._thread.start()

    def in_flight(self) -> bool:
        """Whether the thread still writes."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Join the thread."""
        if self._thread is not None:
            self._thread.join()


class DcpAsync(Saver):
    """torch.distributed.checkpoint's `async_save` with its defaults: a copy into fresh memory, a thread writes."""

    name = "DCP async_save"
    restore_name = "DCP load"

    def __init__(self, state: TrainState, directory: Path) -> None:
        super().__init__(state, directory)
        self._stager = self._new_stager(next(state.model.parameters()).is_cuda)
        self._type = AsyncCheckpointerType.THREAD
        self._staged: Future[Any] | None = None
        self._written: Future[Any] | None = None

    def save(self, step: int) -> None:
        """Stage; if the stager is asynchronous, not even that."""
        self._save(contents(self.state), self.path(step))

    def before_update(self) -> None:
        """Wait until the state is staged."""
        if self._staged is not None:
            self._staged.result(TIMEOUT)

    def in_flight(self) -> bool:
        """Whether the save is not done."""
        return self._written is not None and not self._written.done()

    def wait(self) -> None:
        """Wait for the save."""
        if self._written is not None:
            self._written.result(TIMEOUT)

    def restore(self, step: int, target: TrainState) -> None:
        """Read into the tensors of `target`, as DCP does, then load what it took apart."""
        loaded = contents(target)
        load(loaded, checkpoint_id=str(self.path(step)), no_dist=True)
        fill(target, loaded)

    def close(self) -> None:
        """Let go of the stager's memory."""
        self.wait()
        if self._stager is not None:
            self._stager.close()

    def _new_stager(self, on_gpu: bool) -> DefaultStager | None:
        return None

    def _save(self, what: dict[str, Any], path: Path) -> None:
        response = async_save(
            what,
            checkpoint_id=str(path),
            async_checkpointer_type=self._type,
            async_stager=self._stager,
            no_dist=True,
        )
        if isinstance(response, AsyncSaveResponse):
            self._staged, self._written = response.staging_completion, response.upload_completion
        else:
            self._staged, self._written = None, response


def _kept_stager(on_gpu: bool, shared_memory: bool) -> DefaultStager:
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=on_gpu,
            use_shared_memory=shared_memory,
            use_async_staging=on_gpu,
            use_non_blocking_copy=on_gpu,
        )
    )


class DcpAsyncCached(DcpAsync):
    """The same with a stager that keeps its memory. On a GPU: pinned, and copying while training goes on."""

    name = "DCP async_save, cached stager"

    def _new_stager(self, on_gpu: bool) -> DefaultStager | None:
        return _kept_stager(on_gpu, shared_memory=False)


class DcpAsyncProcess(DcpAsync):
    """The same from shared memory, by a process of its own."""

    name = "DCP async_save, process"

    def __init__(self, state: TrainState, directory: Path) -> None:
        super().__init__(state, directory)
        self._type = AsyncCheckpointerType.PROCESS
        os.environ.setdefault("MASTER_ADDR", "localhost")
        # The process is started by the first save, which needs a process group for that; nothing after it does.
        start, meeting_place = directory / "start", directory / "group"
        dist.init_process_group("gloo", init_method=meeting_place.as_uri(), rank=0, world_size=1)
        try:
            with _no_stderr():  # which the process inherits, and would fill with its log
                self._save({"nothing": torch.zeros(1)}, start)
                self.wait()
        finally:
            dist.destroy_process_group()
            shutil.rmtree(start, ignore_errors=True)
            meeting_place.unlink(missing_ok=True)

    def _new_stager(self, on_gpu: bool) -> DefaultStager | None:
        return _kept_stager(on_gpu, shared_memory=True)


class TorchCheckpointing(Saver):
    """Meta's torch_checkpointing: a thread stages into shared memory, a process writes."""

    name = "torch_checkpointing"
    restore_name = "torch_checkpointing"
    fsyncs = False

    def __init__(self, state: TrainState, directory: Path) -> None:
        super().__init__(state, directory)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        # Direct I/O, its default, fails with EINVAL on common disks: it writes from unaligned memory.
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))
        self._written: Future[Any] | None = None

    def save(self, step: int) -> None:
        """Start staging."""
        self._written = self._manager.save(str(self.path(step)), contents(self.state))

    def before_update(self) -> None:
        """Wait until the state is staged."""
        with self._manager.lock():
            return

    def in_flight(self) -> bool:
        """Whether the save is not done."""
        return self._written is not None and not self._written.done()

    def wait(self) -> None:
        """Wait for the save."""
        if self._written is not None:
            self._written.result(TIMEOUT)

    def restore(self, step: int, target: TrainState) -> None:
        """Read into the model's tensors; the optimizer's are new ones."""
        into = {"model": target.model.state_dict(), "optimizer": None, "scheduler": None, "counters": None}
        fill(target, dict(self._manager.load(str(self.path(step)), into=into)))

    def close(self) -> None:
        """End the process."""
        self._manager.close()


class Lightning(Saver):
    """Lightning's AsyncCheckpointIO over TorchCheckpointIO: a clone of every tensor, a thread writes."""

    name = "Lightning AsyncCheckpointIO"
    restore_name = "Lightning load_checkpoint"
    fsyncs = False

    def __init__(self, state: TrainState, directory: Path) -> None:
        super().__init__(state, directory)
        from pytorch_lightning.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

        self._io = AsyncCheckpointIO(TorchCheckpointIO())
        self._path: Path | None = None

    def save(self, step: int) -> None:
        """Clone."""
        self._path = self.path(step)
        self._io.save_checkpoint(contents(self.state), str(self._path))

    def in_flight(self) -> bool:
        """It tells nobody, but a checkpoint appears under its name when it is complete."""
        return self._path is not None and not self._path.exists()

    def wait(self) -> None:
        """The one way to wait; the next save makes a new thread."""
        self._io.teardown()

    def restore(self, step: int, target: TrainState) -> None:
        """Read the file, then copy."""
        fill(target, self._io.load_checkpoint(str(self.path(step))))

    def close(self) -> None:
        """End the thread."""
        self._io.teardown()


class TorchSnapshot(Saver):
    """torchsnapshot's `async_take`: clones what is on the CPU, a thread writes, many files at once."""

    name = "torchsnapshot async_take"
    restore_name = "torchsnapshot restore"
    fsyncs = False

    def __init__(self, state: TrainState, directory: Path) -> None:
        super().__init__(state, directory)
        import torchsnapshot

        self._library: Any = torchsnapshot
        self._pending: Any = None

    def save(self, step: int) -> None:
        """Clone."""
        self._pending = self._library.Snapshot.async_take(str(self.path(step)), self._app_state(self.state))

    def in_flight(self) -> bool:
        """Whether the snapshot is not done."""
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Wait for the snapshot."""
        if self._pending is not None:
            self._pending.wait()

    def restore(self, step: int, target: TrainState) -> None:
        """Read into the tensors of `target`."""
        app_state = self._app_state(target)
        self._library.Snapshot(str(self.path(step))).restore(app_state)
        for name, value in app_state["counters"].items():
            setattr(target, name, value)

    def close(self) -> None:
        """Wait for what is in flight."""
        self.wait()

    def _app_state(self, state: TrainState) -> dict[str, Any]:
        counters = self._library.StateDict(**contents(state)["counters"])
        return {"model": state.model, "optimizer": state.optimizer, "scheduler": state.scheduler, "counters": counters}


@contextmanager
def _no_stderr() -> Iterator[None]:
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _fastest_of_three(action: Callable[[], None]) -> float:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
