"""What the command line asks for."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.workloads import LARGE, RESNET50, SMALL, VIT_B_16, Workload


@dataclass(frozen=True)
class Settings:
    """The same for all benchmarks of one run."""

    directory: Path
    """Where checkpoints go; temporary."""
    device: str = "cpu"
    quick: bool = False
    """A look in a few minutes: the small size, a few rounds. Nothing is recorded."""

    @property
    def workloads(self) -> list[Workload]:
        """A small and a large state."""
        both = [RESNET50, VIT_B_16] if self.device == "cuda" else [SMALL, LARGE]
        return both[:1] if self.quick else both

    def sizes(self, small: int, large: int) -> Iterator[tuple[Workload, int, Path]]:
        """Each workload, how many rounds to measure it (`small`, `large`), and an empty folder for it."""
        for workload, rounds in zip(self.workloads, (small, large), strict=False):
            with tempfile.TemporaryDirectory(dir=self.directory) as folder:
                yield workload, 2 if self.quick else rounds, Path(folder)
