"""TensorBoard: scalars, captioned pictures, hyper-parameters. A disk that refuses them does not stop training."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.transforms.v2 import functional as images
from torchvision.utils import make_grid

log = logging.getLogger(__name__)

_RIGHT, _WRONG = (20, 80, 40), (140, 20, 30)  # RGB
_TILE, _CAPTION = 96, 20  # pixels

_report_as_before = threading.excepthook


def _report_what_is_not_ours(failed: threading.ExceptHookArgs) -> None:
    # TensorBoard's thread keeps its error for whoever writes next, which is `Board`, and raises it besides.
    if not (isinstance(failed.thread, _AsyncWriterThread) and isinstance(failed.exc_value, OSError)):
        _report_as_before(failed)


class Board:
    """The event files of one process in a run's `tensorboard/`."""

    def __init__(self, directory: Path, global_step: int) -> None:
        """
        Args:
            directory: TensorBoard's folder of the run.
            global_step: Where this process starts. What an earlier one logged beyond it is dropped, so
                that curves do not zigzag; what it logged at the step itself belongs to the checkpoint.
        """
        threading.excepthook = _report_what_is_not_ours
        self._writer: SummaryWriter | None = None
        purge_step = global_step + 1 if global_step > 0 else 0
        try:
            self._writer = SummaryWriter(str(directory), purge_step=purge_step, max_queue=1000)
        except OSError as error:
            self._give_up(error)

    def scalars(self, global_step: int, values: Mapping[str, float]) -> None:
        """One point on each curve."""

        def write(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, global_step)

        self._write(write)

    def pictures(self, name: str, global_step: int, inputs: Tensor, captions: Sequence[tuple[str, bool]]) -> None:
        """Images (N, C, H, W) side by side, each with a caption, on green if it is right, else on red."""
        inputs = inputs.float().cpu()
        inputs = inputs[:, :3] if inputs.shape[1] >= 3 else inputs[:, :1].expand(-1, 3, -1, -1)
        low, high = inputs.amin(), inputs.amax()
        inputs = (inputs - low) / (high - low).clamp(min=1e-8)
        font = ImageFont.load_default(size=14)
        tiles = []
        for picture, (caption, right) in zip(inputs, captions, strict=True):
            tile = Image.new("RGB", (_TILE, _TILE + _CAPTION), _RIGHT if right else _WRONG)
            enlarged = images.resize(picture, [_TILE, _TILE], interpolation=images.InterpolationMode.NEAREST)
            tile.paste(images.to_pil_image(enlarged))
            ImageDraw.Draw(tile).text((4, _TILE + 2), caption, fill="white", font=font)
            tiles.append(images.pil_to_tensor(tile))
        grid = make_grid(torch.stack(tiles), nrow=4, padding=4)
        self._write(lambda writer: writer.add_image(name, grid, global_step))

    def hyperparameters(self, global_step: int, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Flat settings for the HParams page, which shows the newest values of the curves `metrics` beside them."""
        plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()}

        def write(writer: SummaryWriter) -> None:
            # SummaryWriter.add_hparams would open a run of its own for this; here it stays with the curves.
            for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):
                writer._get_file_writer().add_summary(summary, global_step)

        self._write(write)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._write(lambda writer: writer.flush())

    def close(self) -> None:
        """Flush and close. Safe to call twice."""
        self._write(lambda writer: writer.close())
        self._writer = None

    def _write(self, write: Callable[[SummaryWriter], None]) -> None:
        writer = self._writer  # flush() comes from the thread that writes checkpoints: it may be gone the next moment
        if writer is None:
            return
        try:
            write(writer)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        log.error("TensorBoard's events cannot be written (%s): the curves of this process end here", error)
