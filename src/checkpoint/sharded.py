"""Checkpoints of a model that no rank has all of: torch's distributed checkpoints (DCP), under our manifest.

Each rank writes its pieces into the same folder, beside `state.pt`, which holds the rest. There, a tensor that is in
pieces is one on the meta device: its shape and type, without contents.
"""

import io
import pickle
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from src.checkpoint.catalog import TEMPORARY_PREFIX
from src.checkpoint.checksum import entry_of
from src.checkpoint.manifest import MANIFEST_NAME, NOT_THERE, CorruptCheckpoint, FileEntry, read_manifest
from src.checkpoint.snapshot import TensorPath, map_tensors_by_path, tensors_by_path
from src.distributed import TIMEOUT
from src.errors import ConfigError

METADATA_NAME = ".metadata"
_SUFFIX = ".distcp"

T = TypeVar("T")

Outline = dict[TensorPath, DTensor]
"""What of a state is in pieces."""

Report = tuple[dict[str, FileEntry], bool]
"""What a rank has written, by file name; and whether its weights are numbers."""


class OtherRankFailed(OSError):
    """It says itself why."""


class ShardedWriter:
    """Writes what is in pieces, on all ranks at the same time, in threads beside training."""

    def __init__(self, rank: int, ranks: int) -> None:
        """To be called by all ranks."""
        self._rank, self._ranks = rank, ranks
        self._mesh: DeviceMesh = init_device_mesh("cpu", (ranks,))
        # Of its own: another thread talks there than the loop's.
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do something on all ranks, or fail on all of them: none ever waits for one that has given up.

        Returns:
            What came of it, by rank.

        Raises:
            OSError: another rank could not. (What went wrong here is raised as it is.)
        """
        answer: tuple[T | None, str | None]
        error: Exception | None = None
        try:
            answer = work(), None
        except Exception as failed:
            error = failed
            answer = None, str(error) or type(error).__name__
        answers: list[Any] = [None] * self._ranks
        dist.all_gather_object(answers, answer, group=self._group)
        if error is not None:
            raise error
        for rank, (_, reason) in enumerate(answers):
            if reason is not None:
                raise OtherRankFailed(f"rank {rank}: {reason}")
        return [value for value, _ in answers]

    def require_shared(self, folder: Path | None) -> None:
        """See that all ranks write where rank 0 does, before there is something to write.

        Args:
            folder: On rank 0, where checkpoints will be.

        Raises:
            ConfigError: a rank is on a machine that has not this folder.
        """
        with ExitStack() as stack:

            def mark() -> Path | None:
                if folder is None:
                    return None
                folder.mkdir(parents=True, exist_ok=True)
                return Path(
                    stack.enter_context(NamedTemporaryFile(dir=folder, prefix=f"{TEMPORARY_PREFIX}shared_")).name
                )

            marker = self.together(mark)[0]
            assert marker is not None
            blind = [str(rank) for rank, sees in enumerate(self.together(marker.exists)) if not sees]
        if blind:
            raise ConfigError(
                "hydra.run.dir",
                marker.parent.parent,
                f"rank {', '.join(blind)} has no such folder, or another one of that name: trainer=fsdp needs a run "
                "directory on a disk that all nodes share. Choose one, or trainer=ddp",
            )

    def write(
        self, folder: Path, outline: Outline, host_state: Any, finite: Callable[[], bool]
    ) -> tuple[Any, list[Report]]:
        """Write the pieces; to be called by all ranks for the same step.

        Args:
            folder: Of rank 0, there already.
            outline: What is in pieces.
            host_state: The state in host memory, with the pieces that are here.
            finite: Whether the weights that are here are numbers; asked when they are on the disk.

        Returns:
            The rest of the state, and all ranks' reports.

        Raises:
            OSError: a rank could not; on all of them.
        """
        pieces: dict[str, DTensor] = {}

        def take_out(path: TensorPath, tensor: Tensor) -> Tensor:
            if path not in outline:
                return tensor
            live = outline[path]
            pieces[_name(path)] = DTensor.from_local(
                tensor, self._mesh, live.placements, run_check=False, shape=live.shape, stride=live.stride()
            )
            return torch.empty(live.shape, dtype=tensor.dtype, device="meta")

        rest = map_tensors_by_path(host_state, take_out)
        try:
            save(pieces, storage_writer=_Writer(str(folder)), process_group=self._group)
        except CheckpointException as error:
            if self._rank not in error.failures:
                raise OtherRankFailed(f"rank {min(error.failures)}: {_cause_of(error)}") from error
            raise _cause_of(error, self._rank) from error

        def report() -> Report:
            mine = [*folder.glob(f"__{self._rank}_*{_SUFFIX}"), *([folder / METADATA_NAME] if self._rank == 0 else [])]
            return {path.name: entry_of(path) for path in mine}, finite()

        return rest, self.together(report)


def _cause_of(error: CheckpointException, rank: int | None = None) -> BaseException:
    """What DCP, which catches everything, was told by the system: on this rank, or on the first that failed."""
    cause, _ = error.failures[min(error.failures) if rank is None else rank]
    if isinstance(cause, OSError | MemoryError) or not isinstance(cause, Exception):
        return cause
    return OSError(f"{type(cause).__name__}: {cause}")


def outline_of(state: Any) -> Outline:
    """The tensors of a state that are in pieces, with the pieces that are here."""
    return {path: tensor for path, tensor in tensors_by_path(state).items() if isinstance(tensor, DTensor)}


class Pieces:
    """The pieces of a sharded checkpoint, which are put together one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        self._reader = _Reader(folder)

    def check(self, state: Any) -> None:
        """See whether all of the state is there.

        Args:
            state: As in `state.pt`, with an outline of what is in pieces.

        Raises:
            CorruptCheckpoint: it is not what was saved.
        """
        metadata = self._reader.read_metadata()
        for path, tensor in tensors_by_path(state).items():
            if not tensor.is_meta:
                continue
            name = _name(path)
            known = metadata.state_dict_metadata.get(name)
            if not isinstance(known, TensorStorageMetadata) or known.size != tensor.shape:
                raise CorruptCheckpoint(f"{METADATA_NAME} has no {name} of shape {tuple(tensor.shape)}")
            places = [MetadataIndex(name, chunk.offsets) in metadata.storage_data for chunk in known.chunks]
            if not all(places) or sum(chunk.sizes.numel() for chunk in known.chunks) != tensor.numel():
                raise CorruptCheckpoint(f"{METADATA_NAME} has not all pieces of {name}")

    def read(self, path: TensorPath, tensor: Tensor) -> Tensor:
        """The whole tensor, in host memory, of which `tensor` is the outline.

        Raises:
            CorruptCheckpoint: it is not what was saved.
            MemoryError: there is no room for it.
        """
        try:
            whole = torch.empty_like(tensor, device="cpu")
        except RuntimeError as error:  # torch's way to say it
            raise MemoryError(f"no room for {_name(path)}: {error}") from error
        self._reader.read_metadata()  # first, for torch would log what is wrong with it at length
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                load({_name(path): whole}, storage_reader=self._reader, planner=_Planner(), no_dist=True)
        except CheckpointException as error:
            cause = _cause_of(error)
            if isinstance(cause, MemoryError) or not isinstance(cause, Exception):
                raise cause from error
            if isinstance(cause, OSError) and cause.errno and not isinstance(cause, NOT_THERE):
                raise cause from error
            reason = " ".join(str(cause).split())[:300]
            raise CorruptCheckpoint(f"the pieces of {_name(path)} cannot be put together ({reason})") from error
        return whole


