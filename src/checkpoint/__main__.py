"""Look at checkpoints without training: `python -m src.checkpoint ls|verify outputs/RUN`."""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from src.checkpoint.catalog import Catalog, step_of, verify
from src.checkpoint.manifest import MANIFEST_NAME, CorruptCheckpoint, Manifest, read_manifest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 1 if a checkpoint is damaged, 2 if there is none."""
    parser = argparse.ArgumentParser(prog="python -m src.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (
        ("ls", "list the checkpoints of a run, by their manifests"),
        ("verify", "read every byte of every checkpoint and compare it with its checksum"),
    ):
        commands.add_parser(name, help=help_text).add_argument("run", type=Path, help="a run directory")
    options = parser.parse_args(arguments)

    paths = Catalog(options.run / "checkpoints").paths()
    if not paths:
        print(f"error: {options.run}: has no checkpoints", file=sys.stderr)
        return 2
    verifying = options.command == "verify"
    rows, damaged, best = [], 0, None
    for path in reversed(paths):
        try:
            manifest = verify(path) if verifying else read_manifest(path / MANIFEST_NAME)
        except CorruptCheckpoint as error:
            damaged += 1
            rows.append([str(step_of(path)), "", "", "", "", f"DAMAGED: {error}"])
            continue
        best = best or manifest.best  # the newest one knows
        remarks = ["verified"] * verifying
        remarks += ["best"] * (best is not None and best.get("global_step") == manifest.global_step)
        rows.append(_row(manifest, " ".join(remarks)))
    _print_table(["step", "epoch", "size", "age", "metrics", ""], rows[::-1])
    return 1 if damaged else 0


def _row(manifest: Manifest, remark: str) -> list[str]:
    size = sum(entry.size for entry in manifest.files.values())
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in manifest.metrics.items() if value is not None)
    step, epoch = str(manifest.global_step), str(manifest.epoch)
    return [step, epoch, f"{size / 1e6:.1f} MB", _age(manifest.created), metrics, remark]


def _age(created: str) -> str:
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(created)
    except (ValueError, TypeError):
        return "?"
    return str(timedelta(seconds=max(0, round(age.total_seconds()))))


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        # The first four columns are numbers: right-aligned.
        cells = [
            cell.rjust(width) if column < 4 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
