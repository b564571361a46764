"""Every option of every config group works, and every wrong value is a one-line error before the first step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.datasets import CIFAR10

from tests.conftest import REPOSITORY, TINY, TINY_DATA, Result
from tests.store import Store

Train = Callable[..., Result]
SMALL = ("data.train_size=40", "data.val_size=8", "trainer.epochs=1", "checkpoint.keep=1")


def options(group: str) -> set[str]:
    return {path.stem for path in (REPOSITORY / "conf" / group).glob("[!_]*.yaml")}


@pytest.mark.parametrize("model", sorted(options("model")))
def test_every_model_trains_and_resumes(train: Train, model: str) -> None:
    command = [*TINY_DATA, *SMALL, f"model={model}"]
    if model == "vit_b_16":  # its real size makes checkpoints of 1 GB
        command += ["model.layers=1", "model.width=24", "model.heads=2", "data.image_size=16"]
    assert train(*command).status == 0
    again = train(*command, "trainer.epochs=2")
    assert again.status == 0
    assert "step 3, epoch 1" in again.output


@pytest.mark.parametrize("optimizer", sorted(options("optimizer")))
@pytest.mark.parametrize("scheduler", sorted(options("scheduler")))
def test_every_optimizer_with_every_scheduler(train: Train, optimizer: str, scheduler: str) -> None:
    assert train(*TINY, *SMALL, f"optimizer={optimizer}", f"scheduler={scheduler}").status == 0


@pytest.mark.parametrize("checkpoint", sorted(options("checkpoint")))
@pytest.mark.parametrize("storage", sorted(options("storage")))
def test_every_policy_with_every_storage(
    train: Train, store: Store, bucket: str, checkpoint: str, storage: str
) -> None:
    place = (f"storage.bucket={bucket}", f"storage.endpoint_url={store.endpoint}") if storage == "s3" else ()
    result = train(*TINY, *SMALL, f"checkpoint={checkpoint}", f"storage={storage}", *place)
    assert result.status == 0
    assert Path("outputs/tiny/checkpoints/step_00000003/manifest.json").exists()


@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.precision=bf16"],
        ["trainer.precision=fp16", "trainer.clip_grad_norm=0.5"],
        ["trainer.accumulate=4", "data.train_size=48"],
        ["trainer.channels_last=false", "trainer.deterministic=false"],
        ["trainer.seed=5", "trainer.log_every=2", "checkpoint.keep_every=1"],
    ],
    ids=" ".join,
)
def test_every_trainer_setting(train: Train, settings: list[str]) -> None:
    assert train(*TINY, *SMALL, *settings).status == 0


def test_compile_is_no_part_of_the_checkpoint(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[dict[str, Any]] = []
    original = torch.compile

    def compile_(model: torch.nn.Module, **options: Any) -> Any:
        settings.append(options)
        # torch's own debugging backend: the same wrapper around the model, without minutes of code generation
        return original(model, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_)
    assert train(*TINY, *SMALL, "trainer.compile=true").status == 0
    # With dynamic shapes a resumed process, which has not seen the earlier ones, runs other code (invariant 4).
    assert settings == [{"dynamic": False}]
    state = torch.load("outputs/tiny/checkpoints/step_00000003/state.pt", weights_only=True)
    assert next(iter(state["model_state_dict"])) == "0.weight"


def test_digits_is_the_default_and_learns(train: Train) -> None:
    result = train("model=small_cnn", "model.width=32", "optimizer=adamw", "optimizer.lr=0.01", "trainer.epochs=4")
    assert result.metric is not None
    assert result.metric > 0.8
    assert Path("outputs/model-small_cnn__model.width-32__optimizer-adamw__optimizer.lr-0.01").is_dir()


def test_digits_of_another_size(train: Train) -> None:
    assert train("model=small_cnn", "data.image_size=16", "trainer.epochs=1", "data.batch_size=256").status == 0


def test_synthetic_data_is_learnable(train: Train) -> None:
    result = train(*TINY, "trainer.epochs=5", "optimizer.lr=0.05", "data.noise=0.3")
    assert result.metric is not None
    assert result.metric > 0.9


def test_image_folder_reads_a_folder_of_pictures(train: Train, tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 3)):
        for label, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            folder = tmp_path / "pictures" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40 + number, 30), colour).save(folder / f"{number}.jpg")
    command = ["model=small_cnn", "data=image_folder", "data.image_size=16", "data.batch_size=4", "trainer.epochs=2"]
    assert train(*command, f"data.root={tmp_path}/pictures").status == 0
    assert "must hold train/CLASS" in train(*command, f"data.root={tmp_path}").output


def test_cifar10_reads_the_published_files(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    import numpy as np

    folder = tmp_path / "cifar" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        batch = {"data": np.random.randint(0, 256, (8, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3, 4, 5, 6, 7]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(number) for number in range(10)]}))
    command = ["model=small_cnn", "data=cifar10", "data.download=false", "data.batch_size=8", "trainer.epochs=1"]
    assert "has no CIFAR-10" in train(*command, f"data.root={tmp_path}/cifar").output, (
        "ours are not the published bytes"
    )
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: setattr(self, "classes", [str(n) for n in range(10)]))
    assert train(*command, f"data.root={tmp_path}/cifar").status == 0


@pytest.mark.parametrize("experiment", sorted(options("experiment")))
def test_every_experiment_composes(train: Train, experiment: str) -> None:
    shown = train(f"experiment={experiment}", "--cfg", "job").output
    assert "_target_" in shown
    assert "error" not in shown


def test_the_smoke_experiment_runs(train: Train) -> None:
    assert train("experiment=smoke").status == 0


WRONG = {
    "checkpoint.every=0": "checkpoint.every=0: must be a whole number >= 1",
    "checkpoint.every=abc": "checkpoint.every=abc: must be a whole number",
    "checkpoint.every=2.5": "checkpoint.every=2.5: must be a whole number",
    "checkpoint.keep=0": "checkpoint.keep=0: must be",
    "checkpoint.keep_best=-1": "checkpoint.keep_best=-1: must be",
    "checkpoint.keep_every=0": "checkpoint.keep_every=0: must be",
    "checkpoint.mode=best": "checkpoint.mode=best: must be one of auto, max, min",
    "checkpoint.monitor=accuracy": "checkpoint.monitor=accuracy: must be one of val/loss, val/accuracy",
    "checkpoint.max_failures=0": "checkpoint.max_failures=0: must be",
    "checkpoint=_retention": "names no _target_",
    "checkpoint=hourly": "'checkpoint/hourly' Available options in 'checkpoint'",
    "model=resnet19": "'model/resnet19' Available options in 'model'",
    "model.depth=19": "model.depth=19: must be one of 18, 34, 50, 101",
    "checkpoint.evry=5": "checkpoint.evry: there is no such setting; did you mean checkpoint.every?",
    "lr=0.1": "lr: there is no such setting; did you mean optimizer.lr?",
    "data.rooot=x": "data.rooot: there is no such setting; choose one of data.batch_size, data.augment, data.",
    "trainer.epochs.x=1": "trainer.epochs.x: there is no such setting",
    "model._target_=src.models": "model._target_=src.models: cannot be called; name a class or a function",
    "+checkpoint.minutes=5": "checkpoint.minutes=5: src.checkpoint.policy.EverySteps has no such setting; leave it out",
    "trainer.device=tpu": "trainer.device=tpu: must be auto, cpu, cuda, or cuda:N",
    "trainer.device=cuda:99": "trainer.device=cuda:99: is not there",
    "trainer.precision=fp8": "trainer.precision=fp8: must be one of fp32, bf16, fp16",
    "trainer.epochs=0": "trainer.epochs=0: must be",
    "trainer.seed=-1": "trainer.seed=-1: must be",
    "trainer.workers=-1": "trainer.workers=-1: must be",
    "trainer.accumulate=0": "trainer.accumulate=0: must be",
    "trainer.accumulate=1000": "trainer.accumulate=1000: leaves a batch of one sample",
    "trainer.clip_grad_norm=0": "trainer.clip_grad_norm=0: must be",
    "trainer.log_every=0": "trainer.log_every=0: must be",
    "trainer.compile=perhaps": "trainer.compile=perhaps: must be true or false",
    "data.batch_size=1439": "data.batch_size=1439: is more than the 1438 samples",
    "data.batch_size=1437": "data.batch_size=1437: leaves a batch of one sample",
    "data.batch_size=0": "data.batch_size=0: must be",
    "data.image_size=4": "data.image_size=4: must be",
    "data=image_folder": "data.root: is required; say data.root=VALUE",
    "optimizer.lr=-1": "lr=-1",
    "optimizer.lr=fast": "optimizer.lr=fast: must be a number",
    "optimizer.lr=true": "optimizer.lr=true: must be a number",
    "optimizer.lr=nan": "optimizer.lr=nan: must be a finite number",
    "optimizer.weight_decay=inf": "optimizer.weight_decay=inf: must be a finite number",
    "optimizer.nesterov=perhaps": "optimizer.nesterov=perhaps: must be true or false",
    "model.small_stem=perhaps": "model.small_stem=perhaps: must be true or false",
    "data.augment=perhaps": "data.augment=perhaps: must be true or false",
    "trainer.seed=100000000000000000000": "trainer.seed=100000000000000000000: must be below 2**63",
    "model=null": "override must be a string",
    "optimizer=null": "override must be a string",
    "resume=false": "resume=false: must be text",
    "resume=null": "resume=null: must be text",
    "init_from=5": "init_from=5: must be text",
    "checkpoint.retry_after=-1": "checkpoint.retry_after=-1: must be",
    "scheduler.peak=1.5": "scheduler.peak=1.5: must be a number > 0 and < 1",
    "storage.min_free_gb=-1": "storage.min_free_gb=-1: must be",
    "storage.min_free_gb=1e9": "storage.min_free_gb=1e+09",
    "resume=nowhere": "resume=nowhere: does not exist; name a checkpoint",
    "run=../up": "error: run=../up: must be a plain name",
    "hydra.run.dir=/dev/null/run": "/dev/null/run: Not a directory",
    "hydra.run.dir=/proc/run": "/proc/run: No such file or directory",
}


@pytest.mark.parametrize(("override", "message"), WRONG.items(), ids=WRONG.keys())
def test_a_wrong_value_is_a_one_line_error_before_the_first_step(train: Train, override: str, message: str) -> None:
    result = train(override)
    assert result.status != 0
    errors = [line for line in result.output.splitlines() if line]
    assert len(errors) == 1, result.output
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert not list(Path("outputs").glob("*/checkpoints/step_*"))


@pytest.mark.parametrize(
    "overrides", [["model.patch_size=0"], ["model.layers=0"], ["optimizer=adam", "optimizer.betas=[0.9]"]]
)
def test_a_value_that_only_the_target_can_judge_is_a_one_line_error(train: Train, overrides: list[str]) -> None:
    result = train(*([] if "optimizer=adam" in overrides else ["model=vit_b_16"]), *overrides)
    assert result.status == 2
    assert len(result.output.splitlines()) == 1
    assert overrides[-1].partition(".")[0] in result.output


def test_a_traceback_is_there_for_those_who_ask(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOLDFAST_TRACEBACKS")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    output = train("checkpoint.every=0").output
    assert "Traceback" in output
    assert "error: checkpoint.every=0" in output


def test_a_bug_keeps_its_traceback(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.trainer.Trainer.evaluate", lambda *_: 1 / 0)
    result = train(*TINY)
    assert result.status == 1
    assert "ZeroDivisionError" in result.output
    assert "Traceback" in result.output


def test_the_learning_rate_that_is_shown_is_the_one_of_the_step(train: Train) -> None:
    train(*TINY, "trainer.epochs=1", "scheduler=step", "scheduler.drops=12", "scheduler.gamma=0.5")
    events = EventAccumulator("outputs/tiny/tensorboard").Reload()
    rates = [event.value for event in events.Scalars("train/lr")]
    assert rates == pytest.approx([0.01 * 0.5**step for step in range(13)])


def test_tensorboard_has_all_there_is_to_see(train: Train) -> None:
    train(*TINY, "trainer.epochs=2", "trainer.log_every=5")
    events = EventAccumulator("outputs/tiny/tensorboard").Reload()
    assert {
        "train/loss",
        "train/accuracy",
        "train/lr",
        "train/grad_norm",
        "train/samples_per_second",
        "epoch/loss",
        "epoch/accuracy",
        "val/loss",
        "val/accuracy",
        "checkpoint/stall_ms",
        "checkpoint/seconds_to_durable",
        "checkpoint/megabytes",
        "checkpoint/steps_at_risk",
        "goodput/share",
    } == set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10, 15, 20, 25]
    assert {round(16 * event.value, 4) % 1 for event in events.Scalars("train/accuracy")} == {0.0}, "of one batch each"
    assert [event.step for event in events.Scalars("val/loss")] == [13, 26]
    picture = events.Images("val/predictions")[-1]
    assert (picture.step, picture.width) == (26, 4 * 100 + 4)
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_the_summary_says_what_matters(train: Train) -> None:
    output = train(*TINY, "trainer.epochs=2").output
    for text in (
        "val/accuracy",
        "26 in 2 epochs",
        "2 saves",
        "outputs/tiny/checkpoints",
        "python -m src.checkpoint ls",
    ):
        assert text in output


def test_the_log_is_in_the_run_directory(train: Train) -> None:
    train(*TINY, "trainer.epochs=1")
    train(*TINY, "trainer.epochs=2")
    text = Path("outputs/tiny/train.log").read_text()
    assert "epoch 1/1" in text
    assert "epoch 2/2" in text


def test_why_a_run_has_ended_is_in_its_log_too(train: Train) -> None:
    result = train(*TINY, "optimizer.lr=1e30", "trainer.epochs=1")
    assert result.status == 5
    last = Path("outputs/tiny/train.log").read_text().splitlines()[-1]
    assert "error: the loss is" in last


def test_the_readme_names_every_option_of_every_group() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for path in (REPOSITORY / "conf/hydra").glob("*/*.yaml"):
        assert f"`hydra/{path.parent.name}={path.stem}`" in readme
    for group in (path for path in (REPOSITORY / "conf").iterdir() if path.is_dir() and path.name != "hydra"):
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{group.name}` |"))
        for option in options(group.name):
            assert option in row


def test_the_readme_names_every_setting_that_all_runs_share() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for group in ("trainer/default", "checkpoint/_retention", "storage/s3"):
        for line in (REPOSITORY / f"conf/{group}.yaml").read_text().splitlines():
            key = line.partition(":")[0]
            if line[0] not in "_#":
                assert key in readme, f"{group}: {key}"
