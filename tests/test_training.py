"""The real train.py in real processes: killed, damaged, crowded out, out of disk. Nothing is lost."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.errors import ConfigError
from src.storage.local import LocalStorage
from tests.conftest import LAST, LONG, TINY, Result, Training, children_of
from tests.test_catalog import DAMAGE
from tests.test_resume import RUN, differences, state


def final_state(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run / f"checkpoints/{LAST}/state.pt", weights_only=True)
    return state


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: every point of every curve, but for those that measure time or disk."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag != "train/samples_per_second" and not tag.startswith(("checkpoint/", "mirror/", "goodput/"))
    }


def newest_step(checkpoints: Path) -> int:
    steps = [int(path.name[5:]) for path in checkpoints.glob("step_????????")]
    return max(steps, default=0)


def saving(checkpoints: Path) -> bool:
    return any(checkpoints.glob(".tmp_step_*"))


@pytest.mark.parametrize(("workers", "lives"), [(0, 5), (2, 3)])
def test_invariant_4_killed_anywhere_again_and_again_it_ends_with_the_same_bits(
    training: Training, uninterrupted: Path, workers: int, lives: int
) -> None:
    # One kill in each stretch of the run, so that later epochs have their share.
    chance, stretch = random.Random(workers), 96 // lives
    targets = [number * stretch + chance.randrange(3, stretch) for number in range(lives)]
    kills = kills_inside_a_save = 0
    for number, target in enumerate(targets):
        inside_a_save = number % 2 == 0
        process = training.start(*LONG, f"trainer.workers={workers}")

        def due(target: int = target, inside_a_save: bool = inside_a_save) -> bool:
            return newest_step(training.checkpoints) >= target and (not inside_a_save or saving(training.checkpoints))

        if training.kill_when(process, due):
            kills += 1
            kills_inside_a_save += saving(training.checkpoints)
    result = training.finish(training.start(*LONG, f"trainer.workers={workers}"))
    assert result.status == 0, result.output
    assert "resumed from" in result.output
    assert kills == lives
    assert kills_inside_a_save >= 1

    assert differences(final_state(uninterrupted), final_state(training.run)) == []
    assert curves(training.run) == curves(uninterrupted)
    assert len(curves(training.run)["train/loss"]) == 104


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_invariant_5_a_damaged_newest_checkpoint_costs_steps_not_the_result(
    train: Callable[..., Result], tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    run = tmp_path / "outputs/tiny"
    assert train(*LONG).status == 0
    expected = final_state(run)
    damage(run / "checkpoints" / LAST)
    result = train(*LONG)
    assert result.status == 0
    assert f"set aside as {LAST}.corrupt" in result.output
    assert differences(expected, final_state(run)) == []


def test_invariant_10_a_second_process_in_the_run_directory_is_refused(training: Training) -> None:
    first = training.start(*TINY, "trainer.epochs=100000")
    wait_for(lambda: newest_step(training.checkpoints) > 0, first)
    config = (training.run / ".hydra/config.yaml").read_bytes()
    second = training.finish(training.start(*TINY, "trainer.epochs=100000", "checkpoint.every=7"))
    assert second.status == 1
    assert (training.run / ".hydra/config.yaml").read_bytes() == config
    assert re.search(rf"^error: .*being written by process {first.pid} on .*run=NAME", second.output, re.MULTILINE)
    assert "Traceback" not in second.output
    assert first.poll() is None


def test_a_disk_that_refuses_stops_training_loudly_with_older_checkpoints_whole(training: Training) -> None:
    assert training.finish(training.start(*LONG, "trainer.epochs=1")).status == 0
    size = (training.checkpoints / "step_00000013/state.pt").stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    result = training.finish(training.start(*LONG, preexec_fn=limit))
    assert result.status == 3
    assert "failure 1 of checkpoint.max_failures=3" in result.output
    assert re.search(
        r"^error: cannot save step .*File too large.*step_00000013.*same command", result.output, re.MULTILINE
    )
    assert newest_step(training.checkpoints) == 13
    assert not saving(training.checkpoints)
    # Once the disk is mended, the same command goes on.
    again = training.finish(training.start(*LONG))
    assert again.status == 0
    assert "step 13, epoch 1" in again.output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_a_full_disk_is_found_before_the_first_step(train: Callable[..., Result], small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(4 * 2**20 - 100_000))
    result = train(*TINY, f"hydra.run.dir={small_disk}/run")
    assert result.status == 2
    assert re.search(r"^error: hydra\.run\.dir=.* has room for 0\.00 GB.*checkpoint\.keep", result.output, re.MULTILINE)
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "rest").write_bytes(bytes(4_000_000))
    result = train(*TINY, f"hydra.run.dir={small_disk}/other")
    assert result.status == 2
    assert "No space left on device" in result.output
    assert "Traceback" not in result.output


def test_what_a_kill_has_left_behind_is_no_full_disk(train: Callable[..., Result], small_disk: Path) -> None:
    command = (*TINY, f"hydra.run.dir={small_disk}/run", "storage.min_free_gb=0.001")
    assert train(*command, "trainer.epochs=1").status == 0
    half = small_disk / "run/checkpoints/.tmp_step_00000026"
    half.mkdir()
    with (half / "state.pt").open("wb") as file, pytest.raises(OSError, match="No space left"):
        file.write(bytes(4 * 2**20))
    result = train(*command, "trainer.epochs=2")
    assert result.status == 0, result.output


def test_starting_over_needs_room_beside_what_is_kept(tmp_path: Path) -> None:
    held = tmp_path / "step_00000001"
    held.mkdir()
    free = shutil.disk_usage(tmp_path).free
    with (held / "state.pt").open("wb") as file:
        file.truncate(2 * free)  # takes no room
    LocalStorage(min_free_gb=0).preflight(tmp_path, 2 * free, 1)
    with pytest.raises(ConfigError, match="has room for"):
        LocalStorage(min_free_gb=0).preflight(tmp_path, 2 * free, 1, makes_room=False)


def test_a_run_directory_that_became_read_only_is_found_before_the_first_step(
    train: Callable[..., Result], small_disk: Path
) -> None:
    command = (*TINY, "trainer.epochs=1", f"hydra.run.dir={small_disk}/run")
    assert train(*command).status == 0
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    result = train(*command)
    assert result.status == 2
    assert len(result.output.splitlines()) == 1
    assert "Read-only file system" in result.output


def test_a_disk_that_fills_up_while_training_costs_no_checkpoint(training: Training, small_disk: Path) -> None:
    run = small_disk / "run"
    command = (*LONG, "trainer.epochs=100000", f"hydra.run.dir={run}")
    process = training.start(*command)
    wait_for(lambda: newest_step(run / "checkpoints") > 0, process)
    with pytest.raises(OSError, match="No space left"), (small_disk / "filler").open("wb") as filler:
        while True:
            filler.write(bytes(4096))
            filler.flush()
    result = training.finish(process)
    assert result.status == 3
    assert "cannot save step" in result.output
    stopped_at = newest_step(run / "checkpoints")
    (small_disk / "filler").unlink()
    process = training.start(*command)
    wait_for(lambda: newest_step(run / "checkpoints") > stopped_at, process)
    assert not list((run / "checkpoints").glob("*.corrupt"))


def test_a_process_that_loads_data_and_is_killed_ends_the_run_which_goes_on(
    training: Training, uninterrupted: Path
) -> None:
    """What the system does when memory runs out."""
    process = training.start(*LONG, "trainer.workers=1")
    wait_for(lambda: newest_step(training.checkpoints) > 0, process)
    os.kill(loader_of(process.pid), signal.SIGKILL)
    result = training.finish(process)
    assert result.status == 1
    assert re.search(r"^error: a process that loads data has died: .*same command", result.output, re.MULTILINE)
    assert "Traceback" not in result.output
    again = training.finish(training.start(*LONG))
    assert again.status == 0, again.output
    assert "resumed from" in again.output
    assert differences(final_state(uninterrupted), final_state(training.run)) == []


def loader_of(process: int) -> int:
    """The first process that this one's fork server has started."""
    server = next(
        child for child in children_of(process) if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    return min(children_of(server))


def test_a_run_directory_that_vanishes_while_training_is_made_again(training: Training, uninterrupted: Path) -> None:
    process = training.start(*LONG)
    wait_for(lambda: newest_step(training.checkpoints) > 0, process)
    training.run.rename(training.directory / "gone")
    result = training.finish(process)
    assert result.status == 0, result.output
    assert differences(final_state(uninterrupted), final_state(training.run)) == []


def test_a_copied_run_directory_goes_on_like_the_original(train: Callable[..., Result]) -> None:
    """What rsync or `aws s3 sync` brings: new times of modification, and half of what was being written."""
    command = (*TINY, "scheduler=none", "checkpoint.every=3")
    train(*command, "trainer.epochs=2", "run=whole")
    train(*command, "trainer.epochs=1")
    RUN.rename("original")
    shutil.copytree("original", RUN, copy_function=shutil.copyfile)
    half = RUN / "checkpoints/.tmp_step_00000015"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    os.utime(RUN / "checkpoints/step_00000012", (2e9, 2e9))
    result = train(*command, "trainer.epochs=2")
    assert "step 13, epoch 1" in result.output
    assert differences(state(26, Path("outputs/whole")), state(26)) == []


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
