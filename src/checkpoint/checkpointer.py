"""The one object that the training loop talks to about checkpoints."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from src.checkpoint.catalog import CORRUPT, OLD, RETIRED, Catalog
from src.checkpoint.cost import CostMeter
from src.checkpoint.manifest import CorruptCheckpoint, Fork, Manifest
from src.checkpoint.mirror import NO_MIRROR, Mirror
from src.checkpoint.policy import CheckpointPolicy, Progress
from src.checkpoint.remote import at_hand
from src.checkpoint.resume import check_compatible, find_to_resume, new_fork, reader_of
from src.checkpoint.saver import Save, Saver
from src.checkpoint.sharded import ShardedWriter
from src.checkpoint.snapshot import OnTensor
from src.checkpoint.weights import find_weights
from src.distributed import ALONE, World
from src.errors import CheckpointError, ConfigError
from src.state import TrainState

log = logging.getLogger(__name__)

_NOTICEABLE = 0.1  # seconds that training waited for the disk


@dataclass(frozen=True)
class SaveReport:
    """What one save cost."""

    global_step: int
    path: Path
    bytes: int
    """Size of all files of the checkpoint."""
    stall: float
    """Seconds for which training stood still."""
    seconds: float
    """From the moment it was begun until it was durable."""


class Checkpointer:
    """Asks the policy, has the state saved in the background, and restores the newest good checkpoint.

    Leaving its context waits for the save in flight.
    """

    def __init__(
        self,
        policy: CheckpointPolicy,
        catalog: Catalog,
        config: Mapping[str, Any],
        environment: Mapping[str, str],
        before_commit: Callable[[], None] = lambda: None,
        on_saved: Callable[[SaveReport], None] = lambda report: None,
        mirror: Mirror = NO_MIRROR,
        world: World = ALONE,
        shards: ShardedWriter | None = None,
    ) -> None:
        """
        Args:
            config: The run's resolved config, kept in every manifest; resume refuses another.
            environment: What the last bits of the result depend on: versions, device, threads.
            before_commit: Called, in the thread that writes, before a checkpoint becomes visible; flushes logs, so
                that after a kill none of what led to a checkpoint is missing.
            on_saved: Told of each checkpoint that has become durable, in the loop's thread.
            mirror: Where checkpoints are copied to, and come from if they are not here.
            world: The ranks that train, of which this one saves and restores for all.
            shards: What the ranks write together, if each has a piece of the model.
        """
        self.policy = policy
        self.catalog = catalog
        self.saves = 0
        self.stall_total = 0.0  # seconds
        self._config = config
        self._environment = environment
        self._on_saved = on_saved
        self._mirror = mirror
        self._world = world
        self._shards = shards
        self._saver = Saver(policy, catalog, before_commit, self._mirror.committed, shards)
        self._saving: Save | None = None
        self._meter = CostMeter()
        self._resumed_from: str | None = None
        self._forks: Sequence[Fork] = ()
        self._waited = self._waited_when_warned = 0.0  # seconds, for the disk
        self._failures = 0
        self._retry_at = 0.0  # on the clock of Progress.seconds
        self._durable: tuple[int, bool] | None = None  # step of the newest on the disk, and whether with metrics
        self._last_save = self._last_step = Progress(global_step=-1, epoch=0, seconds=time.monotonic())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # Also where training failed: what is on its way arrives before the run's lock is let go of.
        self._saver.close()
        if self._saving is not None and (error := self._saving.committed.exception()) is not None:
            log.error("step %d could not be saved: %s", self._saving.global_step, error)
        try:
            if kind is not None and issubclass(kind, Exception):
                self._mirror.flush()  # the machine may be gone before it is run again
        finally:
            self._mirror.close()

    def restore(self, state: TrainState, resume: str, init_from: str | None) -> None:
        """Bring `state` to where the run left off; the first time, start it afresh or from `init_from`.

        Args:
            resume: `auto`, `required`, `never`, or the path or s3:// URL of a checkpoint or run.
            init_from: Weights for a run that starts at step 0: a checkpoint, a run, or a `.pt` file; path or URL.

        Raises:
            CheckpointError: there are checkpoints, but none is readable; or none, and one is required;
                or it does not fit the model.
            ConfigError: the config has drifted from the checkpoint's, or a path leads nowhere.
        """
        for key, value in (("resume", resume), ("init_from", init_from)):
            if not isinstance(value, str) and (key, value) != ("init_from", None):
                raise ConfigError(key, value, "must be text: see the comment in conf/config.yaml")
        if self._shards is not None:
            self._shards.require_shared(self.catalog.directory)
        self._mirror.open()
        found = find_to_resume(self.catalog, resume, self._mirror) if resume != "never" else None
        if found is None:
            self._start_afresh(state, resume, init_from)
            self._mirror.begin(above=-1, label=OLD)
            self._tell_others(False)
            return
        check_compatible(found.manifest, self._config, self._environment, self._world.size)
        try:
            self._load(state, found.state, reader_of(found.path))
        except (CorruptCheckpoint, OSError) as error:
            raise CheckpointError(f"{found.path}: {error}") from error
        self._resumed_from, self._forks = found.origin, found.forks
        self._last_save = self._last_step = self._progress(state)
        log.info("resumed from %s: step %d, epoch %d", found.path, state.global_step, state.epoch)
        # Only now, when it is known to fit, is anything abandoned for it.
        self.catalog.retire_above(found.retire_above)
        self._mirror.begin(found.retire_above)
        if found.foreign:
            self._save_at_last(state)
        else:
            self._durable = (state.global_step, state.evaluated)
        self._tell_others(False)

    def step(self, state: TrainState) -> None:
        """To be called after every optimizer step, and after the evaluation if the step ended an epoch.

        If a save is due, takes a snapshot and returns; the rest happens in the background. Waits only if the
        save before is still being written.

        Raises:
            CheckpointError: as many saves in a row have failed as the policy allows.
            MirrorError: another machine has taken this run over.
        """
        self._mirror.check()
        now = self._progress(state)
        if not now.epoch_end:  # an evaluation is no part of a step
            self._meter.step(now.seconds - self._last_step.seconds, now.saving)
        if self._saving is not None and self._saving.committed.done():
            self._settle(self._saving)
        due, waited = self._is_due(now), 0.0
        if due and self._saving is not None:
            waited = self._wait_for_the_disk(self._saving)
            due = not self._failures or self._is_due(now)  # the save before may just have failed
        self._tell_others(due)
        if due:
            self._start(state, now, waited)
        if due or waited:
            now = replace(now, seconds=time.monotonic())  # nor is the stall
        self._last_step = now
        self._saver.prepare(state)

    def wait_for_snapshot(self) -> None:
        """To be called just before `optimizer.step()`: parameters may change after it. Normally free."""
        if self._saving is not None:
            start = time.perf_counter()
            self._saving.snapshot.wait()
            self._saving.stall += time.perf_counter() - start

    def wait(self) -> None:
        """Wait until nothing is in flight.

        Raises:
            CheckpointError: as many saves in a row have failed as the policy allows.
        """
        if self._saving is not None:
            start = time.perf_counter()
            self._saver.await_with_progress(self._saving)
            self.stall_total += time.perf_counter() - start
            self._settle(self._saving)

    def finish(self, state: TrainState, patience: Callable[[], float] = lambda: math.inf) -> None:
        """Save the last state, unless that has been done, and wait until it is durable, and in the mirror if that
        works.

        Args:
            patience: For how many seconds from now the mirror may be waited for; asked again and again.

        Raises:
            CheckpointError: it could not be saved.
        """
        self.wait()
        if self._durable != (state.global_step, state.evaluated):
            self._save_at_last(state)
        self._tell_others(False)
        self._mirror.flush(patience)
        self.catalog.rotate(self.policy)  # what was being uploaded when its time came

    def lag(self, state: TrainState) -> dict[str, float]:
        """How much training a kill would cost just now: steps that no checkpoint on the disk holds; and, if there is a
        mirror, steps that the loss of the disk would cost, and what is still to be uploaded."""
        lag = {"checkpoint/steps_at_risk": float(state.global_step - (self._durable or (0,))[0])}
        mirrored = self._mirror.newest_step()
        if mirrored is not None:
            lag |= {"mirror/steps_at_risk": float(state.global_step - mirrored)} | self._mirror.lag()
        return lag

    def newest_finite(self) -> Path | None:
        """The newest checkpoint on the disk in which loss and weights are numbers; None too if it cannot be read."""
        with suppress(OSError):
            return next((path for path, manifest in reversed(self.catalog.readable()) if manifest.finite), None)
        return None

    def _load(self, state: TrainState, saved: dict[str, Any] | None, read: OnTensor = lambda _, tensor: tensor) -> None:
        """Have all ranks become what rank 0 has found: all of a state, weights alone, or nothing."""
        saved = self._world.spread(saved, read, state.own_part())
        if saved is not None and "global_step" in saved:
            state.load_state_dict(saved)
        elif saved is not None:
            state.load_weights(saved["model_state_dict"])

    def _start_afresh(self, state: TrainState, resume: str, init_from: str | None) -> None:
        if init_from is None:
            self._load(state, None)
        else:
            with at_hand("init_from", init_from, self._mirror.connect, self.catalog.directory) as path:
                self._load(state, {"model_state_dict": find_weights(path, state.model, init_from)})
        if resume == "never":
            self._forks = [new_fork(above=-1)]
            for path in [
                *self.catalog.paths(),
                *self.catalog.were_set_aside(CORRUPT),
                *self.catalog.were_set_aside(RETIRED),
            ]:
                log.warning("resume=never: %s is kept as %s", path, self.catalog.set_aside(path, OLD).name)
        self._last_save = self._last_step = self._progress(state)
        log.info("starting afresh in %s", self.catalog.directory.parent)

    def _progress(self, state: TrainState) -> Progress:
        return Progress(
            global_step=state.global_step,
            epoch=state.epoch,
            seconds=time.monotonic(),
            epoch_end=state.evaluated,
            is_best=state.best is not None and state.best["global_step"] == state.global_step,
            saving=self._saving is not None,
            save_cost=self._meter.cost,
        )

    def _is_due(self, now: Progress) -> bool:
        if self._failures:  # one try at a time, each after a pause
            return self._saving is None and now.seconds >= self._retry_at
        return self.policy.should_save(now, self._last_save)

    def _save_at_last(self, state: TrainState) -> None:
        """Save now, however often it takes, within what the policy allows."""
        while True:
            self._tell_others(True)
            self._start(state, self._progress(state))
            self.wait()
            if self._durable == (state.global_step, state.evaluated):
                return
            time.sleep(self.policy.retry_after)

    def _start(self, state: TrainState, now: Progress, waited: float = 0.0) -> None:
        """Take a snapshot and have it written; nothing may be in flight."""
        try:
            self._saving = self._saver.start(state, self._manifest(state))
        except MemoryError as error:
            if self._shards is not None:  # the others have begun
                raise
            self._report_failure(now.global_step, error)
            return
        self._saving.stall += waited
        self._last_save = now

    def _tell_others(self, save: bool) -> None:
        """Have the other ranks save their pieces of this step, or go on. Rank 0 alone knows the time, and the disk."""
        if self._shards is not None:
            self._world.tell(save)

    def _settle(self, save: Save) -> None:
        """Wait for a save, and take note of how it ended."""
        self._saving = None
        self.stall_total += save.stall
        try:
            committed = save.committed.result()
        except (OSError, MemoryError) as error:
            self._meter.failed()
            self._report_failure(save.global_step, error)
            return
        self._failures = 0
        self._durable = (save.global_step, committed.evaluated)
        self.saves += 1
        self._meter.saved(save.stall)
        seconds = committed.at - save.begun
        self._on_saved(SaveReport(save.global_step, committed.path, committed.bytes, save.stall, seconds))

    def _wait_for_the_disk(self, save: Save) -> float:
        """Returns for how many seconds."""
        start = time.perf_counter()
        self._settle(save)
        waited = time.perf_counter() - start
        self._waited += waited
        if waited >= _NOTICEABLE and self._waited >= 2 * self._waited_when_warned:  # ever more seldom
            self._waited_when_warned = self._waited
            log.warning(
                "saves are due faster than the disk takes them: training waited %.1f s until step %d was written, "
                "%.1f s so far in all; raise checkpoint.every, or choose checkpoint=budget",
                waited,
                save.global_step,
                self._waited,
            )
        return waited

    def _report_failure(self, global_step: int, error: OSError | MemoryError) -> None:
        self._failures += 1
        self._retry_at = time.monotonic() + self.policy.retry_after
        newest = "unknown"
        with suppress(OSError):  # the disk may be what failed
            newest = next((path.name for path in reversed(self.catalog.paths())), "none")
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = f"cannot save step {global_step} in {self.catalog.directory}: {cause}"
        if self._failures >= self.policy.max_failures:
            raise CheckpointError(
                f"{reason}. Training stops: nothing after the newest checkpoint ({newest}) would survive. "
                "Mend what is wrong, then run the same command again"
            ) from error
        log.error(
            "%s (failure %d of checkpoint.max_failures=%d in a row; the newest checkpoint is %s; next try in %g s)",
            reason,
            self._failures,
            self.policy.max_failures,
            newest,
            self.policy.retry_after,
        )

    def _manifest(self, state: TrainState) -> Manifest:
        return Manifest(
            global_step=state.global_step,
            epoch=state.epoch,
            files={},
            metrics=dict(state.metrics) if state.evaluated else {},
            best=state.best,
            resumed_from=self._resumed_from,
            forks=self._forks,
            world_size=self._world.size,
            environment=self._environment,
            config=self._config,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
