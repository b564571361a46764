"""Checkpoints of a model that no rank has all of: torch's distributed checkpoints (DCP), under our manifest.

Each rank writes its pieces into the same folder, beside `state.pt`, which holds the rest. There, a tensor that is in
pieces is one on the meta device: its shape and type, without contents.
"""

import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from src.checkpoint.checksum import entry_of
from src.checkpoint.manifest import CorruptCheckpoint, FileEntry
from src.checkpoint.snapshot import TensorPath, map_tensors, tensor_paths

METADATA_NAME = ".metadata"
_SUFFIX = ".distcp"

Report = tuple[dict[str, FileEntry], bool]
"""What a rank has written, by file name; and whether its weights are numbers."""


class ShardedWriter:
    """Writes what is in pieces, on all ranks at the same time, in threads beside training."""

    def __init__(self, rank: int, ranks: int) -> None:
        """To be called by all ranks."""
        self._rank, self._ranks = rank, ranks
        self._mesh: DeviceMesh = init_device_mesh("cpu", (ranks,))
        group = dist.new_group(backend="gloo")  # of its own: another thread talks there than the loop's
        assert isinstance(group, dist.ProcessGroup)
        self._group = group

    def write(
        self,
        outline: Mapping[TensorPath, DTensor],
        finite: bool,
        prepare: Callable[[], Path],
        host_state: Any,
    ) -> tuple[Any, list[Report]]:
        """Write the pieces; to be called by all ranks for the same step.

        Args:
            outline: What is in pieces.
            finite: Whether the weights that are here are numbers.
            prepare: Makes the folder; called on rank 0.
            host_state: The state in host memory, with the pieces that are here.

        Returns:
            The rest of the state; and on rank 0 all ranks' reports.

        Raises:
            OSError: a rank could not; raised on all of them.
        """
        folder = self._folder_of_rank_0(prepare)
        found: list[Tensor] = []

        def take_out(path: TensorPath, tensor: Tensor) -> Tensor:
            if path not in outline:
                return tensor
            found.append(tensor)
            return torch.empty(outline[path].shape, dtype=tensor.dtype, device="meta")

        paths = tensor_paths(host_state)
        rest = map_tensors(host_state, lambda tensor: take_out(next(paths), tensor))
        pieces = {
            _name(path): DTensor.from_local(
                tensor, self._mesh, live.placements, run_check=False, shape=live.shape, stride=live.stride()
            )
            for (path, live), tensor in zip(outline.items(), found, strict=True)
        }
        try:
            save(pieces, storage_writer=_Writer(str(folder)), process_group=self._group)
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise OSError(
                getattr(reason, "errno", None) or 0, getattr(reason, "strerror", None) or str(reason)
            ) from error
        mine = list(folder.glob(f"__{self._rank}_*{_SUFFIX}"))
        if self._rank == 0:
            mine.append(folder / METADATA_NAME)
        report: Report = {path.name: entry_of(path) for path in mine}, finite
        reports: list[Any] | None = [None] * self._ranks if self._rank == 0 else None
        dist.gather_object(report, reports, group=self._group)
        return rest, reports or []

    def _folder_of_rank_0(self, prepare: Callable[[], Path]) -> Path:
        answer: list[Any] = [None]
        if self._rank == 0:
            try:
                answer = [prepare()]
            except OSError as error:
                answer = [error]
        dist.broadcast_object_list(answer, 0, group=self._group)
        if isinstance(answer[0], OSError):
            raise answer[0]
        folder: Path = answer[0]
        return folder


def outline_of(state: Any) -> dict[TensorPath, DTensor]:
    """The tensors of a state that are in pieces, with the pieces that are here."""
    return {path: tensor for path, tensor in _by_path(state).items() if isinstance(tensor, DTensor)}


def with_pieces(folder: Path, state: Any) -> Any:
    """The state of a sharded checkpoint with all tensors whole, in host memory; of any other, itself.

    Raises:
        CorruptCheckpoint: it is not what was saved.
    """
    pieces = {
        _name(path): torch.empty_like(tensor, device="cpu")
        for path, tensor in _by_path(state).items()
        if tensor.is_meta
    }
    if not pieces:
        return state
    try:
        reader = _Reader(str(folder))
        reader.read_metadata()  # first, for torch would log what is wrong with it at length
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(pieces, storage_reader=reader, no_dist=True)
    except (CheckpointException, pickle.UnpicklingError, EOFError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CorruptCheckpoint(f"the pieces cannot be put together ({type(error).__name__}: {reason})") from error
    paths = tensor_paths(state)
    return map_tensors(state, lambda tensor: pieces.get(_name(next(paths)), tensor))


def _by_path(state: Any) -> dict[TensorPath, Tensor]:
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(state, note)
    return dict(zip(tensor_paths(state), tensors, strict=True))


def _name(path: TensorPath) -> str:
    return ".".join(map(str, path))


class _Writer(FileSystemWriter):
    """torch's, which would note where it writes, in a form that reading has to execute."""

    def storage_meta(self) -> StorageMeta:
        """Nothing about this machine."""
        return StorageMeta(save_id=self.save_id)


class _Reader(FileSystemReader):
    """torch's, which would unpickle whatever the metadata names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, in which nothing is executed."""
        content = (Path(self.path) / METADATA_NAME).read_bytes()
        metadata = _Unpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise CorruptCheckpoint(f"{METADATA_NAME} holds a {type(metadata).__name__}")
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
            "BytesStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
