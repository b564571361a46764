"""Several ranks, by a real torchrun: they train one model, agree on everything, and any of them may be killed."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from src.checkpoint.catalog import Catalog, verify
from src.errors import ConfigError
from src.trainer import Trainer
from tests.cluster import Cluster, free_port, missing
from tests.conftest import LAST, LONG, REPOSITORY, TINY, TINY_DATA, Result, Training
from tests.ranks import kill, torchrun, two_nodes, workers_of
from tests.test_resume import differences
from tests.test_training import curves, final_state, loader_of, newest_step

RANKS = (*LONG, "trainer=ddp")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on two nodes of one rank each, which share no disk, that was left alone."""
    directory = tmp_path_factory.mktemp("undisturbed")
    training = Training(directory, [])
    nodes = two_nodes(training, [directory / "one", directory / "two"], *RANKS)
    results = [training.finish(node) for node in nodes]
    assert [result.status for result in results] == [0, 0], results
    written = [any(path.is_file() for path in (directory / name).rglob("*")) for name in ("one", "two")]
    assert sorted(written) == [False, True], "one node writes, and only one"
    assert sum("epoch 8/8" in result.output for result in results) == 1
    return directory / ("one" if written[0] else "two") / "outputs" / "tiny"


def test_a_checkpoint_of_two_ranks_is_like_one_of_one(undisturbed: Path, uninterrupted: Path) -> None:
    assert final_state(undisturbed)["model_state_dict"].keys() == final_state(uninterrupted)["model_state_dict"].keys()
    manifest = verify(undisturbed / "checkpoints" / LAST)
    assert manifest.world_size == 2
    assert len(curves(undisturbed)["train/loss"]) == 104


@pytest.mark.parametrize("victim", [0, 1])
def test_invariant_4_a_killed_rank_costs_steps_not_the_result_and_torchrun_goes_on(
    training: Training, undisturbed: Path, victim: int
) -> None:
    agent = torchrun(training, 2, *RANKS, restarts=3)
    training.wait_until(agent, lambda: newest_step(training.checkpoints) >= 20)
    kill(workers_of(agent)[victim])
    result = training.finish(agent)
    assert result.status == 0, result.output
    assert "resumed from" in result.output
    assert "Traceback" not in result.output
    assert "stopped by" not in result.output
    assert differences(final_state(undisturbed), final_state(training.run)) == []
    assert curves(training.run) == curves(undisturbed)


def test_a_rank_that_loses_its_loader_ends_and_torchrun_goes_on(training: Training, undisturbed: Path) -> None:
    """Rank 0, which has the run's lock and the save in flight to let go of."""
    agent = torchrun(training, 2, *RANKS, "trainer.workers=1", restarts=3)
    training.wait_until(agent, lambda: newest_step(training.checkpoints) >= 20)
    kill(loader_of(workers_of(agent)[0]))
    result = training.finish(agent)
    assert result.status == 0, result.output
    assert "error: a process that loads data has died" in result.output
    assert "resumed from" in result.output
    assert differences(final_state(undisturbed), final_state(training.run)) == []


def test_invariant_12_asked_to_stop_all_ranks_stop_after_the_same_step_which_is_saved(
    training: Training, undisturbed: Path
) -> None:
    """Also where only one of them is asked, and not the one that saves."""
    agent = torchrun(training, 2, *RANKS, restarts=3)  # which it must not do
    training.wait_until(agent, lambda: newest_step(training.checkpoints) >= 20)
    os.kill(workers_of(agent)[1], signal.SIGTERM)
    result = training.finish(agent)
    assert result.status != 0
    stopped = re.search(r"^stopped by SIGTERM after step (\d+), which is saved", result.output, re.MULTILINE)
    assert stopped, result.output
    assert newest_step(training.checkpoints) == int(stopped[1])
    agent = torchrun(training, 2, *RANKS)
    training.wait_until(agent, lambda: newest_step(training.checkpoints) >= int(stopped[1]) + 20)
    agent.send_signal(signal.SIGTERM)
    result = training.finish(agent)
    assert "stopped by SIGTERM after step" in result.output, result.output
    assert training.finish(torchrun(training, 2, *RANKS)).status == 0
    assert differences(final_state(undisturbed), final_state(training.run)) == []
    assert curves(training.run) == curves(undisturbed)


