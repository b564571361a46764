"""Invariant 3, no torn state: a snapshot is exactly the state at the moment it was taken."""

import io
import mmap
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.checkpoint import snapshot
from src.checkpoint.snapshot import HostMemory, Snapshotter

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["at once", "overlapped"])
def snapshotter(request: pytest.FixtureRequest) -> Iterator[Snapshotter]:
    """Both orders of work: all of the copy at once, as on a CPU; and the rest of it later, as on a GPU."""
    snapshotter = Snapshotter(CPU, overlap=request.param)
    yield snapshotter
    snapshotter.close()


def copy_of(snapshotter: Snapshotter, live: Any) -> Any:
    return snapshotter.take(live, []).complete()


def saved_bytes(value: Any) -> int:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.tell()


def test_invariant_3_training_on_does_not_change_it(snapshotter: Snapshotter) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()

    step()
    live = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    moments = [value for values in optimizer.state.values() for value in values.values()]
    taken = snapshotter.take(live, [*model.parameters(), *moments])
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moment = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    # The next step, as the loop takes it: buffers change in the forward, the rest after wait().
    loss = model(torch.randn(8, 4)).square().sum()
    loss.backward()
    copies: list[Any] = []
    writer = threading.Thread(target=lambda: copies.append(taken.complete()))
    writer.start()
    taken.wait()
    optimizer.step()
    writer.join()
    copy = copies[0]
    assert all(torch.equal(copy["model"][name], tensor) for name, tensor in frozen.items())
    assert not torch.equal(copy["model"]["0.weight"], model.state_dict()["0.weight"])
    assert not torch.equal(copy["model"]["1.running_mean"], model.state_dict()["1.running_mean"])
    assert torch.equal(copy["optimizer"]["state"][0]["exp_avg"], moment)


def test_numbers_and_containers_are_taken_as_they_are_now(snapshotter: Snapshotter) -> None:
    live: dict[str, Any] = {"step": 1, "groups": [{"lr": 0.1, "params": [0, 1]}], "pair": (1, torch.ones(1))}
    copy = copy_of(snapshotter, live)
    live["step"] = 2
    live["groups"][0]["lr"] = 0.2
    live["groups"][0]["params"].append(2)
    assert copy == {"step": 1, "groups": [{"lr": 0.1, "params": [0, 1]}], "pair": (1, torch.ones(1))}


def test_tied_weights_are_saved_once_and_stay_tied(snapshotter: Snapshotter) -> None:
    weight = torch.randn(1000, 100)
    copy = copy_of(snapshotter, {"embedding": weight, "head": weight, "view": weight[10:20].t()})
    assert saved_bytes(copy) < 1.1 * saved_bytes(weight)
    assert copy["embedding"].data_ptr() == copy["head"].data_ptr() != weight.data_ptr()
    assert torch.equal(copy["view"], weight[10:20].t())
    assert copy["view"].untyped_storage().data_ptr() == copy["head"].untyped_storage().data_ptr()


