"""Invariant 3, no torn state: a snapshot is exactly the state at the moment it was taken."""

import io
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from src.checkpoint.snapshot import snapshot


def saved_bytes(value: Any) -> int:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.tell()


def test_invariant_3_training_on_does_not_change_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()

    step()
    live = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    copy = snapshot(live)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moment = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    step()
    assert all(torch.equal(copy["model"][name], tensor) for name, tensor in frozen.items())
    assert not torch.equal(copy["model"]["0.weight"], model.state_dict()["0.weight"])
    assert not torch.equal(copy["model"]["1.running_mean"], model.state_dict()["1.running_mean"])
    assert torch.equal(copy["optimizer"]["state"][0]["exp_avg"], moment)


def test_numbers_and_containers_are_taken_as_they_are_now() -> None:
    live: dict[str, Any] = {"step": 1, "groups": [{"lr": 0.1, "params": [0, 1]}], "pair": (1, torch.ones(1))}
    copy = snapshot(live)
    live["step"] = 2
    live["groups"][0]["lr"] = 0.2
    live["groups"][0]["params"].append(2)
    assert copy == {"step": 1, "groups": [{"lr": 0.1, "params": [0, 1]}], "pair": (1, torch.ones(1))}


def test_tied_weights_are_saved_once_and_stay_tied() -> None:
    weight = torch.randn(1000, 100)
    copy = snapshot({"embedding": weight, "head": weight, "view": weight[10:20].t()})
    assert saved_bytes(copy) < 1.1 * saved_bytes(weight)
    assert copy["embedding"].data_ptr() == copy["head"].data_ptr() != weight.data_ptr()
    assert torch.equal(copy["view"], weight[10:20].t())
    assert copy["view"].untyped_storage().data_ptr() == copy["head"].untyped_storage().data_ptr()


def test_memory_layout_and_dtype_are_kept() -> None:
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    copy = snapshot([image, torch.tensor(3, dtype=torch.bfloat16), torch.zeros(0, 5)])
    assert copy[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(copy[0], image)
    assert copy[1].dtype is torch.bfloat16
    assert copy[1].shape == ()
    assert copy[2].shape == (0, 5)


def test_the_versions_in_a_modules_state_dict_are_kept() -> None:
    live = nn.BatchNorm1d(3).state_dict()
    copy = snapshot(live)
    assert isinstance(copy, OrderedDict)
    assert copy._metadata == live._metadata  # type: ignore[attr-defined]