def test_invariant_4_with_other_numbers_of_ranks_no_sample_of_the_epoch_is_seen_twice_or_skipped(
    training: Training,
) -> None:
    seen = training.directory / "seen"
    data = ("data._target_=tests.ranks.recorded", f"+data.file={seen}", "+data.seconds=0.001", "data.train_size=3000")
    command = (*TINY, *data, "trainer=ddp", "trainer.epochs=1", "checkpoint.every=5")
    steps = []
    for ranks in (2, 3):
        already = newest_step(training.checkpoints)
        agent = torchrun(training, ranks, *command)
        training.wait_until(agent, lambda already=already: newest_step(training.checkpoints) > already)  # type: ignore[misc]
        agent.send_signal(signal.SIGTERM)
        assert "stopped by SIGTERM" in training.finish(agent).output
        steps.append(newest_step(training.checkpoints))
    assert 0 < steps[0] < steps[1] < 188
    result = training.finish(training.start(*command))
    assert result.status == 0, result.output
    assert "ranks 3 -> 1" in result.output
    assert sorted(map(int, seen.read_text().split())) == list(range(3000))


def test_invariant_4_three_ranks_sum_in_the_same_order_before_and_after_a_kill(training: Training) -> None:
    """Also where the gradients of a step go out in several pieces."""
    command = (
        *TINY_DATA,
        "trainer=ddp",
        "model=resnet18",
        "data.train_size=96",
        "checkpoint.every=1",
        "trainer.epochs=2",
    )
    whole = training.finish(torchrun(training, 3, *command, "run=whole"))
    assert whole.status == 0, whole.output
    agent = torchrun(training, 3, *command, restarts=3)
    training.wait_until(agent, lambda: newest_step(training.checkpoints) >= 3)
    kill(workers_of(agent)[2])
    result = training.finish(agent)
    assert result.status == 0, result.output
    assert "resumed from" in result.output
    one, other = (
        torch.load(training.directory / f"outputs/{name}/checkpoints/step_00000012/state.pt", weights_only=True)
        for name in ("whole", "tiny")
    )
    assert differences(one, other) == []


def test_the_death_of_torchrun_ends_its_ranks_and_nothing_is_lost(training: Training) -> None:
    command = (*TINY, "trainer=ddp", "trainer.epochs=100000", "checkpoint.every=10")
    agent = torchrun(training, 2, *command)
    training.wait_until(agent, lambda: newest_step(training.checkpoints) >= 20)
    kill(agent.pid)
    output = agent.communicate(timeout=60)[0]  # until the last of them has let go of it
    stopped = re.search(r"^stopped by the death of torchrun after step (\d+)", output, re.MULTILINE)
    assert stopped, output
    assert newest_step(training.checkpoints) == int(stopped[1])


def test_two_ranks_take_the_step_that_one_would(train: Callable[..., Result], training: Training) -> None:
    """Also where a batch is cut into micro-batches, and where there is none of its samples for a rank."""
    model = ("model=vit_b_16", "model.patch_size=4", "model.layers=1", "model.heads=2", "model.width=16")
    command = (*TINY_DATA, *model, "data.train_size=33", "trainer.epochs=2", "trainer.accumulate=3")
    assert train(*command, "run=alone").status == 0
    result = training.finish(torchrun(training, 2, *command, "trainer=ddp"))
    assert result.status == 0, result.output
    alone, together = (
        torch.load(training.directory / f"outputs/{name}/checkpoints/step_00000006/state.pt", weights_only=True)
        for name in ("alone", "tiny")
    )
    for key, weights in alone["model_state_dict"].items():
        assert torch.allclose(weights, together["model_state_dict"][key], atol=1e-6), key
    assert together["loss"].item() == pytest.approx(alone["loss"].item(), rel=1e-5)
    assert together["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("trainer.strategy=none", r"trainer\.strategy=none: .* torchrun has started 2; choose trainer=ddp"),
        ("storage=s3", r"storage\.bucket=null: "),  # which only rank 0 looks at
    ],
)
def test_what_is_wrong_is_said_once(training: Training, override: str, error: str) -> None:
    result = training.finish(torchrun(training, 2, *TINY, "trainer=ddp", override))
    assert result.status == 1  # torchrun's own
    assert re.findall(r"^error: .*", result.output, re.MULTILINE) == re.findall(
        rf"^error: {error}.*", result.output, re.M
    )
    assert len(re.findall(r"^error: ", result.output, re.MULTILINE)) == 1, result.output
    assert not Catalog(training.checkpoints).paths()


