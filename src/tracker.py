"""What a person sees of a run while it trains: the progress bar, the log, and TensorBoard."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from src.board import Board
from src.checkpoint.checkpointer import SaveReport
from src.goodput import Goodput, Ledger

log = logging.getLogger(__name__)


class Tracker:
    """Shows one process's share of a run."""

    started = False
    """Whether there is anything to show: a finished run that is run again never starts."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        """
        Args:
            directory: The run directory; events go to its `tensorboard/`.
            settings: The flat settings of the run, for TensorBoard's HParams page.
        """
        self._directory = directory
        self._settings = settings

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(
        self,
        global_step: int,
        total_steps: int,
        epochs: int,
        final_metrics: Sequence[str],
        stalled: Callable[[], float],
    ) -> None:
        """Begin to show.

        Args:
            global_step: 0, or where the run resumed.
            final_metrics: The curves whose ends are to be compared between runs.
            stalled: For how many seconds checkpoints have held training up so far.
        """
        self._epochs = epochs
        self._board = Board(self._directory / "tensorboard", global_step)
        self._board.hyperparameters(global_step, self._settings, final_metrics)
        self._ledger = Ledger(self._directory, global_step, stalled)
        self._redirect = logging_redirect_tqdm()
        self._redirect.__enter__()
        self._bar = tqdm(
            total=total_steps,
            initial=global_step,
            dynamic_ncols=True,
            disable=None,  # where stderr is no terminal
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}]",
        )
        self._start = time.perf_counter()
        self._restart_window()
        self.started = True

    @property
    def seconds(self) -> float:
        """Since `start`."""
        return time.perf_counter() - self._start

    @property
    def goodput(self) -> Goodput:
        """Of the run, over all its lives."""
        return self._ledger.account()

    def step(self, samples: int) -> None:
        """Count a step. Cheap: called every step."""
        self._ledger.life.last_step += 1
        self._window_samples += samples
        self._bar.update()

    def log_step(self, global_step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log a training step, and the throughput since the last call."""
        rate = self._window_samples / (time.perf_counter() - self._window_start)
        self._restart_window()
        more = {"train/samples_per_second": rate, "goodput/share": self.goodput.share}
        self._board.scalars(global_step, {**values, **more})
        self._bar.set_description_str(f"epoch {epoch + 1}/{self._epochs}", refresh=False)
        self._bar.set_postfix_str(
            f"loss {values['train/loss']:.4f} · accuracy {values['train/accuracy']:.1%} · {rate:,.0f} samples/s"
            + _lag_of_mirror(values)
        )

    def log_epoch(self, global_step: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log the averages of an epoch and its evaluation. `epoch` counts completed epochs."""
        self._board.scalars(global_step, metrics)
        numbers = " · ".join(
            f"{name} {value:.2%}" if name.endswith("accuracy") else f"{name} {value:.4f}"
            for name, value in metrics.items()
        )
        log.info("epoch %d/%d · step %d · %s", epoch, self._epochs, global_step, numbers)
        self._restart_window()  # the evaluation is no training time

    def log_predictions(
        self,
        global_step: int,
        inputs: Tensor,
        labels: Sequence[int],
        predictions: Sequence[int],
        classes: Sequence[str],
    ) -> None:
        """Show pictures (N, C, H, W) with what they were taken for, and for what they should have been."""
        captions = [
            (classes[found], True) if found == wanted else (f"{classes[found]}, not {classes[wanted]}", False)
            for found, wanted in zip(predictions, labels, strict=True)
        ]
        self._board.pictures("val/predictions", global_step, inputs, captions)

    def log_checkpoint(self, report: SaveReport) -> None:
        """Log what a save cost."""
        if self.started:
            costs = {
                "checkpoint/stall_ms": 1e3 * report.stall,
                "checkpoint/seconds_to_durable": report.seconds,
                "checkpoint/megabytes": report.bytes / 1e6,
            }
            self._board.scalars(report.global_step, costs)

    def flush(self) -> None:
        """Hand all events to the operating system."""
        if self.started:
            self._board.flush()

    def close(self) -> None:
        """Close the progress bar and TensorBoard's file. Safe to call twice."""
        if self.started:
            self._bar.close()
            self._redirect.__exit__(None, None, None)
            self._board.close()
            self._ledger.close()

    def _restart_window(self) -> None:
        self._window_start, self._window_samples = time.perf_counter(), 0


def _lag_of_mirror(values: Mapping[str, float]) -> str:
    if "mirror/steps_at_risk" not in values:
        return ""
    waiting = values["mirror/megabytes_waiting"]
    return f" · mirror {values['mirror/steps_at_risk']:.0f} steps behind" + (f", {waiting:.0f} MB" if waiting else "")


class Silence(Tracker):
    """What ranks other than the first have for a tracker: there is one log, one bar, one TensorBoard."""

    def __init__(self) -> None:
        pass

    def start(self, *arguments: Any) -> None:
        """Nothing."""

    def step(self, samples: int) -> None:
        """Nothing."""

    def log_step(self, global_step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def log_epoch(self, global_step: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def log_predictions(self, *arguments: Any) -> None:
        """Nothing."""
