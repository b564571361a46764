"""A sweep at a glance: its jobs, what has become of them, and which is the best."""

import math
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from src.checkpoint.catalog import Catalog
from src.result import read_failure, read_result
from src.run import holder_of

SWEEP_COLUMNS = ["job", "state", "step", "best", ""]


def is_sweep(directory: Path) -> bool:
    """Whether a folder holds runs, and is none itself."""
    return not (directory / "checkpoints").is_dir() and bool(_jobs(directory))


def sweep_rows(directory: Path) -> list[list[str]]:
    """One row for each job of a sweep, under `SWEEP_COLUMNS`, the best first."""
    overrides = {job: _overrides(job) for job in _jobs(directory)}
    everywhere = set.intersection(*map(set, overrides.values()))
    rows = []
    for job, own in overrides.items():
        name = " ".join(override for override in own if override not in everywhere) or job.name
        rows.append((*_progress(job), name))
    rows.sort(key=lambda row: (row[0], row[-1]))
    return [[name, state, step, best, remark] for _, state, step, best, remark, name in rows]


def _jobs(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return [
        path for path in sorted(directory.iterdir()) if (path / ".hydra").is_dir() or (path / "checkpoints").is_dir()
    ]


def _overrides(job: Path) -> list[str]:
    try:
        return [str(override) for override in OmegaConf.load(job / ".hydra" / "overrides.yaml")]
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return [job.name]


def _progress(job: Path) -> tuple[float, str, str, str, str]:
    """Its rank (less is better), state, step, best metric, and what there is to say of it."""
    manifests = [manifest for _, manifest in Catalog(job / "checkpoints").readable()]
    step = str(manifests[-1].global_step) if manifests else ""
    failure = read_failure(job)
    if (holder := holder_of(job)) is not None:
        state, remark = "running", holder
    elif read_result(job) is not None:
        state, remark = "done", ""
    elif failure is not None:
        state, remark = "failed", failure.error
    else:
        state, remark = ("interrupted" if manifests else "not begun"), ""
    best = manifests[-1].best if manifests else None
    if best is None or not isinstance(best.get("value"), int | float):
        return math.inf, state, step, "", remark
    rank = -best["value"] if best.get("mode") == "max" else best["value"]
    return rank, state, step, f"{best.get('metric')} {best['value']:.4f} at step {best.get('global_step')}", remark
