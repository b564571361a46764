"""What a person sees of a run: the progress bar, the log, TensorBoard, and the summary at the end."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.transforms.v2 import functional as images
from torchvision.utils import make_grid
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from src.checkpoint.checkpointer import SaveReport

log = logging.getLogger(__name__)


class Tracker:
    """Shows the progress of one process's share of a run.

    Curves do not zigzag after a resume: TensorBoard is told to drop what an earlier process logged
    beyond the step that this one starts from.
    """

    def __init__(self, directory: Path) -> None:
        """
        Args:
            directory: The run directory; events go to its `tensorboard/`.
        """
        self._directory = directory
        self._board: SummaryWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def started(self) -> bool:
        """Whether there was anything to show: a finished run that is run again never starts."""
        return self._board is not None

    def start(self, global_step: int, total_steps: int, epochs: int) -> None:
        """Begin at `global_step` (0, or where the run resumed)."""
        # Events of the step itself were logged before its checkpoint, and belong to it.
        purge_step = global_step + 1 if global_step > 0 else 0
        self._board = SummaryWriter(str(self._directory / "tensorboard"), purge_step=purge_step)
        self._epochs = epochs
        self._start = self._window_start = time.perf_counter()
        self._window_samples = 0
        self._redirect = logging_redirect_tqdm()
        self._redirect.__enter__()
        self._bar = tqdm(
            total=total_steps,
            initial=global_step,
            unit="step",
            dynamic_ncols=True,
            disable=None,  # not when stderr is a file
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix} [{elapsed}<{remaining}]",
        )

    def flush(self) -> None:
        """Hand all events to the operating system."""
        if self._board is not None:
            self._board.flush()

    def step(self, samples: int) -> None:
        """Count a step. Cheap: called every step."""
        self._window_samples += samples
        self._bar.update()

    def log_step(self, global_step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log the scalars of a training step, and the throughput since the last call."""
        now = time.perf_counter()
        rate = self._window_samples / (now - self._window_start)
        self._window_start, self._window_samples = now, 0
        self._scalars(global_step, {**values, "train/samples_per_second": rate})
        self._bar.set_description_str(f"epoch {epoch + 1}/{self._epochs}")
        self._bar.set_postfix_str(
            f"loss {values['train/loss']:.4f} · accuracy {values['train/accuracy']:.1%} · {rate:,.0f} samples/s"
        )

    def log_epoch(self, global_step: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log the averages of an epoch and its evaluation. `epoch` counts completed epochs."""
        self._scalars(global_step, metrics)
        numbers = " · ".join(
            f"{name} {value:.2%}" if name.endswith("accuracy") else f"{name} {value:.4f}"
            for name, value in metrics.items()
        )
        log.info("epoch %d/%d · step %d · %s", epoch, self._epochs, global_step, numbers)

    def log_predictions(
        self,
        global_step: int,
        inputs: Tensor,
        labels: Sequence[int],
        predictions: Sequence[int],
        classes: Sequence[str],
    ) -> None:
        """Log pictures (N, C, H, W) with a caption each: the prediction, and what it should have been if wrong."""
        assert self._board is not None
        inputs = inputs.float().cpu()
        low, high = inputs.amin(), inputs.amax()
        inputs = ((inputs - low) / (high - low).clamp(min=1e-8)).expand(-1, max(3, inputs.shape[1]), -1, -1)[:, :3]
        tiles = []
        for picture, label, prediction in zip(inputs, labels, predictions, strict=True):
            right = label == prediction
            tile = Image.new("RGB", (96, 112), (20, 80, 40) if right else (140, 20, 30))
            tile.paste(images.to_pil_image(images.resize(picture, [96, 96], interpolation=Image.Resampling.NEAREST)))
            caption = classes[prediction] if right else f"{classes[prediction]}, not {classes[label]}"
            ImageDraw.Draw(tile).text((3, 99), caption, fill="white")
            tiles.append(images.pil_to_tensor(tile))
        self._board.add_image("val/predictions", make_grid(torch.stack(tiles), nrow=8, padding=4), global_step)

    def log_checkpoint(self, report: SaveReport | None) -> None:
        """Log what a save cost, if there was one."""
        if report is not None:
            costs = {"checkpoint/stall_ms": 1e3 * report.stall, "checkpoint/megabytes": report.bytes / 1e6}
            self._scalars(report.global_step, costs)

    def log_hyperparameters(self, settings: Mapping[str, Any], metrics: Mapping[str, float], global_step: int) -> None:
        """Log flat settings beside the final metrics, for TensorBoard's HParams page."""
        assert self._board is not None
        plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()}
        # SummaryWriter.add_hparams would open a run of its own for this; here it stays with the curves.
        for summary in hparams(plain, dict(metrics)):
            self._board._get_file_writer().add_summary(summary, global_step)

    @property
    def seconds(self) -> float:
        """Since `start`."""
        return time.perf_counter() - self._start if self.started else 0.0

    def close(self) -> None:
        """Close the bar and TensorBoard's file. Safe to call twice."""
        if self._board is not None:
            self._bar.close()
            self._redirect.__exit__(None, None, None)
            self._board.close()
            self._board = None

    def _scalars(self, global_step: int, values: Mapping[str, float]) -> None:
        assert self._board is not None
        for name, value in values.items():
            self._board.add_scalar(name, value, global_step)
