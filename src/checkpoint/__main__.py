"""Look at checkpoints without training: of a run directory, or of a run in a bucket (s3://bucket/prefix/run)."""

import argparse
import logging
import sys
import tempfile
from collections.abc import Container, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from src.background import byte_bar
from src.checkpoint.catalog import CORRUPT, Catalog, verify
from src.checkpoint.export import export
from src.checkpoint.manifest import CorruptCheckpoint, Manifest
from src.checkpoint.remote import Connect, RemoteCatalog, at_hand, catalogs_at, is_url
from src.checkpoint.run_files import RunFiles
from src.checkpoint.sweep_table import SWEEP_COLUMNS, is_sweep, sweep_rows
from src.errors import CheckpointError, ConfigError, HoldfastError
from src.goodput import account_of, lives_of
from src.run import locked, name_of
from src.storage.bucket import Bucket
from src.storage.failures import StoreError
from src.storage.s3 import S3Storage

_COLUMNS = ["step", "epoch", "size", "age", "metrics", "where", ""]

Found = dict[int, Manifest | Exception]
"""Checkpoints by step: the manifest, or what is wrong."""

_NO_CONFIG = (YAMLError, OmegaConfBaseException)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 1 if a checkpoint is damaged, 2 if there is none, 3 if it cannot be
    looked at."""
    options = _parse(arguments)
    logging.basicConfig(format="%(message)s")
    try:
        return int(options.run(options))
    except HoldfastError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (CorruptCheckpoint, StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return CheckpointError.exit_code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m src.checkpoint", description=__doc__)
    store = argparse.ArgumentParser(add_help=False)
    for name in ("endpoint-url", "region", "profile"):
        store.add_argument(f"--{name}", help=f"for s3:// URLs: as storage.{name.replace('-', '_')}")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=[store])
        added.set_defaults(run=run)
        return added

    for name, run, text in (
        ("ls", _list, "list the checkpoints of a run, here and in its mirror, by their manifests; or a sweep's jobs"),
        ("verify", _verify, "compare every byte of every checkpoint with its checksum"),
    ):
        added = command(name, run, text)
        added.add_argument("place", metavar="RUN", help="a run directory, or s3://bucket/prefix/run")
        added.add_argument("--local", action="store_true", help="do not look into the run's mirror")
    added = command(
        "pull", _pull, "bring a run from a bucket to a run directory: its newest good checkpoint, log, curves"
    )
    added.add_argument(
        "place",
        metavar="SOURCE",
        help="s3://bucket/prefix/run[/checkpoints/step_…], or a run directory whose mirror is meant",
    )
    added.add_argument(
        "target",
        metavar="DIRECTORY",
        nargs="?",
        type=Path,
        help="default: that run directory, or outputs/ and the run's name",
    )
    added.add_argument("--all", action="store_true", help="all checkpoints, not only the newest good one")
    added = command("export", _export, "write the weights alone to a .pt or .safetensors file")
    added.add_argument("place", metavar="CHECKPOINT", help="a checkpoint or a run, as a path or an s3:// URL")
    added.add_argument("target", metavar="FILE", type=Path)
    return parser.parse_args(arguments)


def _list(options: argparse.Namespace) -> int:
    if not is_url(options.place) and is_sweep(Path(options.place)):
        _print_table(SWEEP_COLUMNS, sweep_rows(Path(options.place)), numbers=(2,))
        return 0
    local, remote, _ = _places(options)
    here: Found = _manifests(local)
    there: Found = {}
    try:
        there = remote.manifests(remote.steps()) if remote else {}
    except StoreError as error:
        if not here:
            raise
        print(f"cannot look into the mirror: {error}", file=sys.stderr)
    return _report(options.place, here, there, looked=())


def _verify(options: argparse.Namespace) -> int:
    local, remote, _ = _places(options)
    here: Found = {}
    there: Found = {}
    for step, path in local.by_step().items() if local else ():
        try:
            here[step] = verify(path)
        except CorruptCheckpoint as error:
            here[step] = error
    for step in remote.steps() if remote else ():
        try:
            there[step] = remote.verify(step)  # type: ignore[union-attr]
        except CorruptCheckpoint as error:
            there[step] = error
    return _report(options.place, here, there, looked=("verified",))


def _pull(options: argparse.Namespace) -> int:
    _, remote, wanted = _places(options)
    if remote is None:
        raise ConfigError("pull", options.place, "is a run without a mirror; name an s3:// URL")
    root = remote.prefix.removesuffix("/checkpoints")
    target = options.target or (_directory_of(root) if is_url(options.place) else Path(options.place))
    target.mkdir(parents=True, exist_ok=True)
    catalog = Catalog(target / "checkpoints")
    with locked(target):
        pulled = 0
        for step in reversed(remote.steps()):
            if wanted in (None, step):
                pulled += _pull_one(remote, step, catalog)
                if pulled and not options.all:
                    break
        RunFiles(remote.bucket, root, target).fetch_all()
    if not pulled:
        raise ConfigError("pull", options.place, "has no good checkpoint")
    return 0


def _pull_one(remote: RemoteCatalog, step: int, catalog: Catalog) -> bool:
    """Returns whether it is here now, whole."""
    if (path := catalog.by_step().get(step)) is not None:
        try:
            verify(path)
            return True
        except CorruptCheckpoint as error:
            print(f"damaged: {path} ({error}); kept as {catalog.set_aside(path, CORRUPT).name}", file=sys.stderr)
    folder = catalog.temporary(step)
    try:
        with byte_bar(f"step {step}") as bar:
            remote.fetch(step, folder, bar.update)
    except CorruptCheckpoint as error:
        print(f"skipped damaged checkpoint {remote.url(step)}: {error}", file=sys.stderr)
        return False
    print(catalog.adopt(folder))
    return True


def _directory_of(root: str) -> Path:
    """Where a run is that has this key in a bucket, as far as the key tells: a prefix may be of any depth."""
    _, is_sweep, job = root.rpartition("/sweeps/")
    return Path("outputs", "sweeps", job) if is_sweep else Path("outputs", root.rpartition("/")[2])


def _export(options: argparse.Namespace) -> int:
    with (
        tempfile.TemporaryDirectory(prefix=".tmp_export_", dir=options.target.parent) as folder,
        at_hand("export", options.place, _connect(options), Path(folder)) as path,
    ):
        step = export(path, options.target)
    print(f"{options.target}: weights of step {step}")
    return 0


def _connect(options: argparse.Namespace) -> Connect:
    """For URLs: the place that the options describe, by default what boto3's own settings say."""
    return partial(Bucket, endpoint_url=options.endpoint_url, region=options.region, profile=options.profile)