def test_memory_layout_and_dtype_are_kept(snapshotter: Snapshotter) -> None:
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    copy = copy_of(snapshotter, [image, torch.tensor(3, dtype=torch.bfloat16), torch.zeros(0, 5)])
    assert copy[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(copy[0], image)
    assert copy[1].dtype is torch.bfloat16
    assert copy[1].shape == ()
    assert copy[2].shape == (0, 5)


def test_the_versions_in_a_modules_state_dict_are_kept(snapshotter: Snapshotter) -> None:
    live = nn.BatchNorm1d(3).state_dict()
    copy = copy_of(snapshotter, live)
    assert isinstance(copy, OrderedDict)
    assert copy._metadata == live._metadata  # type: ignore[attr-defined]


def test_what_may_change_in_the_forward_is_copied_before_take_returns() -> None:
    snapshotter = Snapshotter(CPU, overlap=True)
    weight, buffer = torch.ones(3), torch.ones(3)
    taken = snapshotter.take({"weight": weight, "buffer": buffer}, updated=[weight])
    buffer.fill_(2)
    weight.fill_(3)  # too early: nobody waited, so it is this that is copied
    copy = taken.complete()
    assert copy["buffer"].tolist() == [1, 1, 1]
    assert copy["weight"].tolist() == [3, 3, 3]


def test_the_loop_waits_for_the_copy_of_what_the_optimizer_changes_and_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    snapshotter = Snapshotter(CPU, overlap=True)
    weight = torch.ones(3)
    taken = snapshotter.take({"weight": weight}, updated=[weight])
    waiting, order = threading.Event(), []

    def loop() -> None:
        waiting.set()
        taken.wait()
        order.append("optimizer step")
        weight.fill_(2)

    thread = threading.Thread(target=loop)
    thread.start()
    assert waiting.wait(10)
    original = snapshot._copy

    def copy_and_note(copies: Any) -> None:
        original(copies)
        order.append("copied")

    monkeypatch.setattr(snapshot, "_copy", copy_and_note)
    copy = taken.complete()
    thread.join(10)
    assert order == ["copied", "optimizer step"]
    assert copy["weight"].tolist() == [1, 1, 1]


def test_a_copy_that_fails_does_not_hold_up_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshotter = Snapshotter(CPU, overlap=True)
    weight = torch.ones(3)
    taken = snapshotter.take({"weight": weight}, updated=[weight])

    def fail(copies: Any) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(snapshot, "_copy", fail)
    with pytest.raises(MemoryError):
        taken.complete()
    taken.wait()


def many_saves_under_parameters_that_change_at_once(snapshotter: Snapshotter, device: torch.device) -> None:
    tensors = [torch.zeros(size, device=device) for size in (1, 1000, 300_000)]
    buffer = torch.zeros(100, device=device)
    for step in range(1, 101):
        for tensor in (*tensors, buffer):
            tensor.fill_(step)
        taken = snapshotter.take({"step": step, "tensors": tensors, "buffer": buffer}, tensors)
        buffer.fill_(-1)
        results: list[Any] = []
        writer = threading.Thread(target=lambda taken=taken, results=results: results.append(taken.complete()))
        writer.start()
        taken.wait()
        for tensor in tensors:
            tensor.fill_(-1)
        writer.join()
        (copy,) = results
        assert copy["step"] == step
        assert all(bool((tensor == step).all()) for tensor in (*copy["tensors"], copy["buffer"]))


def test_invariant_3_many_saves_under_parameters_that_change_at_once(snapshotter: Snapshotter) -> None:
    """As fast as it goes, with no step between: each snapshot is of one moment."""
    many_saves_under_parameters_that_change_at_once(snapshotter, CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_invariant_3_many_saves_on_a_gpu_that_goes_on_at_once() -> None:
    device = torch.device("cuda:0")
    snapshotter = Snapshotter(device)
    many_saves_under_parameters_that_change_at_once(snapshotter, device)
    snapshotter.close()


def test_invariant_7_memory_is_allocated_once(monkeypatch: pytest.MonkeyPatch, snapshotter: Snapshotter) -> None:
    blocks = []
    original = mmap.mmap

    def count(descriptor: int, size: int, **options: Any) -> mmap.mmap:
        blocks.append(size)
        return original(descriptor, size, **options)

    monkeypatch.setattr(mmap, "mmap", count)
    live = {"weight": torch.zeros(1000, 100), "step": 0}
    snapshotter.prepare(live)
    addresses = set()
    for step in range(10):
        live["step"] = step
        addresses.add(copy_of(snapshotter, live)["weight"].data_ptr())
    assert len(addresses) == 1
    assert blocks == [400_000]


def changing_states() -> Iterator[Any]:
    """State that appears, grows, shrinks, changes type, and goes away."""
    weight = torch.randn(100)
    yield {"weight": weight}
    yield {"weight": weight, "moments": [torch.randn(100), torch.tensor(1.0)]}
    yield {"weight": torch.randn(300), "moments": [torch.randn(300), torch.tensor(2.0)]}
    yield {"weight": torch.randn(50).bfloat16(), "moments": []}
    yield {"step": 5}
    yield {"weight": torch.randn(0, 3)}
    yield {}


def test_state_may_appear_change_shape_and_disappear_between_saves(snapshotter: Snapshotter) -> None:
    for live in changing_states():
        expected = [tensor.clone() for tensor in tensors_in(live)]
        copy = copy_of(snapshotter, live)
        assert all(torch.equal(one, other) for one, other in zip(expected, tensors_in(copy), strict=True))


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for item in items for tensor in tensors_in(item)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16, torch.float64, torch.complex64])
def test_every_byte_is_copied_whatever_its_type_and_size(snapshotter: Snapshotter, dtype: torch.dtype) -> None:
    live = [torch.randint(256, (size,)).to(dtype) for size in (0, 1, 63, 64, 65, 4097, 100_003)]
    live += [live[-1][5:10], live[-1][::2], torch.randn(4, 6).to(dtype).t(), torch.ones(1).to(dtype).expand(3, 2)]
    for one, other in zip(live, copy_of(snapshotter, live), strict=True):
        assert torch.equal(one, other)
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())


def test_memory_that_is_not_there_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="bytes of host memory for a snapshot"):
        HostMemory().reserve(2**60)
