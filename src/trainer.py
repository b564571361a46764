"""The training loop, written out by hand. Read `Trainer._train`: it is the run."""

import logging
import math
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed import is_torchelastic_launched
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from src.checkpoint.checkpointer import Checkpointer
from src.checkpoint.policy import CheckpointPolicy
from src.data.datasets import Data
from src.data.loader import ResumableLoader
from src.distributed import ALONE, World
from src.errors import ConfigError, DivergedError, require_choice, require_int, require_number
from src.placement import data_parallel, device_of_rank, find_device, no_sync_if
from src.preemption import Interrupted, Stop, Stopped
from src.rng import derive_seed, seed_everything
from src.sharding import shard, whole
from src.state import TrainState
from src.tracker import Tracker

log = logging.getLogger(__name__)

EVALUATION_METRICS = ("val/loss", "val/accuracy")
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Trains a classifier. Holds settings; all that changes and that a checkpoint needs is in `TrainState`."""

    def __init__(
        self,
        epochs: int,
        seed: int = 0,
        device: str = "auto",
        strategy: str = "none",
        precision: str = "fp32",
        accumulate: int = 1,
        clip_grad_norm: float | None = None,
        channels_last: bool = True,
        compile: bool = False,
        deterministic: bool = True,
        workers: int = 0,
        log_every: int = 10,
        grace: float = 60.0,
        on_nan: str = "stop",
    ) -> None:
        """
        Args:
            epochs: Passes over the training set.
            seed: Of the initial weights, the order of the samples, augmentation, and dropout.
            device: `auto` (a GPU if there is one), `cpu`, `cuda`, or `cuda:N`.
            strategy: How several processes, started by torchrun, share the work: `ddp`, each has the whole model and
                a share of every batch (torch's DistributedDataParallel); `fsdp`, each has a piece of every parameter
                (torch's fully_shard); `none`, there is only one.
            precision: `fp32`, or autocast to `bf16` or `fp16` (the latter with a GradScaler).
            accumulate: Micro-batches that each batch is cut into: less memory, the same batch size.
            clip_grad_norm: Largest norm of the gradient; None to leave it alone.
            channels_last: Memory layout of images and convolutions; faster on most devices.
            compile: Run the model through torch.compile.
            deterministic: Use only algorithms that give the same bits every time, and raise where
                there is none. Exact resume needs it on a GPU.
            workers: Processes that load training data, and as many that load validation data; 0 loads in
                the main one. Results do not depend on it.
            log_every: Steps between fetches of the loss from the device.
            on_nan: `stop` or `warn` when the loss is NaN or infinite. It is looked at every `log_every` steps.
            grace: Seconds from a request to stop, after which a step that hangs is given up and uploads end.

        Raises:
            ConfigError: a value cannot work here.
        """
        require_int("trainer.epochs", epochs, 1, "passes over the training set")
        require_int("trainer.seed", seed, 0, "seed")
        if seed >= 2**63:
            raise ConfigError("trainer.seed", seed, "must be below 2**63")
        require_choice("trainer.strategy", strategy, ("none", "ddp", "fsdp"))
        require_choice("trainer.precision", precision, tuple(_PRECISIONS))
        require_int("trainer.accumulate", accumulate, 1, "micro-batches per batch")
        if clip_grad_norm is not None:
            require_number("trainer.clip_grad_norm", clip_grad_norm, "largest norm of the gradient, or null", above=0)
        require_int("trainer.workers", workers, 0, "processes that load data")
        require_int("trainer.log_every", log_every, 1, "steps between log entries")
        require_choice("trainer.on_nan", on_nan, ("stop", "warn"))
        require_number("trainer.grace", grace, "seconds from a request to stop", at_least=0)
        self.epochs = epochs
        self.seed = seed
        self.device = find_device(device)
        self.strategy = strategy
        self.precision = _PRECISIONS[precision]
        self.accumulate = accumulate
        self.clip_grad_norm = clip_grad_norm
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.compile = compile
        self.deterministic = deterministic
        self.workers = workers
        self.log_every = log_every
        self.grace = grace
        self.on_nan = on_nan
        self.world = ALONE
        self._diverged = False
        self._compiled: set[torch.Size] = set()  # shapes of batches

    def set_up(self, world: World = ALONE) -> None:
        """Take a place among the ranks, seed everything, and choose deterministic algorithms. Call it before the model
        is built, which all ranks then build alike.

        Raises:
            ConfigError: the settings are not for as many processes.
        """
        self.world = world
        if world.size > 1:
            self._take_a_place()
        elif self.strategy != "none" and not is_torchelastic_launched():
            log.warning(
                "trainer.strategy=%s, and torchrun has not started this: one process trains alone. With all GPUs: "
                "torchrun --nproc-per-node=gpu train.py …",
                self.strategy,
            )
        if self.deterministic:
            # cuBLAS reads this when it starts; without it, its matrix products are not reproducible.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(self.deterministic)
        if self.precision is torch.float16:
            # A GradScaler skips its first steps while it looks for a scale; the schedule moves on regardless.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
        seed_everything(self.seed)

    def _take_a_place(self) -> None:
        if self.strategy == "none":
            remedy = f"is for one process, and torchrun has started {self.world.size}; choose trainer=ddp"
            raise ConfigError("trainer.strategy", "none", remedy)
        if self.strategy == "fsdp":
            if self.precision is torch.float16:
                raise ConfigError("trainer.precision", "fp16", "does not go with trainer=fsdp; choose bf16")
            if self.compile:
                raise ConfigError("trainer.compile", True, "does not go with trainer=fsdp; choose trainer=ddp")
        self.device = device_of_rank(self.device, self.world)

    def place(self, model: nn.Module) -> nn.Module:
        """Put the model on the device, in the memory layout. Call it before the optimizer is built."""
        if self.sharded:  # which wants its pieces contiguous
            shard(model.to(self.device), self.device.type, self.world.size)
            return model
        placed: nn.Module = model.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        return placed

    @property
    def sharded(self) -> bool:
        """Whether no rank has all of the model."""
        return self.strategy == "fsdp" and self.world.size > 1

    def new_state(self, model: nn.Module, optimizer: Any, scheduler: Any) -> TrainState:
        """The state at step 0."""
        scaler = GradScaler(self.device.type, enabled=self.precision is torch.float16)
        state = TrainState(model, optimizer, scheduler, scaler)
        state.loss, state.totals = state.loss.to(self.device), state.totals.to(self.device)
        return state

    def total_steps(self, data: Data) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * math.ceil(data.train_size / data.batch_size)

    def environment(self) -> dict[str, str]:
        """What the last bits of the result depend on besides config and code."""
        on_gpu = self.device.type == "cuda"
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if on_gpu else self.device.type,
            "threads": str(torch.get_num_threads()),
            "strategy": self.strategy if self.world.size > 1 else "none",
            "deterministic": str(self.deterministic),
        }

    def check(self, data: Data, model: nn.Module, policy: CheckpointPolicy) -> None:
        """Find what could only go wrong later.

        Raises:
            ConfigError: names the key.
        """
        require_choice("checkpoint.monitor", policy.monitor, EVALUATION_METRICS)
        last_batch = (data.train_size - 1) % data.batch_size + 1
        smallest = min(
            max(1, size // self.world.size) // self._micro_batches(size) for size in (data.batch_size, last_batch)
        )
        has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        if has_batch_norm and smallest == 1:
            key, value = ("data.batch_size", data.batch_size)
            if self.accumulate > 1:
                key, value = ("trainer.accumulate", self.accumulate)
            ranks = f" for {self.world.size} ranks" if self.world.size > 1 else ""
            raise ConfigError(
                key,
                value,
                f"leaves a batch of one sample ({data.train_size} samples in batches of {data.batch_size}{ranks}), and "
                "BatchNorm needs more than one; choose another",
            )

    def fit(self, state: TrainState, data: Data, checkpointer: Checkpointer, tracker: Tracker, stop: Stop) -> None:
        """Train from wherever `state` is to the end of the last epoch, or until asked to stop, and save the last state.

        Raises:
            CheckpointError: checkpoints cannot be saved any more.
            Stopped: it was asked to stop; the state is saved.
        """
        try:
            self._train(state, data, checkpointer, tracker, stop)
        except Interrupted:
            log.info("asked to stop by %s: saving step %d", stop.reason, state.global_step)
        stop.heeded()
        checkpointer.finish(state, stop.seconds_left)
        stop.settle()
        if stop.requested is not None:  # also if it came at the very end: there may be other runs to come
            raise Stopped(stop.signals, stop.reason, state.global_step)

    def _train(self, state: TrainState, data: Data, checkpointer: Checkpointer, tracker: Tracker, stop: Stop) -> None:
        """The loop.

        Nothing in a step waits for the GPU, except a GradScaler's own check (fp16) and the log's fetch
        of the loss every `log_every` steps.
        """
        if state.epoch >= self.epochs:
            log.info("nothing left to train: epoch %d of trainer.epochs=%d is done", state.epoch, self.epochs)
            return
        model = self._compiled_if_asked(state.model)
        train_model = model
        if self.world.size > 1 and not self.sharded:
            train_model = self._compiled_if_asked(data_parallel(state.model, self.device))
        optimizer, scaler = state.optimizer, state.scaler
        sums = torch.zeros_like(state.totals)
        train_batches, val_batches = self._loaders(data)
        total_steps = self.total_steps(data)
        tracker.start(state.global_step, total_steps, self.epochs, EVALUATION_METRICS, lambda: checkpointer.stall_total)

        while state.epoch < self.epochs:
            train_model.train()
            for images, labels in stop.between(train_batches.epoch(state.epoch, start=state.samples)):
                samples = min(data.batch_size, data.train_size - state.samples)  # in this step, of all ranks
                samples_per_rank = samples / self.world.size  # for DDP takes the mean of the ranks' gradients
                self._seed_rank(state)
                optimizer.zero_grad()
                sums.zero_()
                with self._compiling(images.shape, state, stop):
                    count = self._micro_batches(samples)
                    for number, (x, y) in enumerate(
                        zip(images.tensor_split(count), labels.tensor_split(count), strict=True), start=1
                    ):
                        x, y = self._to_device(x, y)
                        with no_sync_if(train_model, number < count):
                            with self._autocast():
                                logits = train_model(x)
                                loss = cross_entropy(logits, y, reduction="sum")
                            scaler.scale(loss / samples_per_rank).backward()
                        sums[0] += loss.detach()
                        sums[1] += (logits.detach().argmax(1) == y).sum()
                self.world.sum_(sums)
                state.loss.copy_(sums[0] / samples)
                state.totals += sums
                lr = state.scheduler.get_last_lr()[0]  # of this step

                checkpointer.wait_for_snapshot()  # of the step before: parameters may change now
                scaler.unscale_(optimizer)
                grad_norm = self._clip_gradients(state.model)
                scaler.step(optimizer)
                scaler.update()
                state.scheduler.step()
                state.advance(samples)

                tracker.step(samples)
                if state.global_step % self.log_every == 0:
                    metrics = self._training_metrics(state, sums[1] / samples, grad_norm, lr) | checkpointer.lag(state)
                    tracker.log_step(state.global_step, state.epoch, metrics)
                    self._check_loss(metrics["train/loss"], state.global_step, checkpointer)
                if state.samples < data.train_size:  # the step that ends an epoch is saved after its evaluation
                    checkpointer.step(state)

            self.world.broadcast_(state.model.buffers())  # BatchNorm's statistics are those of rank 0
            with self._rolled_back_if_interrupted(state, stop):
                metrics = self.evaluate(model, val_batches, stop)
                examples = self._predict_some(state.model, data)
            train_loss, train_accuracy = (state.totals / data.train_size).tolist()
            self._check_loss(train_loss, state.global_step, checkpointer)
            state.end_epoch(metrics, checkpointer.policy.best_of(state.best, metrics, state.global_step))
            averages = {"epoch/loss": train_loss, "epoch/accuracy": train_accuracy}
            tracker.log_epoch(state.global_step, state.epoch, averages | metrics)
            tracker.log_predictions(state.global_step, *examples, data.classes)
            checkpointer.step(state)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: ResumableLoader, stop: Stop | None = None) -> dict[str, float]:
        """Mean loss and accuracy over a data set, a share on each rank. Draws no random numbers, changes no buffers."""
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for images, labels in (stop or Stop()).together(batches.epoch(0)):
            x, y = self._to_device(images, labels)
            with self._autocast():
                logits = model(x)
                totals[0] += cross_entropy(logits, y, reduction="sum")
            totals[1] += (logits.argmax(1) == y).sum()
        self.world.sum_(totals)
        loss, accuracy = (totals / batches.size).tolist()
        return dict(zip(EVALUATION_METRICS, (loss, accuracy), strict=True))

    def _compiled_if_asked(self, model: nn.Module) -> Any:
        # Dynamic shapes would make the code of a step depend on the shapes of earlier ones, which a resumed
        # process has not seen: other code, other last bits.
        return torch.compile(model, dynamic=False) if self.compile else model

    def _micro_batches(self, samples: int) -> int:
        """As many on each rank: with `fsdp` each brings the model together once more."""
        return min(self.accumulate, max(1, samples // self.world.size))

    def _seed_rank(self, state: TrainState) -> None:
        """Have dropout differ between ranks. Those of rank 0 go on from where they were, as with one process, and
        are in every checkpoint; a function of the step has not to be saved, whatever ranks come and go."""
        if not self.world.is_main:
            seed_everything(derive_seed(self.seed, self.world.rank, state.global_step))

    @contextmanager
    def _compiling(self, shape: torch.Size, state: TrainState, stop: Stop) -> Iterator[None]:
        """A forward and backward. The first with a shape may take minutes of compiling, in which a request to stop
        would have to wait: it is left in the middle, and undone."""
        if not self.compile or shape in self._compiled:
            yield
            return
        with self._rolled_back_if_interrupted(state, stop):
            yield
        self._compiled.add(shape)

    @contextmanager
    def _rolled_back_if_interrupted(self, state: TrainState, stop: Stop) -> Iterator[None]:
        """What may be left in the middle, though it changes buffers or draws random numbers."""
        undo = state.undo_point()
        try:
            with stop.leaving_allowed():
                yield
        except Interrupted:
            undo()
            raise

    def _clip_gradients(self, model: nn.Module) -> Tensor | None:
        """Returns the norm before clipping, on the device; None if there is no clipping."""
        if self.clip_grad_norm is None:
            return None
        return whole(nn.utils.clip_grad_norm_(model.parameters(), self.clip_grad_norm))

    def _training_metrics(
        self, state: TrainState, accuracy: Tensor, grad_norm: Tensor | None, lr: float | Tensor
    ) -> dict[str, float]:
        if grad_norm is None:
            gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
            grad_norm = whole(nn.utils.get_total_norm(gradients))
        # One transfer, and the only wait for the device.
        loss, correct, norm = torch.stack([state.loss, accuracy, grad_norm]).tolist()
        return {"train/loss": loss, "train/accuracy": correct, "train/grad_norm": norm, "train/lr": float(lr)}

    def _check_loss(self, loss: float, global_step: int, checkpointer: Checkpointer) -> None:
        if math.isfinite(loss):
            self._diverged = False
            return
        if self._diverged:
            return
        self._diverged = True
        good = checkpointer.newest_finite()
        newest = os.path.relpath(good) if good else None
        if self.on_nan == "warn":
            log.warning(
                "the loss is %s at step %d; the newest checkpoint without such values: %s", loss, global_step, newest
            )
            return
        way_back = f" from the newest checkpoint without such values (init_from={newest})" if newest else ""
        raise DivergedError(
            f"the loss is {loss} at step {global_step}: training stops (trainer.on_nan=stop). Begin a new run "
            f"(run=NAME){way_back}, with a smaller optimizer.lr or with trainer.clip_grad_norm, or go on regardless "
            "with trainer.on_nan=warn"
        )

    @torch.no_grad()
    def _predict_some(self, model: nn.Module, data: Data) -> tuple[Tensor, list[int], list[int]]:
        """Images (N, C, H, W) of the validation set, their labels, and what the model makes of them."""
        samples = [data.val[index] for index in range(min(16, data.val_size))]
        images, labels = default_collate(samples)
        model.eval()
        with self._autocast():
            predictions = model(self._to_device(images)[0]).argmax(1)
        return images, labels.tolist(), predictions.tolist()

    def _loaders(self, data: Data) -> tuple[ResumableLoader, ResumableLoader]:
        common: dict[str, Any] = {"seed": self.seed, "workers": self.workers, "pin": self.device.type == "cuda"}
        common |= {"rank": self.world.rank, "world_size": self.world.size}
        train = ResumableLoader(data.train, data.train_size, data.batch_size, shuffle=True, **common)
        val = ResumableLoader(data.val, data.val_size, data.batch_size, shuffle=False, **common)
        return train, val

    def _to_device(self, images: Tensor, *labels: Tensor) -> tuple[Tensor, ...]:
        x = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        return (x, *(label.to(self.device, non_blocking=True) for label in labels))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)
