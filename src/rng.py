"""Every random number generator that training draws from: seed them, read them, put them back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part, and is unrelated for neighbouring parts."""
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_cpu(seed: int) -> None:
    """Seed the generators of python, numpy and torch on the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def seed_everything(seed: int) -> None:
    """Seed the generators of python, numpy, torch on the CPU and on every GPU."""
    seed_cpu(seed)
    if torch.cuda.is_available():  # else it would keep a note for later, slowly
        torch.cuda.manual_seed_all(seed)


def rng_state() -> dict[str, Any]:
    """The state of every generator, in types that `torch.load(weights_only=True)` accepts.

    Returns:
        `python`: version, the Mersenne twister's key and position (int64 tensor of 625), cached gaussian; `numpy`:
        its key (int64 tensor of 624), position, and cached gaussian; `torch`: uint8 tensor; `cuda`: one per GPU.
    """
    version, key, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict)
    return {
        "python": [version, torch.from_numpy(np.array(key, dtype=np.int64)), gauss],
        "numpy": {
            "key": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            "pos": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned. GPUs that are not there any more are left out."""
    version, key, gauss = state["python"]
    random.setstate((version, tuple(torch.as_tensor(key).tolist()), gauss))
    numpy_state = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy_state["key"].numpy().astype(np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    for index, gpu_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(gpu_state, index)


@contextmanager
def cpu_rng_preserved() -> Iterator[None]:
    """Leave the CPU generators as they were, whatever is drawn or seeded inside."""
    python, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)

    try:
        yield
    finally:
        try:
            restore()
        except BaseException:  # a signal's handler has raised half-way through, which it does once only
            restore()
            raise
