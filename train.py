"""Train a model so that nothing is lost: kill it anywhere, run the same command again, and it goes on.

    python train.py checkpoint.every=100 checkpoint.keep=3
    torchrun --nproc-per-node=8 train.py trainer=ddp

Every setting is in conf/; `python train.py --help` prints them.
"""

import hydra
from omegaconf import DictConfig

from src import distributed
from src.checkpoint.bucket_mirror import open_mirror
from src.checkpoint.catalog import Catalog
from src.checkpoint.checkpointer import Checkpointer
from src.checkpoint.follower import follower
from src.checkpoint.mirror import NO_MIRROR
from src.checkpoint.sharded import ShardedWriter
from src.launch import build, one_line_errors
from src.preemption import Stop
from src.result import already_done, write_result
from src.run import Run, register_resolvers
from src.summary import summarize
from src.tracker import Silence, Tracker
from src.worker import watch_parent

register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    """One run, from its first step or from wherever it left off, to its end. Returns its best metric."""
    with (
        one_line_errors(),
        distributed.join() as world,
        Run.open(config, world.is_main) as run,
        Tracker(run.directory, run.settings) if world.is_main else Silence() as tracker,
    ):
        done = already_done(run) if world.is_main else None
        if world.tell(done is not None):
            return done

        # Everything that can be wrong with the config is found here, before the first step.
        trainer = build("trainer", config.trainer)
        policy = build("checkpoint", config.checkpoint)
        storage = build("storage", config.storage)
        preemption = build("preemption", config.preemption)
        with world.one_per_node_first():
            data = build("data", config.data)

        trainer.set_up(world)
        shape = {"num_classes": len(data.classes), "channels": data.channels, "image_size": data.image_size}
        model = trainer.place(build("model", config.model, **shape))
        optimizer = build("optimizer", config.optimizer, model.parameters())
        scheduler = build("scheduler", config.scheduler, optimizer, trainer.total_steps(data))
        state = trainer.new_state(model, optimizer, scheduler)
        trainer.check(data, model, policy)

        catalog = Catalog(run.directory / "checkpoints")
        shards = ShardedWriter(world.rank, world.size) if trainer.sharded else None
        if world.is_main:  # which saves and restores for all
            catalog.clear_leftovers()  # they take space
            storage.preflight(
                catalog.directory, state.checkpoint_bytes(), policy.copies, makes_room=config.resume != "never"
            )
            mirror = open_mirror(storage, run.name, catalog, policy)
            checkpointer = Checkpointer(
                policy,
                catalog,
                run.config | {"data_set": data.fingerprint()},
                trainer.environment(),
                before_commit=tracker.flush,
                on_saved=tracker.log_checkpoint,
                mirror=mirror,
                world=world,
                shards=shards,
            )
        else:
            mirror, checkpointer = NO_MIRROR, follower(policy, world, shards)
        with checkpointer:
            checkpointer.restore(state, config.resume, config.init_from)
            with Stop(trainer.grace, world) as stop, preemption.watch(stop), watch_parent(stop):
                trainer.fit(state, data, checkpointer, tracker, stop)
            best = summarize(run, state, checkpointer, mirror, tracker)
        mirror.insist()
        if world.is_main:
            write_result(run, state.best_so_far(policy.monitor), state.global_step)
        return best


if __name__ == "__main__":
    distributed.leave_files_to_rank_0()
    with one_line_errors():
        main()
