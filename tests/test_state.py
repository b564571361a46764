"""What a checkpoint holds, and where it can be loaded."""

import io
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.lr_scheduler import LambdaLR

from src import schedules
from src.checkpoint.resume import load_file
from src.errors import CheckpointError
from src.rng import cpu_rng_preserved, derive_seed, rng_state, set_rng_state
from src.state import TrainState, strip_prefixes


def new_state(width: int = 4) -> TrainState:
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return TrainState(model, optimizer, schedules.cosine(optimizer, 10), GradScaler("cpu", enabled=False))


def train(state: TrainState, steps: int = 1) -> None:
    for _ in range(steps):
        state.optimizer.zero_grad()
        loss = state.model(torch.randn(5, 3)).square().sum()
        loss.backward()
        state.loss = loss.detach()
        state.optimizer.step()
        state.scheduler.step()
        state.advance(5)


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_it_uses_the_keys_that_everybody_knows() -> None:
    state = new_state().state_dict()
    assert {
        "model_state_dict",
        "optimizer_state_dict",
        "lr_scheduler_state_dict",
        "epoch",
        "global_step",
        "loss",
    } <= set(state)


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adagrad])
def test_an_optimizers_state_keeps_its_own_type(kind: Callable[..., torch.optim.Optimizer]) -> None:
    def state() -> TrainState:
        model = nn.Linear(3, 4).to(torch.bfloat16)
        optimizer = kind(model.parameters())
        return TrainState(model, optimizer, schedules.cosine(optimizer, 10), GradScaler("cpu", enabled=False))

    original, restored = state(), state()
    original.model(torch.randn(5, 3, dtype=torch.bfloat16)).square().sum().backward()
    original.optimizer.step()
    restored.load_state_dict(through_a_file(original.state_dict()))
    moments = (list(each.optimizer.state.values()) for each in (original, restored))
    for one, other in zip(*moments, strict=True):
        for name, value in one.items():
            assert value.dtype == other[name].dtype, name
            assert torch.equal(value, other[name]), name


def test_invariant_4_a_loaded_state_trains_on_like_the_original() -> None:
    original = new_state()
    train(original, 3)
    saved = through_a_file(original.state_dict())
    train(original, 3)
    resumed = new_state()
    resumed.load_state_dict(saved)
    train(resumed, 3)
    assert resumed.global_step == 6
    for (name, one), other in zip(
        original.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert original.scheduler.get_last_lr() == resumed.scheduler.get_last_lr()


def test_invariant_9_all_of_it_loads_without_executing_code() -> None:
    state = new_state()
    train(state)
    through_a_file(state.state_dict())  # weights_only=True


def test_random_numbers_go_on_where_they_were() -> None:
    random.gauss()  # leaves a cached number behind, like numpy's
    np.random.randn()
    saved = through_a_file(rng_state())

    def draw() -> list[float]:
        return [random.gauss(), random.random(), np.random.randn(), float(np.random.rand()), torch.rand(1).item()]

    expected = draw()
    draw()
    set_rng_state(saved)
    assert draw() == expected


def test_what_is_drawn_in_between_can_be_kept_apart() -> None:
    before = torch.get_rng_state()
    with cpu_rng_preserved():
        torch.rand(3)
        random.seed(1)
        np.random.seed(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_derived_seeds_differ() -> None:
    seeds = {derive_seed(seed, epoch, index) for seed in range(10) for epoch in range(10) for index in range(10)}
    assert len(seeds) == 1000
    assert derive_seed(1, 23) != derive_seed(12, 3)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_saved_from_a_wrapper_load(prefix: str) -> None:
    state, other = new_state(), new_state()
    saved = other.state_dict()
    saved["model_state_dict"] = OrderedDict((prefix + key, value) for key, value in saved["model_state_dict"].items())
    state.load_state_dict(saved)
    assert torch.equal(state.model.state_dict()["0.weight"], other.model.state_dict()["0.weight"])


def test_a_submodule_that_is_really_called_module_keeps_its_name() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert list(strip_prefixes(model.state_dict(), model)) == list(model.state_dict())
    wrapped = {"module." + key: value for key, value in model.state_dict().items()}
    assert list(strip_prefixes(wrapped, model)) == list(model.state_dict())


def test_a_state_of_another_architecture_is_refused_with_the_way_out() -> None:
    with pytest.raises(CheckpointError, match=r"does not fit.*size mismatch.*init_from=PATH"):
        new_state(width=8).load_state_dict(new_state(width=4).state_dict())


def test_a_missing_piece_is_refused_not_skipped() -> None:
    for key in new_state().state_dict():
        saved = new_state().state_dict()
        del saved[key]
        with pytest.raises(CheckpointError, match=key):
            new_state().load_state_dict(saved)


def test_a_checkpoint_from_a_gpu_loads_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = new_state()
    with monkeypatch.context() as patch:
        # The only mark that a GPU leaves in the file: each storage says where it lived.
        patch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
        torch.save(state.state_dict(), tmp_path / "state.pt")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "state.pt", weights_only=True)
    saved = load_file(tmp_path / "state.pt")
    assert {tensor.device.type for tensor in saved["model_state_dict"].values()} == {"cpu"}
    new_state().load_state_dict(saved)


def test_the_tutorials_snippet_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = new_state()
    train(trained)
    torch.save(trained.state_dict(), tmp_path / "state.pt")
    fresh = new_state()
    model, optimizer, scheduler = fresh.model, fresh.optimizer, fresh.scheduler

    checkpoint = torch.load(tmp_path / "state.pt", weights_only=True)
    model.load_state_dict(checkpoint["model_state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    start_epoch = checkpoint["epoch"] + 1
    print(f"Resumed from epoch {start_epoch}, loss={checkpoint['loss']:.4f}")

    assert isinstance(scheduler, LambdaLR)
    assert f"Resumed from epoch 1, loss={trained.loss.item():.4f}" in capsys.readouterr().out
    assert torch.equal(model.state_dict()["0.weight"], trained.model.state_dict()["0.weight"])


def test_the_size_of_a_checkpoint_is_foreseen() -> None:
    state = new_state(width=2000)
    foreseen = state.checkpoint_bytes()
    train(state)
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    assert buffer.tell() == pytest.approx(foreseen, rel=0.25)


def test_reading_the_state_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would bring a tensor's value to the host fails here, also the scale of a GradScaler."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", enabled=True)
    state = TrainState(model, optimizer, schedules.constant(optimizer, 10), scaler)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    expected = scaler.state_dict()

    def fail(*arguments: object) -> None:
        raise AssertionError("waits for the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
            patch.setattr(torch.Tensor, name, fail)
        saved = state.state_dict()
        list(state.updated_tensors())
    assert saved["scaler_state_dict"] == expected
    scaler.update(new_scale=3.0)
    state.load_state_dict(saved)
    assert scaler.state_dict() == expected
