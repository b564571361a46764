"""A data set that hangs for as long as a file exists: what a dead network disk does to a training."""

import time
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from src.data.datasets import Data, synthetic


class Hanging(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any], index: int, file: Path) -> None:
        self.dataset, self.index, self.file = dataset, index, file

    def __getitem__(self, index: int) -> Any:
        while index == self.index and self.file.exists():
            self.file.with_suffix(".hangs").touch()
            time.sleep(0.01)
        return self.dataset[index]


def data(hanging_part: str, index: int, file: str, **settings: Any) -> Data:
    made = synthetic(**settings)
    part = Hanging(getattr(made, hanging_part), index, Path(file))
    return Data(**{**vars(made), hanging_part: part})
