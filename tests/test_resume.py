"""What the same command does when it is run again, and what `resume` and `init_from` change about it."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from src.checkpoint.catalog import verify
from tests.conftest import TINY, Result, resummed

Train = Callable[..., Result]
RUN = Path("outputs/tiny")


def steps(run: Path = RUN) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def state(step: int, run: Path = RUN) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(run / f"checkpoints/step_{step:08d}/state.pt", weights_only=True)
    return loaded


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The leaves of two states that are not bit for bit the same."""
    if type(one) is not type(other):
        return [where]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return [] if same and one.detach().numpy().tobytes() == other.detach().numpy().tobytes() else [where]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [where]
        return [found for key in one for found in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [where]
        return [
            found
            for index, (a, b) in enumerate(zip(one, other, strict=True))
            for found in differences(a, b, f"{where}/{index}")
        ]
    return [] if one == other else [where]


def test_a_finished_run_returns_its_metric_at_once(train: Train) -> None:
    first = train(*TINY, "trainer.epochs=1")
    assert first.status == 0
    before = {path: path.stat().st_mtime_ns for path in (RUN / "checkpoints").rglob("*")}
    again = train(*TINY, "trainer.epochs=1")
    assert "already done: val/accuracy" in again.output
    assert again.metric == first.metric
    assert {path: path.stat().st_mtime_ns for path in (RUN / "checkpoints").rglob("*")} == before


def test_with_more_epochs_a_finished_run_goes_on(train: Train) -> None:
    train(*TINY, "trainer.epochs=1")
    again = train(*TINY, "trainer.epochs=2")
    assert "resumed from" in again.output
    assert "step 13, epoch 1" in again.output
    assert state(26)["epoch"] == 2


@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.clip_grad_norm=1.0", "trainer.accumulate=3", "checkpoint=minutes"],
        ["trainer.precision=fp16", "optimizer=adam"],
        ["trainer.precision=bf16", "optimizer=adamw", "trainer.channels_last=false", "checkpoint=epochs"],
    ],
    ids=" ".join,
)
def test_invariant_4_a_run_cut_into_pieces_ends_like_one_in_one_piece(train: Train, settings: list[str]) -> None:
    """With a schedule that does not depend on the length, more epochs are the same run."""
    options = (*TINY, "scheduler=none", *settings)
    assert train(*options, "run=whole", "trainer.epochs=3").status == 0
    for epochs in (1, 2, 3):
        train(*options, "run=pieces", f"trainer.epochs={epochs}")
    whole = state(39, Path("outputs/whole"))
    assert differences(whole, state(39, Path("outputs/pieces"))) == []
    assert bool(whole["scaler_state_dict"]) == ("trainer.precision=fp16" in settings)


@pytest.mark.parametrize("step", [5, 13, 20])
def test_invariant_4_gone_on_from_any_checkpoint_it_ends_with_the_same_bits(train: Train, step: int) -> None:
    options = (
        *TINY,
        "optimizer=adamw",
        "scheduler=cosine",
        "trainer.epochs=2",
        "checkpoint.every=5",
        "checkpoint.keep=9",
    )
    train(*options)
    expected = state(26)
    train(*options, f"resume={RUN}/checkpoints/step_{step:08d}")
    assert differences(expected, state(26)) == []


def test_the_last_state_is_always_saved_and_the_final_metrics_with_it(train: Train) -> None:
    train(*TINY, "trainer.epochs=1", "checkpoint.every=1000", "checkpoint.keep_best=0")
    assert steps() == ["step_00000013"]
    manifest = json.loads((RUN / "checkpoints/step_00000013/manifest.json").read_text())
    assert set(manifest["metrics"]) == {"val/loss", "val/accuracy"}
    assert manifest["config"]["optimizer"]["lr"] == 0.01


def test_a_checkpoint_within_an_epoch_claims_no_metrics(train: Train) -> None:
    train(*TINY, "trainer.epochs=2", "checkpoint.every=5", "checkpoint.keep=9")
    manifest = json.loads((RUN / "checkpoints/step_00000020/manifest.json").read_text())
    assert manifest["metrics"] == {}
    assert manifest["best"]["global_step"] == 13


def test_policies_decide_in_the_real_loop(train: Train) -> None:
    train(*TINY, "trainer.epochs=2", "checkpoint.every=4", "checkpoint.keep=2", "checkpoint.keep_best=0")
    assert steps() == ["step_00000024", "step_00000026"]
    train(*TINY, "run=epochs", "trainer.epochs=3", "checkpoint=epochs", "checkpoint.every=2", "checkpoint.keep_best=0")
    assert steps(Path("outputs/epochs")) == ["step_00000026", "step_00000039"]
    train(*TINY, "run=minutes", "trainer.epochs=1", "checkpoint=minutes", "checkpoint.every=1e-9", "checkpoint.keep=99")
    assert len(steps(Path("outputs/minutes"))) == 13


def test_required_fails_where_there_is_nothing_to_resume(train: Train) -> None:
    result = train(*TINY, "resume=required")
    assert result.status == 3
    assert "resume=required" in result.output
    train(*TINY, "trainer.epochs=1")
    assert train(*TINY, "trainer.epochs=1", "resume=required").status == 0


