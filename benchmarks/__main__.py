"""Run the benchmarks: `python -m benchmarks [NAME ...] [--quick] [--device cpu|cuda] [--directory DIR]`."""

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from benchmarks import durable, growth, in_flight, mirror, restore, scaling, stall, stop, training
from benchmarks.clock import require_device
from benchmarks.report import report
from benchmarks.results import Result, describe_machine, record
from benchmarks.settings import Settings

BENCHMARKS: dict[str, Callable[[Settings], Result]] = {
    "stall": stall.run,
    "in_flight": in_flight.run,
    "durable": durable.run,
    "training": training.run,
    "restore": restore.run,
    "growth": growth.run,
    "mirror": mirror.run,
    "stop": stop.run,
    "scaling": scaling.run,
}
ON_CUDA = ("stall", "training")
OUTPUTS = Path(__file__).resolve().parent.parent / "outputs"


def main() -> None:
    """Run what was asked for, print the tables, record and report them."""
    arguments = _parse()
    on_cuda = [f"{name}_cuda" for name in ON_CUDA]
    if arguments.report:
        report([*BENCHMARKS, *on_cuda])
        return
    require_device(arguments.device)
    possible = list(ON_CUDA) if arguments.device == "cuda" else list(BENCHMARKS)
    names = arguments.names or possible
    if impossible := [name for name in names if name not in possible]:
        sys.exit(f"error: {', '.join(impossible)}: not among {', '.join(possible)} (--device {arguments.device})")

    _silence_peers()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder goes then, too
    arguments.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmarks_", dir=arguments.directory) as folder:
        settings = Settings(Path(folder), arguments.device, arguments.quick)
        machine = describe_machine(settings.device, settings.directory)
        for name in names:
            start = time.monotonic()
            result = BENCHMARKS[name](settings)
            print(f"## {name}, {time.monotonic() - start:.0f} s\n\n{result.markdown()}", flush=True)
            if not settings.quick:
                record(name if settings.device == "cpu" else f"{name}_cuda", result, machine)
    if not arguments.quick:
        report([*BENCHMARKS, *on_cuda])


def _silence_peers() -> None:
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    os.environ["PYTHONWARNINGS"] = "ignore"  # for the processes that are started


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What a checkpoint costs, and peers'.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a look in 10 minutes, small state only; not recorded")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--directory", type=Path, default=OUTPUTS, help="the disk to measure; default: outputs/")
    parser.add_argument("--report", action="store_true", help="only write recorded tables to benchmarks/README.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
