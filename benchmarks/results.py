"""What a benchmark found: tables to read, and a JSON file that says on which machine."""

import importlib.metadata
import json
import os
import platform
import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

_PACKAGES = (
    "torch",
    "torchvision",
    "torch-checkpointing",
    "pytorch-lightning",
    "torchsnapshot",
    "fsspec",
    "awscrt",
    "numpy",
)


@dataclass(frozen=True)
class Table:
    """Cells are ready to be read; numbers are in `Result.measurements`."""

    caption: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As GitHub shows it: the first column to the left, figures to the right."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows)]
        return f"{self.caption}\n\n" + "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Result:
    """What one benchmark found."""

    tables: list[Table]
    measurements: dict[str, Any] = field(default_factory=dict)
    """Medians by table and saver, in seconds, bytes, or as ratios."""

    def markdown(self) -> str:
        """All tables."""
        return "\n".join(table.markdown() for table in self.tables)


def record(name: str, result: Result, machine: dict[str, Any]) -> None:
    """Write `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"benchmark": name, "machine": machine, **asdict(result)}, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def recorded(name: str) -> tuple[Result, dict[str, Any]] | None:
    """What `record` wrote, and the machine; None if it never did."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    return Result([Table(**table) for table in data["tables"]], data["measurements"]), data["machine"]


def describe_machine(device: str, directory: Path) -> dict[str, Any]:
    """What the figures depend on."""
    machine: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "filesystem": _filesystem(directory),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
    }
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def times(ratio: float) -> str:
    """A ratio as a cell."""
    return f"{ratio:.2f} ×" if ratio < 10 else f"{ratio:.0f} ×"


def seconds(value: float) -> str:
    """A duration as a cell."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def failure_rows(failures: dict[str, str], columns: int) -> list[list[str]]:
    """A row for each saver that does not run, with the reason."""
    return [[name, f"does not run: {reason}", *[""] * (columns - 2)] for name, reason in failures.items()]


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _filesystem(directory: Path) -> str:
    """The type of the file system that holds a folder, like `ext4`."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(len(point), kind) for point, kind in mounts if directory.resolve().is_relative_to(point)]
    return max(above)[1] if above else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