def test_never_starts_over_and_keeps_what_was_there(train: Train) -> None:
    train(*TINY, "trainer.epochs=1", "checkpoint.keep=1", "checkpoint.keep_best=0")
    again = train(*TINY, "trainer.epochs=1", "checkpoint.keep=1", "checkpoint.keep_best=0", "resume=never")
    assert "is kept as step_00000013.old" in again.output
    assert steps() == ["step_00000013", "step_00000013.old"]


def test_never_also_ends_the_mourning_over_what_was_damaged(train: Train) -> None:
    train(*TINY, "trainer.epochs=1")
    (RUN / "checkpoints/step_00000013/state.pt").unlink()
    assert train(*TINY, "trainer.epochs=1").status == 3
    assert train(*TINY, "trainer.epochs=1", "resume=never").status == 0
    assert "already done" in train(*TINY, "trainer.epochs=1").output


def test_a_path_goes_back_to_that_step_and_retires_what_lies_above(train: Train) -> None:
    train(*TINY, "trainer.epochs=2", "checkpoint.every=5", "checkpoint.keep=9")
    before = state(26)
    path = RUN / "checkpoints/step_00000010"
    result = train(*TINY, "trainer.epochs=2", "checkpoint.every=5", "checkpoint.keep=9", f"resume={path}")
    assert "step 10, epoch 0" in result.output
    assert [name for name in steps() if name.endswith("retired")] == [
        f"step_000000{step}.retired" for step in (13, 15, 20, 25, 26)
    ]
    assert differences(before, state(26)) == []


def test_the_same_command_with_a_path_does_not_go_back_twice(train: Train) -> None:
    train(*TINY, "trainer.epochs=1", "checkpoint.every=5", "checkpoint.keep=9")
    command = (*TINY, "checkpoint.every=5", "checkpoint.keep=9", f"resume={RUN}/checkpoints/step_00000005")
    train(*command, "trainer.epochs=1")
    again = train(*command, "trainer.epochs=2")
    assert "step 13, epoch 1" in again.output


def test_a_path_may_be_another_run(train: Train) -> None:
    train(*TINY, "trainer.epochs=1")
    result = train(*TINY, "run=fork", "trainer.epochs=2", f"resume={RUN}")
    assert "step 13, epoch 1" in result.output
    assert "step_00000026" in steps(Path("outputs/fork"))
    assert steps() == ["step_00000013"], "the other run is left alone"


def test_a_path_to_a_finished_run_leaves_this_one_with_its_checkpoint(train: Train) -> None:
    train(*TINY, "trainer.epochs=1")
    train(*TINY, "run=fork", "trainer.epochs=1", f"resume={RUN}")
    assert steps(Path("outputs/fork")) == ["step_00000013"]
    assert differences(state(13), state(13, Path("outputs/fork"))) == []


def test_a_path_that_does_not_fit_costs_this_run_nothing(train: Train) -> None:
    train(*TINY, "trainer.epochs=1")
    train(*TINY, "run=other", "trainer.epochs=2", "trainer.seed=3")
    assert "trainer.seed: 3 -> 0" in train(*TINY, "trainer.epochs=1", "resume=outputs/other").output
    assert steps() == ["step_00000013"]


def test_a_path_rescues_a_run_whose_own_checkpoints_are_damaged(train: Train) -> None:
    train(*TINY, "run=good", "trainer.epochs=1")
    train(*TINY, "trainer.epochs=1")
    (RUN / "checkpoints/step_00000013/state.pt").write_bytes(b"")
    result = train(*TINY, "trainer.epochs=2", "resume=outputs/good")
    assert result.status == 0
    assert "step_00000026" in steps()


def test_what_was_retired_forbids_to_start_over_unasked(train: Train) -> None:
    train(*TINY, "trainer.epochs=1")
    checkpoint = RUN / "checkpoints/step_00000013"
    checkpoint.rename(f"{checkpoint}.retired")
    assert "set aside earlier" in train(*TINY, "trainer.epochs=1").output


def test_other_data_under_the_run_is_refused(train: Train) -> None:
    train(*TINY, "trainer.epochs=1")
    (manifest,) = RUN.glob("checkpoints/*/manifest.json")
    changed = manifest.read_text().replace('"train_size": 200,\n      "val', '"train_size": 100,\n      "val')
    manifest.write_text(resummed(changed))
    result = train(*TINY, "trainer.epochs=2")
    assert result.status == 2
    assert "data_set.train_size: 100 -> 200" in result.output


@pytest.mark.parametrize("place", ["outputs/tiny", "outputs/tiny/checkpoints"])
def test_a_path_to_the_run_itself_goes_back_nowhere(train: Train, place: str) -> None:
    train(*TINY, "trainer.epochs=1")
    result = train(*TINY, "trainer.epochs=2", f"resume={place}")
    assert "step 13, epoch 1" in result.output
    assert verify(RUN / "checkpoints/step_00000026").resumed_from is None


