"""`python -m src.checkpoint` and the mirror: list, verify, pull, export, here and in a bucket."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src import run as run_module
from src.checkpoint.__main__ import main
from src.run import locked
from tests.conftest import TINY, Result
from tests.store import ROOT, RUN, Network, Store, damage, drop, on_s3, steps_here
from tests.test_resume import differences

Train = Callable[..., Result]


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(arguments)
    return (status, *capsys.readouterr())


def test_ls_verify_pull_and_export_know_the_bucket(
    train: Train, store: Store, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*TINY, *on_s3(store, bucket), "trainer.epochs=2", "checkpoint.every=5")
    url, place = f"s3://{bucket}/{ROOT}", ("--endpoint-url", store.endpoint)
    listed = cli(capsys, "ls", str(RUN))
    assert listed[0] == 0
    assert listed[1].count("local+mirror") == len(steps_here())
    assert re.search(r"^ +26 +2 +\S+ MB .*val/accuracy.* local\+mirror", listed[1], re.MULTILINE)
    there = cli(capsys, "ls", url, *place)
    assert there[0] == 0
    assert "local" not in there[1].replace("local+", "")
    assert cli(capsys, "ls", str(RUN), "--local")[1].count("mirror") == 0

    verified = cli(capsys, "verify", url, *place)
    assert verified[0] == 0
    assert verified[1].count("verified") == len(steps_here())
    damage(store, bucket, 26, "a flipped bit")
    status, out, _ = cli(capsys, "verify", str(RUN))
    assert status == 1
    assert "mirror DAMAGED: state.pt has" in out

    status, out, err = cli(capsys, "pull", url, "outputs/pulled", *place)
    assert status == 0, err
    assert "skipped damaged checkpoint" in err
    assert steps_here(Path("outputs/pulled")) == [25]
    assert (Path("outputs/pulled") / "train.log").is_file()
    assert (Path("outputs/pulled") / ".hydra/config.yaml").is_file()
    assert cli(capsys, "pull", url, "outputs/pulled", "--all", *place)[0] == 0
    assert steps_here(Path("outputs/pulled")) == [step for step in steps_here() if step != 26]

    shutil.rmtree(RUN / "checkpoints")
    assert cli(capsys, "pull", str(RUN))[0] == 0
    assert steps_here() == [25]

    weights = torch.load(RUN / "checkpoints/step_00000025/state.pt", weights_only=True)["model_state_dict"]
    assert cli(capsys, "export", f"{url}/checkpoints/step_00000025", "weights.safetensors", *place)[0] == 0
    assert differences(dict(sorted(load_file("weights.safetensors").items())), dict(sorted(weights.items()))) == []
    assert cli(capsys, "export", str(RUN), "weights.pt")[0] == 0
    assert differences(torch.load("weights.pt", weights_only=True), dict(weights)) == []
    status, _, err = cli(capsys, "export", str(RUN), "weights.pt")
    assert status == 2
    assert "exists already" in err
    assert cli(capsys, "export", str(RUN), "weights.bin")[0] == 2
    assert not list(Path().glob(".tmp*"))


def test_the_command_line_says_what_is_wrong_in_one_line(
    store: Store, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ("--endpoint-url", store.endpoint)
    assert cli(capsys, "ls", f"s3://{bucket}/nothing", *place) == (
        2,
        "",
        f"error: s3://{bucket}/nothing: has no checkpoints\n",
    )
    status, _, err = cli(capsys, "ls", "s3://no-such-bucket-here/run", *place)
    assert status == 3
    assert "there is no bucket of that name" in err
    status, _, err = cli(capsys, "pull", str(tmp_path))
    assert status == 2
    assert "is a run without a mirror" in err


def test_pull_replaces_what_is_damaged_here(
    train: Train, store: Store, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*TINY, *on_s3(store, bucket), "trainer.epochs=1")
    (RUN / "checkpoints/step_00000013/state.pt").write_bytes(b"rubbish")
    status, out, err = cli(capsys, "pull", str(RUN))
    assert status == 0
    assert "kept as step_00000013.corrupt" in err
    assert "step_00000013" in out
    assert cli(capsys, "verify", str(RUN), "--local")[0] == 0


def test_pull_keeps_away_from_a_run_that_is_training(
    train: Train, store: Store, bucket: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(*TINY, *on_s3(store, bucket), "trainer.epochs=1")
    monkeypatch.setattr(run_module, "_LOCK_PATIENCE", 0.0)
    with locked(RUN):
        status, _, err = cli(capsys, "pull", str(RUN))
    assert status == 1
    assert "is being written by process" in err


def test_pull_puts_a_job_of_a_sweep_where_sweeps_are(
    store: Store, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store.write(bucket, "team/holdfast/sweeps/lr/a/train.log", b"a log")
    url = f"s3://{bucket}/team/holdfast/sweeps/lr/a"
    assert cli(capsys, "pull", url, "--endpoint-url", store.endpoint)[0] == 2  # it has no checkpoint yet
    assert Path("outputs/sweeps/lr/a/train.log").read_text() == "a log"


def test_a_config_found_on_a_disk_is_not_called(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*TINY, "trainer.epochs=1")
    config = RUN / ".hydra/config.yaml"
    evil = config.read_text().replace("src.storage.local.LocalStorage", "os.system")
    assert evil != config.read_text()
    config.write_text(evil)
    assert cli(capsys, "ls", str(RUN))[0] == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: text.index("storage:") + 12] + "\t- [",
        lambda text: text.replace("prefix: holdfast", "prefix: null"),
        lambda text: text.replace("prefix: holdfast", "prefix: holdfast\n  colour: red"),
        lambda text: text.replace("prefix: holdfast", "prefix: ${oc.env:NOT_SET_ANYWHERE}"),
        lambda text: text.replace("profile: null", "profile: of_another_machine"),
    ],
)
def test_ls_shows_what_is_here_when_the_mirror_cannot_be_made_out(
    train: Train, store: Store, bucket: str, capsys: pytest.CaptureFixture[str], change: Callable[[str], str]
) -> None:
    train(*TINY, *on_s3(store, bucket), "trainer.epochs=1")
    config = RUN / ".hydra/config.yaml"
    config.write_text(change(config.read_text()))
    status, out, err = cli(capsys, "ls", str(RUN))
    assert status == 0
    assert " 13 " in out
    assert err.startswith(f"cannot tell the mirror from {RUN}/.hydra: ")
    assert err.count("\n") == 1


def test_a_folder_in_the_bucket_that_holds_another_step_is_damaged(
    train: Train, store: Store, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*TINY, *on_s3(store, bucket), "trainer.epochs=1")
    for name in ("manifest.json", "state.pt"):
        body = store.read(bucket, f"{ROOT}/checkpoints/step_00000013/{name}")
        store.write(bucket, f"{ROOT}/checkpoints/step_00000099/{name}", body)
    status, out, _ = cli(capsys, "verify", f"s3://{bucket}/{ROOT}", "--endpoint-url", store.endpoint)
    assert status == 1
    assert "mirror DAMAGED: manifest.json says step 13" in out


def test_ls_shows_what_is_here_when_the_bucket_cannot_be_reached(
    train: Train, network: Network, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*TINY, *on_s3(network, bucket), "trainer.epochs=1")
    drop(network)
    status, out, err = cli(capsys, "ls", str(RUN))
    assert status == 0
    assert " 13 " in out
    assert "cannot look into the mirror: s3://" in err
