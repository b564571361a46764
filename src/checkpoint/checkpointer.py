"""The one object that the training loop talks to about checkpoints."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from src.checkpoint.catalog import CORRUPT, OLD, RETIRED, Catalog
from src.checkpoint.manifest import Manifest
from src.checkpoint.policy import CheckpointPolicy, Progress
from src.checkpoint.resume import check_compatible, find_to_resume
from src.checkpoint.snapshot import snapshot
from src.checkpoint.weights import load_weights
from src.checkpoint.writer import write_checkpoint
from src.errors import CheckpointError, ConfigError
from src.state import TrainState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveReport:
    """What one save cost."""

    global_step: int
    path: Path
    bytes: int
    """Size of all files of the checkpoint."""
    stall: float
    """Seconds for which training stood still."""


class Checkpointer:
    """Asks the policy, takes snapshots, commits them, rotates; and restores the newest good one."""

    def __init__(
        self,
        policy: CheckpointPolicy,
        catalog: Catalog,
        config: Mapping[str, Any],
        environment: Mapping[str, str],
        before_commit: Callable[[], None],
    ) -> None:
        """
        Args:
            config: The run's resolved config, kept in every manifest; resume refuses another.
            environment: What the last bits of the result depend on: versions, device, threads.
            before_commit: Called before a checkpoint becomes visible; flushes logs, so that after a kill
                none of what led to a checkpoint is missing.
        """
        self.policy = policy
        self.catalog = catalog
        self.saves = 0
        self.stall_total = 0.0  # seconds
        self._config = config
        self._environment = environment
        self._before_commit = before_commit
        self._resumed_from: str | None = None
        self._failures = 0
        self._retry_at = 0.0  # on the clock of Progress.seconds
        self._last = Progress(global_step=-1, epoch=0, seconds=time.monotonic())

    def restore(self, state: TrainState, resume: str, init_from: str | None) -> None:
        """Bring `state` to where the run left off; the first time, start it afresh or from `init_from`.

        Args:
            resume: `auto`, `required`, `never`, or the path of a checkpoint or run.
            init_from: Weights for a run that starts at step 0: a checkpoint, a run, or a `.pt` file.

        Raises:
            CheckpointError: there are checkpoints, but none is readable; or none, and one is required;
                or it does not fit the model.
            ConfigError: the config has drifted from the checkpoint's, or a path leads nowhere.
        """
        for key, value in (("resume", resume), ("init_from", init_from)):
            if not isinstance(value, str) and (key, value) != ("init_from", None):
                raise ConfigError(key, value, "must be text: see the comment in conf/config.yaml")
        self.catalog.clear_leftovers()
        found = find_to_resume(self.catalog, resume) if resume != "never" else None
        if found is None:
            self._start_afresh(state, resume, init_from)
            return
        check_compatible(found.manifest, self._config, self._environment)
        state.load_state_dict(found.state)
        self._resumed_from = found.origin
        self._last = self._progress(state)
        log.info("resumed from %s: step %d, epoch %d", found.path, state.global_step, state.epoch)
        # Only now, when it is known to fit, is anything abandoned for it.
        if found.retire_above is not None:
            self.catalog.retire_above(found.retire_above)
        if found.foreign:
            self._save_at_last(state)

    def step(self, state: TrainState) -> SaveReport | None:
        """To be called after every optimizer step, and after the evaluation if the step ended an epoch.

        Returns:
            What the save cost, if one was due and succeeded.

        Raises:
            CheckpointError: as many saves in a row have failed as the policy allows.
        """
        now = self._progress(state)
        due = now.seconds >= self._retry_at if self._failures else self.policy.should_save(now, self._last)
        return self._save(state, now) if due else None

    def finish(self, state: TrainState) -> SaveReport | None:
        """Save the last state, if the policy has not just done so.

        Raises:
            CheckpointError: it could not be saved.
        """
        return self._save_at_last(state) if state.global_step != self._last.global_step else None

    def _start_afresh(self, state: TrainState, resume: str, init_from: str | None) -> None:
        if init_from is not None:
            load_weights(init_from, state.model)
        if resume == "never":
            for path in [
                *self.catalog.paths(),
                *self.catalog.were_set_aside(CORRUPT),
                *self.catalog.were_set_aside(RETIRED),
            ]:
                log.warning("resume=never: %s is kept as %s", path, self.catalog.set_aside(path, OLD).name)
        self._last = self._progress(state)
        log.info("starting afresh in %s", self.catalog.directory.parent)

    def _progress(self, state: TrainState) -> Progress:
        return Progress(
            global_step=state.global_step,
            epoch=state.epoch,
            seconds=time.monotonic(),
            epoch_end=state.evaluated,
            is_best=state.best is not None and state.best["global_step"] == state.global_step,
        )

    def _save_at_last(self, state: TrainState) -> SaveReport:
        """Save now, however often it takes, within what the policy allows."""
        while (report := self._save(state, self._progress(state))) is None:
            time.sleep(self.policy.retry_after)
        return report

    def _save(self, state: TrainState, now: Progress) -> SaveReport | None:
        start = time.perf_counter()
        try:
            host_state = snapshot(state.state_dict())
            self._before_commit()
            path, manifest = write_checkpoint(self.catalog.directory, host_state, self._manifest(host_state, state))
        except OSError as error:
            self._failures += 1
            self._retry_at = time.monotonic() + self.policy.retry_after
            self._report_failure(now.global_step, error)
            return None
        self._failures = 0
        self._last = now
        self.catalog.rotate(self.policy)
        stall = time.perf_counter() - start
        self.saves += 1
        self.stall_total += stall
        return SaveReport(now.global_step, path, sum(entry.size for entry in manifest.files.values()), stall)

    def _report_failure(self, global_step: int, error: OSError) -> None:
        newest = next((path.name for path in reversed(self.catalog.paths())), "none")
        reason = f"cannot save step {global_step} in {self.catalog.directory}: {error.strerror or error}"
        if self._failures >= self.policy.max_failures:
            raise CheckpointError(
                f"{reason}. Training stops: nothing after the newest checkpoint ({newest}) would survive. "
                "Mend the disk, then run the same command again"
            ) from error
        log.error(
            "%s (failure %d of checkpoint.max_failures=%d in a row; the newest checkpoint is %s; next try in %g s)",
            reason,
            self._failures,
            self.policy.max_failures,
            newest,
            self.policy.retry_after,
        )

    def _manifest(self, host_state: Mapping[str, Any], state: TrainState) -> Manifest:
        return Manifest(
            global_step=state.global_step,
            epoch=state.epoch,
            files={},
            loss=float(host_state["loss"]),
            metrics=dict(state.metrics) if state.evaluated else {},
            best=state.best,
            resumed_from=self._resumed_from,
            environment=self._environment,
            config=self._config,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
