"""The last thing a run says: what came of it, what it cost, and where to look."""

import logging
import os
from datetime import timedelta

from src.checkpoint.checkpointer import Checkpointer
from src.checkpoint.mirror import Mirror
from src.run import Run
from src.state import TrainState
from src.tracker import Tracker

log = logging.getLogger(__name__)


def summarize(run: Run, state: TrainState, checkpointer: Checkpointer, mirror: Mirror, tracker: Tracker) -> float:
    """Log the summary.

    Returns:
        The best value of the monitored metric; NaN if it never was a number.
    """
    best = state.best_so_far(checkpointer.policy.monitor)
    directory = os.path.relpath(run.directory)
    lines = {"best": f"{best['metric']} {best['value']:.4f} at step {best['global_step']}"}
    if tracker.started:
        seconds = tracker.seconds
        tracker.close()  # the bar must be gone before the summary
        lines["time"] = f"{timedelta(seconds=round(seconds))} in this process"
        lines["checkpointing"] = (
            f"{checkpointer.saves} saves held training up for {checkpointer.stall_total:.2f} s "
            f"({checkpointer.stall_total / seconds:.2%} of the time)"
        )
        lines["goodput"] = str(tracker.goodput)
    lines["steps"] = f"{state.global_step} in {state.epoch} epoch{'s' * (state.epoch != 1)}"
    lines["checkpoints"] = f"{directory}/checkpoints"
    if mirror.url is not None:
        lines["mirror"] = f"{mirror.url}, up to step {mirror.newest_step()}"
    lines["look"] = f"python -m src.checkpoint ls {directory}   ·   tensorboard --logdir {directory}"
    width = max(map(len, lines))
    log.info("done\n%s", "\n".join(f"  {name:<{width}}  {text}" for name, text in lines.items()))
    return float(best["value"])
