"""Who takes part."""

from benchmarks.ours import Holdfast
from benchmarks.peers import (
    BufferAndThread,
    DcpAsync,
    DcpAsyncCached,
    DcpAsyncProcess,
    Lightning,
    Memcpy,
    TorchCheckpointing,
    TorchSave,
    TorchSaveDurably,
    TorchSnapshot,
)
from benchmarks.savers import Saver

FLOOR = Memcpy
OURS = Holdfast
SAVERS: list[type[Saver]] = [
    Holdfast,
    TorchCheckpointing,
    DcpAsyncCached,
    DcpAsyncProcess,
    DcpAsync,
    Lightning,
    TorchSnapshot,
    BufferAndThread,
    TorchSave,
    TorchSaveDurably,
]
"""All that save, in the order of the tables."""

IN_BACKGROUND = [saver for saver in SAVERS if saver.in_background]
"""Those that let training go on while they write."""
