"""Train a model so that nothing is lost: kill it anywhere, run the same command again, and it goes on.

    python train.py checkpoint.every=100 checkpoint.keep=3

Every setting is in conf/; `python train.py --help` prints them.
"""

import hydra
from omegaconf import DictConfig

from src.checkpoint.catalog import Catalog
from src.checkpoint.checkpointer import Checkpointer
from src.checkpoint.mirror import open_mirror
from src.launch import build, one_line_errors
from src.preemption import Stop
from src.result import already_done, write_result
from src.run import Run, register_resolvers
from src.summary import summarize
from src.tracker import Tracker
from src.worker import watch_sweep

register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float:
    """One run, from its first step or from wherever it left off, to its end. Returns its best metric."""
    with one_line_errors(), Run.open(config) as run, Tracker(run.directory, run.settings) as tracker:
        if (metric := already_done(run)) is not None:
            return metric

        # Everything that can be wrong with the config is found here, before the first step.
        trainer = build("trainer", config.trainer)
        policy = build("checkpoint", config.checkpoint)
        storage = build("storage", config.storage)
        data = build("data", config.data)
        preemption = build("preemption", config.preemption)

        trainer.set_up()
        shape = {"num_classes": len(data.classes), "channels": data.channels, "image_size": data.image_size}
        model = trainer.place(build("model", config.model, **shape))
        optimizer = build("optimizer", config.optimizer, model.parameters())
        scheduler = build("scheduler", config.scheduler, optimizer, trainer.total_steps(data))
        state = trainer.new_state(model, optimizer, scheduler)

        catalog = Catalog(run.directory / "checkpoints")
        trainer.check(data, model, policy)
        storage.preflight(catalog.directory, state.checkpoint_bytes(), policy.copies)

        mirror = open_mirror(storage, run.name, catalog, policy)
        identity = run.config | {"data_set": data.fingerprint()}
        checkpointer = Checkpointer(
            policy,
            catalog,
            identity,
            trainer.environment(),
            before_commit=tracker.flush,
            on_saved=tracker.log_checkpoint,
            mirror=mirror,
        )
        with checkpointer:
            checkpointer.restore(state, config.resume, config.init_from)
            with Stop(trainer.grace) as stop, preemption.watch(stop), watch_sweep(stop):
                trainer.fit(state, data, checkpointer, tracker, stop)
            best = summarize(run, state, checkpointer, mirror, tracker)
        mirror.insist()
        write_result(run, state)
        return best


if __name__ == "__main__":
    with one_line_errors():
        main()
