"""The manifest: what a checkpoint says of itself, and the last of its files to be written."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from awscrt.checksums import crc64nvme

from src.checkpoint.policy import Saved
from src.errors import CheckpointError

FORMAT = 2
MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.pt"

# One path component, so a manifest from elsewhere cannot name a file outside its own folder.
_FILE_NAME = re.compile(r"\.metadata|[A-Za-z0-9_][A-Za-z0-9._-]*")

# The last line is about all above it: one flipped bit may leave it JSON, of another config, say.
_LAST_LINE = ',\n  "checksum": "crc64nvme:{crc:016x}"\n}}\n'
_LENGTH = len(_LAST_LINE.format(crc=0))


NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What the operating system says where a file should be and is not. Any other OSError may pass."""


class CorruptCheckpoint(Exception):
    """A checkpoint is damaged: a file is missing, of another size or content, or unreadable."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    size: int
    """Bytes."""
    checksum: str
    """`algorithm:hex` of the whole file (see `checksum.py`)."""


@dataclass(frozen=True)
class Fork:
    """Where training went back on purpose (`resume=PATH`, `resume=never`), and abandoned what it had come to."""

    above: int
    """The step above which the run's checkpoints of that time do not count any more; -1 if none does."""
    id: str
    """That no other fork has."""


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`."""

    global_step: int
    """Optimizer steps taken; also in the checkpoint's name."""
    epoch: int
    """Epochs completed."""
    files: Mapping[str, FileEntry]
    """By file name, inside the checkpoint's folder."""
    loss: float | None = None
    """Training loss of the last step; None if it was not finite."""
    finite: bool = True
    """Loss and weights are numbers."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """The evaluation of exactly these weights; empty if they were not evaluated."""
    best: Mapping[str, Any] | None = None
    """The best evaluation so far: `metric`, `mode`, `value`, `global_step`."""
    resumed_from: str | None = None
    """The `resume=PATH` that this lineage of checkpoints goes back to."""
    forks: Sequence[Fork] = ()
    """Of this lineage, in order; none if training has always gone on."""
    world_size: int = 1
    """Ranks that trained."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What exact resume depends on besides the state: versions, device, threads."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved config of the run."""
    created: str = ""
    """ISO 8601, UTC. Order is by `global_step`; this only tells which of two histories is the later one."""
    format: int = FORMAT

    @property
    def saved(self) -> Saved:
        """What a policy may know of it."""
        return Saved(self.global_step, self.metrics, self.finite)

    @property
    def nbytes(self) -> int:
        """Of all files together."""
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> str:
        """Strict JSON, with a checksum of its own: a number that is not finite becomes null."""
        return summed(json.dumps(_finite(asdict(self)), indent=2, allow_nan=False))


def summed(body: str) -> str:
    """A JSON object, as `json.dumps` indents it by two, with its checksum as a last entry."""
    start = body.removesuffix("\n}")
    return start + _LAST_LINE.format(crc=crc64nvme(start.encode()))


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        CorruptCheckpoint: it is missing, not JSON of the expected shape, or not what was written.
        CheckpointError: it is of another format: good, but not for this code.
        OSError: the disk cannot be read just now, which says nothing about the checkpoint.
    """
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except NOT_THERE:
        raise CorruptCheckpoint(f"{path.name} is missing") from None


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Check a manifest. Its contents are data from a disk or bucket, not to be trusted.

    Args:
        where: Path or URL, for the error.

    Raises:
        CorruptCheckpoint: it is not JSON of the expected shape, or not what was written.
        CheckpointError: it is of another format: good, but not for this code.
    """
    file_name = where.rpartition("/")[2]
    try:
        data = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{file_name} is no JSON ({error})") from error

    def take(key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = data.get(key, default)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CorruptCheckpoint(f"{file_name}: {key} is {value!r}")
        return value

    if not isinstance(data, dict):
        raise CorruptCheckpoint(f"{file_name} is not an object")
    start, last_line = text[:-_LENGTH], text[-_LENGTH:]
    is_whole = last_line == _LAST_LINE.format(crc=crc64nvme(start)).encode()
    if take("format", int) != FORMAT and (is_whole or data["format"] == 1):  # which had no checksum
        raise CheckpointError(
            f"{where} has format {data['format']}, this code reads {FORMAT}: use the code that wrote it"
        )
    if not is_whole:
        raise CorruptCheckpoint(f"{file_name} is not what was written: its own checksum is another")
    files = {}
    for name, entry in take("files", dict).items():
        size, checksum = (entry.get("size"), entry.get("checksum")) if isinstance(entry, dict) else (None, None)
        if not _FILE_NAME.fullmatch(name) or type(size) is not int or size < 0 or not isinstance(checksum, str):
            raise CorruptCheckpoint(f"{file_name}: file {name!r} is described by {entry!r}")
        files[name] = FileEntry(size, checksum)
    if STATE_NAME not in files:
        raise CorruptCheckpoint(f"{file_name} does not name {STATE_NAME}")
    metrics = take("metrics", dict, {})
    if not all(value is None or type(value) in (int, float) for value in metrics.values()):
        raise CorruptCheckpoint(f"{file_name}: metrics are {metrics!r}")
    optional = type(None)
    return Manifest(
        global_step=take("global_step", int),
        epoch=take("epoch", int),
        files=files,
        loss=take("loss", (int, float, optional)),
        finite=data.get("finite") is not False,
        metrics=metrics,
        best=take("best", (dict, optional)),
        resumed_from=take("resumed_from", (str, optional)),
        forks=[_fork(entry, file_name) for entry in take("forks", list, [])],
        world_size=take("world_size", int, 1),
        environment=take("environment", dict, {}),
        config=take("config", dict, {}),
        created=take("created", str, ""),
    )


def _fork(entry: Any, file_name: str) -> Fork:
    above, identity = (entry.get("above"), entry.get("id")) if isinstance(entry, dict) else (None, None)
    if type(above) is not int or not isinstance(identity, str):
        raise CorruptCheckpoint(f"{file_name}: a fork is {entry!r}")
    return Fork(above, identity)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
