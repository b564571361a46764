"""A run's identity: its name, its lock, and when its config has drifted."""

import fcntl
import os
from pathlib import Path

import pytest

from src import run
from src.errors import ConfigError, HoldfastError
from src.run import config_drift, name_of, run_name


def test_a_run_without_overrides_has_a_name() -> None:
    assert run_name(None, []) == "default"


def test_the_name_is_made_of_what_changes_the_result() -> None:
    assert run_name(None, ["optimizer.lr=0.1", "model=resnet50"]) == "model-resnet50__optimizer.lr-0.1"


def test_what_does_not_change_the_result_does_not_change_the_name() -> None:
    neutral = ["checkpoint.every=7", "checkpoint=minutes", "storage.min_free_gb=0", "trainer.epochs=9"]
    neutral += ["trainer.workers=4", "trainer.device=cpu", "resume=required", "data.download=false"]
    assert run_name(None, [*neutral, "model=resnet50"]) == run_name(None, ["model=resnet50"])


def test_the_same_settings_have_the_same_name_in_any_order_and_writing() -> None:
    one = run_name(None, ["optimizer.lr=0.10", "+data.extra=1", "model=resnet50"])
    assert one == run_name(None, ["model=resnet50", "data.extra=1", "optimizer.lr=1e-1"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["init_from=a/b"], ["init_from=a-b"]),
        (["data.classes=[a,b]"], ["data.classes=[a-b]"]),
        (["a=1__b-2"], ["a=1", "b=2"]),
        (["optimizer.lr=-1"], ["optimizer.lr=1"]),
        ([f"a={'x' * 300}"], [f"a={'x' * 301}"]),
        (["~optimizer.momentum"], ["optimizer.momentum=null"]),
    ],
)
def test_different_settings_have_different_names_that_are_plain_and_short(one: list[str], other: list[str]) -> None:
    names = [run_name(None, one), run_name(None, other)]
    assert names[0] != names[1]
    for name in names:
        assert len(name) < 150
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        assert not name.startswith(".")


def test_a_name_can_be_given() -> None:
    assert run_name("mine", ["model=resnet50"]) == "mine"


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a b", "/root"])
def test_a_given_name_is_a_plain_folder_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^run="):
        run_name(name, [])


def test_data_elsewhere_and_other_first_weights_are_another_run_but_no_drift() -> None:
    assert run_name(None, ["data.root=/a"]) != run_name(None, ["data.root=/b"])
    assert (
        config_drift({"data": {"root": "/a"}, "init_from": "x.pt"}, {"data": {"root": "/b"}, "init_from": None}) == []
    )


def test_drift_lists_the_settings_that_change_the_result() -> None:
    saved = {"optimizer": {"lr": 0.1, "momentum": 0.9}, "trainer": {"epochs": 2, "seed": 0}, "checkpoint": {"keep": 3}}
    now = {"optimizer": {"lr": 0.2, "nesterov": True}, "trainer": {"epochs": 9, "seed": 0}, "checkpoint": {"keep": 1}}
    assert config_drift(saved, now) == [
        "optimizer.lr: 0.1 -> 0.2",
        "optimizer.momentum: 0.9 -> (absent)",
        "optimizer.nesterov: (absent) -> True",
    ]
    assert config_drift(saved, saved) == []


def test_invariant_10_the_lock_is_held_once_and_names_its_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_LOCK_PATIENCE", 0.0)
    with (tmp_path / ".lock").open("a+") as first, (tmp_path / ".lock").open("a+") as second:
        run._acquire(first, tmp_path)
        first.write(f"process {os.getpid()} on here")
        first.flush()
        with pytest.raises(HoldfastError, match=rf"being written by process {os.getpid()} on here.*run=NAME"):
            run._acquire(second, tmp_path)
        fcntl.flock(first, fcntl.LOCK_UN)
        run._acquire(second, tmp_path)


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        ("/home/me/project/outputs/default", "default"),
        ("/home/me/project/outputs/sweeps/lr/a", "sweeps/lr/a"),
        ("/home/me/project/elsewhere/run", "elsewhere/run"),
        ("/scratch/run", "scratch/run"),
        ("/home/me/project", "home/me/project"),
        ("/", "root"),
    ],
)
def test_a_run_is_called_the_same_on_every_machine(directory: str, name: str) -> None:
    assert name_of(Path(directory), Path("/home/me/project")) == name
