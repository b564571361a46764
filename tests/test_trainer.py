"""The hand-written loop: what a step computes, and what it must not do."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from src import schedules
from src.checkpoint.catalog import Catalog, verify
from src.checkpoint.checkpointer import Checkpointer
from src.checkpoint.policy import EverySteps
from src.data.datasets import Data, synthetic
from src.models import small_cnn
from src.preemption import Stop
from src.state import TrainState
from src.tracker import Tracker
from src.trainer import Trainer
from tests.conftest import TINY, Result


def linear(data: Data) -> nn.Module:
    """A model without BatchNorm and dropout: a batch is the sum of its micro-batches."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(data.channels * data.image_size**2, len(data.classes)))


def fit(
    directory: Path, data: Data, model: nn.Module, *, lr: float = 0.1, stop: Stop | None = None, **settings: Any
) -> TrainState:
    trainer = Trainer(device="cpu", **settings)
    trainer.set_up()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = schedules.constant(optimizer, trainer.total_steps(data))
    state = trainer.new_state(trainer.place(model), optimizer, scheduler)
    checkpointer = Checkpointer(EverySteps(every=10**9, keep_best=0), Catalog(directory), {}, {}, lambda: None)
    with Tracker(directory, {}) as tracker:
        checkpointer.restore(state, "auto", None)
        trainer.fit(state, data, checkpointer, tracker, stop or Stop())
    return state


def weights(state: TrainState) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in state.model.parameters()]


def test_a_step_is_plain_gradient_descent_on_the_mean_loss(tmp_path: Path) -> None:
    data = synthetic(batch_size=20, train_size=20, val_size=4, image_size=4)
    expected = linear(data)
    images = torch.stack([data.train[index][0] for index in range(20)])
    labels = torch.tensor([data.train[index][1] for index in range(20)])
    loss = cross_entropy(expected(images), labels)
    loss.backward()
    state = fit(tmp_path, data, linear(data), epochs=1)
    for parameter, ours in zip(expected.parameters(), weights(state), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter - 0.1 * parameter.grad, ours, atol=1e-6)
    assert state.loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_loss_that_is_no_number_stops_training_or_is_reported_and_the_way_back_stays_open(
    train: Callable[..., Result],
) -> None:
    command = (*TINY, "scheduler=none", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_best=0")
    assert train(*command, "trainer.epochs=1").status == 0
    weights = "outputs/tiny/checkpoints/step_00000013"
    diverging = (*command, f"init_from={weights}", "optimizer.lr=1e30", "run=wild", "trainer.epochs=2")
    result = train(*diverging)
    assert result.status == 5, result.output
    assert re.search(
        r"^error: the loss is (nan|inf) at step \d+: .* trainer\.on_nan=warn$", result.output, re.MULTILINE
    )
    again = train(*diverging, "trainer.on_nan=warn")
    assert again.status == 0
    assert again.output.count("the loss is ") == 1
    manifests = {path.name: verify(path) for path in Path("outputs/wild/checkpoints").iterdir()}
    assert not manifests["step_00000026"].finite


def test_a_loss_that_is_no_number_is_noticed_at_the_end_of_an_epoch_at_the_latest(
    train: Callable[..., Result],
) -> None:
    result = train(*TINY, "scheduler=none", "optimizer.lr=1e30", "trainer.epochs=1", "trainer.log_every=1000")
    assert result.status == 5, result.output
    assert "error: the loss is nan at step 13" in result.output


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulation_changes_memory_not_the_step(tmp_path: Path, accumulate: int) -> None:
    """Also where the last batch of the epoch, or the last micro-batch of a batch, is smaller."""
    data = synthetic(batch_size=16, train_size=40, val_size=4, image_size=4)
    whole = fit(tmp_path / "whole", data, linear(data), epochs=2)
    pieces = fit(tmp_path / "pieces", data, linear(data), epochs=2, accumulate=accumulate)
    assert pieces.global_step == whole.global_step == 6
    for one, other in zip(weights(whole), weights(pieces), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_gradients_are_clipped_to_their_norm(tmp_path: Path) -> None:
    data = synthetic(batch_size=8, train_size=8, val_size=4, image_size=4)
    before = [parameter.detach().clone() for parameter in linear(data).parameters()]
    state = fit(tmp_path, data, linear(data), epochs=1, lr=1.0, clip_grad_norm=0.01)
    moved = torch.cat([(one - other).flatten() for one, other in zip(before, weights(state), strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_fp16_scales_the_loss_and_the_gradients_back(tmp_path: Path) -> None:
    data = synthetic(batch_size=8, train_size=64, val_size=4, image_size=4)
    full = fit(tmp_path / "full", data, linear(data), epochs=5)
    half = fit(tmp_path / "half", data, linear(data), epochs=5, precision="fp16")
    assert half.scaler.get_scale() > 1
    # The scaler skips the first few steps, until it has found a scale that does not overflow.
    assert half.metrics["val/loss"] == pytest.approx(full.metrics["val/loss"], rel=0.2)


def test_evaluation_changes_nothing() -> None:
    data = synthetic(batch_size=8, train_size=16, val_size=12, image_size=8)
    model = small_cnn(len(data.classes), data.channels, data.image_size, dropout=0.5)
    trainer = Trainer(epochs=1, device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    first = trainer.evaluate(model, trainer._loaders(data)[1])
    assert first == trainer.evaluate(model, trainer._loaders(data)[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2, "clip_grad_norm": 1.0}])
def test_the_hot_path_never_waits_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Whatever brings a tensor's value to the host is counted: three times as many steps, as many fetches."""
    fetches = 0

    def counted(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def count(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            nonlocal fetches
            fetches += 1
            return original(tensor, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, count)

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        counted(name)

    def count_for(steps: int) -> int:
        nonlocal fetches
        data = synthetic(batch_size=4, train_size=4 * steps, val_size=4, image_size=4)
        model = linear(data)
        fetches = 0
        fit(tmp_path / f"{steps}", data, model, epochs=1, log_every=10**9, **settings)
        return fetches

    few, many = count_for(5), count_for(15)
    assert few == many
    assert few > 0, "the evaluation at the end fetches its result: the count does count"
