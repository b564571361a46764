"""The save in the background: a snapshot in the loop's thread, all that follows in a thread of its own."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.background import byte_bar, yield_to_training
from src.checkpoint.catalog import Catalog
from src.checkpoint.finite import weights_are_finite
from src.checkpoint.manifest import STATE_NAME, Manifest
from src.checkpoint.policy import CheckpointPolicy
from src.checkpoint.sharded import Outline, ShardedWriter, outline_of
from src.checkpoint.snapshot import Snapshot, Snapshotter, map_tensors
from src.checkpoint.writer import being_written, commit, write_checkpoint
from src.sharding import local
from src.state import TrainState


@dataclass(frozen=True)
class Committed:
    """A checkpoint that is durable."""

    path: Path
    bytes: int
    """Size of all its files."""
    at: float
    """On the clock of `time.monotonic()`."""
    evaluated: bool
    """It holds the metrics of its state."""


@dataclass
class Save:
    """A save in flight."""

    global_step: int
    begun: float
    """On the clock of `time.monotonic()`."""
    stall: float
    """Seconds for which training stood still."""
    snapshot: Snapshot
    committed: "Future[Committed]"


def take_snapshot(snapshotter: Snapshotter, state: TrainState, in_pieces: bool) -> tuple[Snapshot, Outline]:
    """A snapshot of what of the state is on this rank, and which of its tensors are in pieces."""
    saved = state.state_dict()
    if not in_pieces:
        return snapshotter.take(saved, state.updated_tensors()), {}
    return snapshotter.take(map_tensors(saved, local), state.updated_tensors()), outline_of(saved)


class Saver:
    """Takes snapshots and commits them, one at a time; then rotates."""

    def __init__(
        self,
        policy: CheckpointPolicy,
        catalog: Catalog,
        before_commit: Callable[[], None],
        committed: Callable[[int], None],
        shards: ShardedWriter | None = None,
    ) -> None:
        """
        Args:
            before_commit: Called, in the thread that writes, before a checkpoint becomes visible.
            committed: Called, in the same thread, with the step of one that has become durable.
            shards: Writes what ranks have in pieces.
        """
        self._policy = policy
        self._catalog = catalog
        self._before_commit = before_commit
        self._committed = committed
        self._shards = shards
        self._snapshotter: Snapshotter | None = None
        self._buffers: frozenset[str] = frozenset()
        self._thread = ThreadPoolExecutor(1, "checkpoint-writer", initializer=yield_to_training)
        self._looker = ThreadPoolExecutor(1, "checkpoint-finite", initializer=yield_to_training)
        self._prepared: Future[None] | None = None

    def prepare(self, state: TrainState) -> None:
        """Have host memory for snapshots of `state` allocated and touched in the background, so that the first
        save costs no more than the others. Does nothing the second time."""
        if self._snapshotter is None:
            snapshotter = self._snapshotter_of(state)
            # In containers of its own: the optimizer's are live, and training goes on.
            containers = map_tensors(state.state_dict(), local)
            self._prepared = self._thread.submit(snapshotter.prepare, containers)

    def start(self, state: TrainState, manifest: Manifest) -> Save:
        """Begin to save `state`. The one before has to be committed, or to have failed.

        Raises:
            MemoryError: there is no room for a snapshot.
        """
        begun, start = time.monotonic(), time.perf_counter()
        snapshotter = self._snapshotter_of(state)
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.result()
        snapshot, outline = take_snapshot(snapshotter, state, in_pieces=self._shards is not None)
        committed = self._thread.submit(self._write, snapshot, manifest, outline)
        return Save(state.global_step, begun, time.perf_counter() - start, snapshot, committed)

    def await_with_progress(self, save: Save) -> None:
        """Wait until `save` is committed or has failed; from the first second on, with a progress bar."""
        file = self._catalog.temporary(save.global_step) / STATE_NAME
        with byte_bar(f"writing the checkpoint of step {save.global_step}", save.snapshot.nbytes) as bar:
            while True:
                try:
                    save.committed.exception(timeout=0.1)
                    return
                except StillRunning:
                    written = 0
                    with suppress(OSError):  # not there yet, or just renamed
                        written = file.stat().st_size
                    bar.update(max(0, written - bar.n))

    def close(self) -> None:
        """Wait for the save in flight, and give the memory back."""
        self._thread.shutdown(wait=True)
        self._looker.shutdown(wait=True)
        if self._snapshotter is not None:
            self._snapshotter.close()

    def _snapshotter_of(self, state: TrainState) -> Snapshotter:
        if self._snapshotter is None:
            self._snapshotter, self._buffers = Snapshotter(state.device), state.buffer_names()
        return self._snapshotter

    def _write(self, snapshot: Snapshot, manifest: Manifest, outline: Outline) -> Committed:
        if self._shards is None:
            host_state, manifest, finite = self._complete(snapshot, manifest)
            path, manifest = write_checkpoint(self._catalog, host_state, manifest, finite)
        else:
            path, manifest = self._write_together(self._shards, snapshot, manifest, outline)
        durable = time.monotonic()
        self._committed(manifest.global_step)
        self._catalog.rotate(self._policy)
        return Committed(path, manifest.nbytes, durable, evaluated=bool(manifest.metrics))

    def _complete(self, snapshot: Snapshot, manifest: Manifest) -> tuple[Any, Manifest, Callable[[], bool]]:
        host_state = snapshot.complete()
        self._before_commit()
        loss = float(host_state["loss"])
        finite = self._looker.submit(weights_are_finite, host_state, self._buffers)  # while the disk is busy
        return host_state, replace(manifest, loss=loss, finite=math.isfinite(loss)), finite.result

    def _write_together(
        self, shards: ShardedWriter, snapshot: Snapshot, manifest: Manifest, outline: Outline
    ) -> tuple[Path, Manifest]:
        host_state: Any = None
        finite: Callable[[], bool]
        with ExitStack() as stack:

            def begin() -> Path:
                nonlocal host_state, manifest, finite
                host_state, manifest, finite = self._complete(snapshot, manifest)
                return stack.enter_context(being_written(self._catalog, manifest))

            folder = shards.together(begin)[0]
            rest, reports = shards.write(folder, outline, host_state, finite)
            files = {name: entry for written, _ in reports for name, entry in written.items()}
            manifest = replace(manifest, files=files)
            return commit(self._catalog, folder, rest, manifest, lambda: all(numbers for _, numbers in reports))