def _places(options: argparse.Namespace) -> tuple[Catalog | None, RemoteCatalog | None, int | None]:
    """Where the checkpoints of a run are: on the disk, and in a bucket; and which one is meant, if a URL names one."""
    if is_url(options.place):
        places, wanted = catalogs_at(options.place, _connect(options))
        return None, next((place for place in places if place.steps()), places[0]), wanted
    directory = Path(options.place)
    remote = None if getattr(options, "local", False) else _mirror_of(directory)
    return Catalog(directory / "checkpoints"), remote, None


def _mirror_of(directory: Path) -> RemoteCatalog | None:
    """The mirror that a run was trained with, by the config that Hydra has left in its directory; None, and a word of
    why, if it cannot be made out."""
    if not (directory / ".hydra").is_dir():
        return None
    try:
        storage = OmegaConf.to_container(OmegaConf.load(directory / ".hydra" / "config.yaml").storage, resolve=True)
        runtime = OmegaConf.load(directory / ".hydra" / "hydra.yaml").hydra.runtime
        name = name_of(Path(runtime.output_dir), Path(runtime.cwd))
        # A file is no reason to call whatever it names: only this one class, by its name.
        if not isinstance(storage, dict) or storage.pop("_target_", None) != f"{S3Storage.__module__}.S3Storage":
            return None
        place = S3Storage(**{str(key): value for key, value in storage.items()})
        return RemoteCatalog(place.connect(tries=1, read_timeout=8), f"{place.key(name)}/checkpoints")
    except (OSError, StoreError, ConfigError, AttributeError, TypeError, ValueError, *_NO_CONFIG) as error:
        print(f"cannot tell the mirror from {directory / '.hydra'}: {' '.join(str(error).split())}", file=sys.stderr)
        return None


def _manifests(catalog: Catalog | None) -> Found:
    found: Found = {}
    for step, path in catalog.by_step().items() if catalog else ():
        try:
            found[step] = catalog.manifest(path)  # type: ignore[union-attr]
        except (CorruptCheckpoint, CheckpointError) as error:
            found[step] = error
    return found


def _report(place: str, here: Found, there: Found, looked: Sequence[str]) -> int:
    steps = sorted(here.keys() | there.keys())
    if not steps:
        print(f"error: {place}: has no checkpoints", file=sys.stderr)
        return 2
    newest = [found for step in reversed(steps) for found in (here.get(step), there.get(step))]
    best = next((found.best for found in newest if isinstance(found, Manifest) and found.best), None)
    rows, damaged = [], False
    for step in steps:
        copies = {"local": here.get(step), "mirror": there.get(step)}
        where = "+".join(name for name, copy in copies.items() if copy is not None)
        remarks = [f"{name} DAMAGED: {copy}" for name, copy in copies.items() if isinstance(copy, Exception)]
        damaged = damaged or bool(remarks)
        good = next((copy for copy in copies.values() if isinstance(copy, Manifest)), None)
        remarks = [*looked, *remarks] if good and not remarks else remarks
        if best is not None and best.get("global_step") == step:
            remarks.append("best")
        rows.append([str(step), *(_cells(good) if good else [""] * 4), where, " ".join(remarks)])
    _print_table(_COLUMNS, rows, numbers=range(4))
    if not is_url(place) and (lives := lives_of(Path(place))):
        print(f"goodput: {account_of(lives)}")
    return 1 if damaged else 0


def _cells(manifest: Manifest) -> list[str]:
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in manifest.metrics.items() if value is not None)
    return [str(manifest.epoch), f"{manifest.nbytes / 1e6:.1f} MB", _age(manifest.created), metrics]


def _age(created: str) -> str:
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(created)
    except (ValueError, TypeError):
        return "?"
    return str(timedelta(seconds=max(0, round(age.total_seconds()))))


def _print_table(header: list[str], rows: list[list[str]], numbers: Container[int]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        cells = [
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
