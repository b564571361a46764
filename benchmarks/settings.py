"""What the command line asks for."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import Result, Table
from benchmarks.workloads import LARGE, RESNET50, SMALL, VIT_B_16, Workload

Compare = Callable[[Workload, int, Path], tuple[str, Table, dict[str, Any]]]
"""One comparison: of a workload, in so many rounds, in a folder. Gives a label, a table, and its figures."""


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

    def at_each_size(self, compare: Compare, small: int, large: int) -> Result:
        """Compare the savers with each workload, in an empty folder, in so many rounds."""
        result = Result([], {})
        for workload, rounds in zip(self.workloads, (small, large), strict=False):
            with tempfile.TemporaryDirectory(dir=self.directory) as folder:
                label, table, measured = compare(workload, 1 if self.quick else rounds, Path(folder))
            result.tables.append(table)
            result.measurements[label] = measured
        return result