def test_torchrun_does_not_sweep(training: Training) -> None:
    result = training.finish(torchrun(training, 2, "-m", *TINY, "trainer=ddp", "trainer.seed=1,2"))
    assert result.output.count("error: hydra.mode=MULTIRUN: torchrun trains one run on many ranks") == 1
    assert not Path(training.directory, "outputs").exists()


def test_one_process_needs_no_torchrun_whatever_the_strategy(train: Callable[..., Result]) -> None:
    assert train(*TINY, "trainer=ddp", "trainer.epochs=1").status == 0
    assert Path("outputs/tiny").is_dir()


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.strategy=horovod: must be"):
        Trainer(epochs=1, strategy="horovod")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm of one node."""
    if not_there := missing():
        pytest.skip(f"NO SLURM HERE, hence not tested with one: {', '.join(not_there)} (Debian: slurm-wlm, munge)")
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("why", "cores"), [("its time is up", []), ("another is urgent", ["--cpus-per-task=2"])], ids=["time", "urgent"]
)
def test_slurm_takes_a_job_back_and_it_goes_on(
    training: Training, undisturbed: Path, cluster: Cluster, why: str, cores: list[str]
) -> None:
    """Whether or not it was told how many cores a rank needs."""
    script = ["sbatch", "--parsable", "--nodes=1", *cores, f"--output={training.directory}/log"]
    command = ["docs/slurm.sh", *RANKS, f"hydra.run.dir={training.run}"]
    job = cluster.call(
        *script, *command, cwd=str(REPOSITORY), RANKS_PER_NODE="2", RENDEZVOUS_PORT=str(free_port())
    ).strip()
    cluster.wait_for(lambda: newest_step(training.checkpoints) >= 20, "step 20")
    if why == "its time is up":
        cluster.call("scancel", "--signal=USR1", "--batch", job)  # as --signal has it be sent before the end
    else:
        cluster.call("sbatch", "--partition=urgent", *cores, "--output=/dev/null", "--wrap=true")
    cluster.wait_for(lambda: cluster.state(job) == "PENDING", "the requeue")
    log = (training.directory / "log").read_text()
    assert re.search(r"^stopped by SIGTERM after step \d+, which is saved", log, re.MULTILINE), log
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+5")  # it would wait for two minutes
    cluster.wait_for(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), "the end")
    log = (training.directory / "log").read_text()
    assert cluster.state(job) == "COMPLETED", log
    assert "resumed from" in log
    assert differences(final_state(undisturbed), final_state(training.run)) == []


def test_slurm_takes_a_job_of_a_sweep_back_too(
    training: Training, uninterrupted: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    sweep = training.directory / "outputs/sweeps/tiny"
    process = training.start("-m", *LONG, "trainer.seed=0,1", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1")

    def first() -> Path | None:
        overrides = sweep.glob("*/.hydra/overrides.yaml")
        return next((path.parent.parent for path in overrides if "trainer.seed=0" in path.read_text()), None)

    training.wait_until(process, lambda: (run := first()) is not None and newest_step(run / "checkpoints") > 0)
    jobs = cluster.call("squeue", "--noheader", "--array", "--format=%F_%K").split()
    job = next(job for job in jobs if job.endswith("_0"))
    cluster.call("scancel", "--signal=USR2", job)  # as Slurm does before the end
    cluster.wait_for(lambda: cluster.state(job) == "PENDING", "the requeue")
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+5")  # it would wait for two minutes
    result = training.finish(process)
    assert result.status == 0, result.output
    said = "".join(path.read_text() for path in sweep.rglob("*_log.*"))
    assert "stopped by SIGUSR2 after step" in said
    assert "resumed from" in said
    run = first()
    assert run is not None
    assert differences(final_state(uninterrupted), final_state(run)) == []
