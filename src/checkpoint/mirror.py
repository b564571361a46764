"""What resuming and saving ask of the place where checkpoints are besides the run's directory."""

import math
from collections.abc import Callable
from pathlib import Path

from src.checkpoint.catalog import RETIRED
from src.checkpoint.manifest import Manifest
from src.checkpoint.remote import Connect
from src.storage.local import LocalStorage


class Mirror:
    """Where a run's checkpoints are besides its directory: nowhere. What `storage=local` comes to."""

    url: str | None = None
    """Where it is, for people."""
    steps: frozenset[int] = frozenset()
    """The checkpoints that were there when it was opened."""

    def __init__(self, storage: LocalStorage) -> None:
        self.connect: Connect = storage.connect

    def open(self) -> None:
        """Become the one that writes there, and see what is there. Call it before anything is resumed."""

    def newest_manifest(self) -> Manifest | None:
        """Of the newest good one of `steps`."""
        return None

    def fetch(self, global_step: int) -> Path:
        """Bring a checkpoint of `steps` to the disk, verified, under a temporary name that the catalog can adopt."""
        raise NotImplementedError

    def retired(self) -> list[int]:
        """Steps that were abandoned there on purpose, for others that may never have arrived."""
        return []

    def forget(self, above: int) -> None:
        """What is there above that step does not count any more; `begin` sets it aside."""

    def begin(self, above: int, label: str = RETIRED) -> None:
        """Begin to mirror, now that it is known where training goes on: what is there above that step is abandoned,
        and set aside under this label."""

    def committed(self, global_step: int) -> None:
        """A checkpoint has been committed to the disk. Called by the thread that writes; returns at once."""

    def check(self) -> None:
        """Called every step; nearly free.

        Raises:
            MirrorError: another machine has taken the run over.
        """

    def newest_step(self) -> int | None:
        """The newest checkpoint that is known to be whole in the bucket, 0 if there is none; None without a mirror."""
        return None

    def lag(self) -> dict[str, float]:
        """What is on the disk and not yet there, for TensorBoard."""
        return {}

    def flush(self, patience: Callable[[], float] = lambda: math.inf) -> None:
        """Wait until everything is there, within limits; says what is not. Does nothing the second time.

        Args:
            patience: For how many seconds from now at most; asked again and again.
        """

    def insist(self) -> None:
        """To be called at the very end.

        Raises:
            MirrorError: not everything is there.
        """

    def close(self) -> None:
        """Stop, and let others write there."""


NO_MIRROR = Mirror(LocalStorage())