def _name(path: TensorPath) -> str:
    return ".".join(map(str, path))


class _Writer(FileSystemWriter):
    """torch's, which would note where it writes, in a form that reading has to execute."""

    def storage_meta(self) -> StorageMeta:
        """Nothing about this machine."""
        return StorageMeta(save_id=self.save_id)


class _Planner(DefaultLoadPlanner):
    """torch's, which would unpickle what the metadata calls bytes."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """There are none."""
        raise CorruptCheckpoint(f"{METADATA_NAME} names bytes where a tensor should be")


class _Reader(FileSystemReader):
    """torch's, which would unpickle whatever the metadata names, and read whatever file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, in which nothing is executed, and which names only files that the manifest has the sums of."""
        if self._metadata is None:
            self._metadata = self._read_metadata()
        return self._metadata

    def _read_metadata(self) -> Metadata:
        known = read_manifest(self._folder / MANIFEST_NAME).files
        try:
            metadata = _Unpickler(io.BytesIO((self._folder / METADATA_NAME).read_bytes())).load()
            places = metadata.storage_data.values()
            strange = {p.relative_path for p in places if p.relative_path not in known or p.transform_descriptors}
        except NOT_THERE:
            raise CorruptCheckpoint(f"{METADATA_NAME} is missing") from None
        except OSError:
            raise
        except Exception as error:  # what pickle raises on a damaged file is not specified
            raise CorruptCheckpoint(f"{METADATA_NAME} cannot be read ({type(error).__name__}: {error})") from error
        if not isinstance(metadata, Metadata) or strange:
            raise CorruptCheckpoint(f"{METADATA_NAME} names {', '.join(map(str, strange)) or 'nothing'}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Knows the few plain classes that DCP's metadata is made of."""

    def find_class(self, module: str, name: str) -> Any:
        """One of them."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{METADATA_NAME} names {module}.{name}")


_HARMLESS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