def test_nor_is_there_anything_to_go_back_to_in_a_run_that_has_not_begun(train: Train) -> None:
    result = train(*TINY, "resume=outputs/tiny")
    assert result.status == 2
    assert "error: resume=outputs/tiny: has no checkpoint yet" in result.output


def test_a_path_to_nothing_or_to_damage_is_an_error(train: Train, tmp_path: Path) -> None:
    assert "is no checkpoint" in train(*TINY, f"resume={tmp_path}").output
    train(*TINY, "trainer.epochs=1")
    (RUN / "checkpoints/step_00000013/state.pt").write_bytes(b"")
    result = train(*TINY, "run=other", f"resume={RUN}/checkpoints/step_00000013")
    assert result.status == 3
    assert "state.pt has 0 bytes" in result.output


def test_settings_that_change_the_result_are_refused_with_the_way_out(train: Train) -> None:
    train(*TINY, "trainer.epochs=1")
    result = train(*TINY, "trainer.epochs=2", "optimizer.lr=0.5", "data.batch_size=32")
    assert result.status == 2
    assert "data.batch_size: 16 -> 32; optimizer.lr: 0.01 -> 0.5" in result.output
    assert "run=NAME" in result.output
    assert steps() == ["step_00000013"]


def test_settings_that_do_not_change_the_result_may_change(train: Train) -> None:
    train(*TINY, "trainer.epochs=1")
    result = train(*TINY, "trainer.epochs=2", "checkpoint=epochs", "trainer.log_every=3", "trainer.device=cpu")
    assert result.status == 0
    assert "step 13, epoch 1" in result.output


def test_another_machine_is_mentioned(train: Train) -> None:
    train(*TINY, "trainer.epochs=1")
    for manifest in RUN.glob("checkpoints/*/manifest.json"):
        changed = manifest.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.0"')
        manifest.write_text(resummed(changed))
    result = train(*TINY, "trainer.epochs=2")
    assert result.status == 0
    assert f"torch 2.0 -> {torch.__version__}" in result.output


def test_init_from_takes_the_weights_and_starts_afresh(train: Train) -> None:
    train(*TINY, "trainer.epochs=1")
    result = train(*TINY, "run=child", "trainer.epochs=1", "optimizer.lr=1e-9", "scheduler=none", f"init_from={RUN}")
    assert "loaded 16 of the model's 16 tensors" in result.output
    parent, child = state(13), state(13, Path("outputs/child"))
    for name, weight in parent["model_state_dict"].items():
        if name.endswith("weight"):
            assert torch.allclose(weight, child["model_state_dict"][name], atol=1e-6)
    assert child["epoch"] == 1


def test_init_from_loads_what_fits_a_changed_head_and_lists_the_rest(train: Train, tmp_path: Path) -> None:
    train(*TINY, "trainer.epochs=1")
    weights = state(13)["model_state_dict"]
    torch.save({"module." + name: weight for name, weight in weights.items()} | {"extra": torch.ones(1)}, "ddp.pt")
    result = train(*TINY, "run=child", "trainer.epochs=1", "data.classes=7", "init_from=ddp.pt")
    assert "loaded 14 of the model's 16 tensors" in result.output
    assert "9.weight, shape (7, 16) here, has shape (10, 16) in the file" in result.output
    assert "extra in the file has no place in the model" in result.output


def test_init_from_applies_once_then_the_run_resumes_itself(train: Train) -> None:
    train(*TINY, "trainer.epochs=1")
    train(*TINY, "run=child", "trainer.epochs=1", f"init_from={RUN}")
    again = train(*TINY, "run=child", "trainer.epochs=2", f"init_from={RUN}")
    assert "init_from=" not in again.output
    assert "step 13, epoch 1" in again.output


def test_init_from_something_unfit_is_an_error(train: Train) -> None:
    assert "error: init_from=nowhere: does not exist" in train(*TINY, "init_from=nowhere").output
    torch.save({"a": torch.ones(1)}, "other.pt")
    assert "holds no tensor that fits" in train(*TINY, "init_from=other.pt").output
    Path("text.pt").write_text("no weights")
    result = train(*TINY, "init_from=text.pt")
    assert "text.pt cannot be loaded (it is no file that torch.save wrote, or is damaged)" in result.output
    torch.save({"model": argparse.Namespace(a=1)}, "object.pt")
    result = train(*TINY, "init_from=object.pt")
    assert "object.pt cannot be loaded (it holds argparse.Namespace; only tensors and plain values" in result.output
    assert "weights_only" not in result.output
    torch.save({0: torch.ones(1), "b": "text"}, "keys.pt")
    assert "holds no tensor that fits" in train(*TINY, "init_from=keys.pt").output


def test_the_directory_is_the_key(train: Train) -> None:
    directory = ("hydra.run.dir=elsewhere/one", "trainer.epochs=1")
    train(*TINY, *directory)
    assert "already done" in train(*TINY, *directory).output
    shutil.move("elsewhere/one", "elsewhere/two")
    assert "already done" in train(*TINY, "hydra.run.dir=elsewhere/two", "trainer.epochs=1").output
