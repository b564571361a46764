"""A sweep by Optuna (hydra/sweeper=optuna) that is killed and goes on: towards a number of trials in all, losing none
that was begun."""

import logging
import warnings
from contextlib import ExitStack
from pathlib import Path

import optuna
from omegaconf import DictConfig, open_dict, read_write
from optuna.trial import TrialState

from src.checkpoint.policy import direction_of
from src.errors import ConfigError
from src.run import locked, run_name

log = logging.getLogger(__name__)

_until_the_end = ExitStack()  # of the process


def continue_study(config: DictConfig) -> None:
    """Prepare the study before Hydra's Optuna sweeper opens it.

    Left alone, the sweeper keeps it in memory, ends at the first trial that fails, always runs `n_trials` more, and
    does not know what became of trials that it was killed in. A study hands out queued trials first: so those that
    have no result are queued again, with the same parameters, hence in the same directories, where they resume.

    Raises:
        ConfigError: a setting of the sweeper's contradicts one of ours.
        HoldfastError: another process is at this sweep.
    """
    sweeper = config.hydra.sweeper
    given = {str(override).partition("=")[0].lstrip("+"): override for override in config.hydra.overrides.hydra}
    if direction := given.get("hydra.sweeper.direction"):
        raise ConfigError("hydra.sweeper.direction", direction.partition("=")[2], "leave it out: see checkpoint.mode")
    directory = Path(config.hydra.sweep.dir)
    directory.mkdir(parents=True, exist_ok=True)
    _until_the_end.enter_context(locked(directory))  # whatever is said to be running now has died
    for library in ("optuna", "alembic"):  # Hydra has just turned all of them up
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # of queueing trials
    with read_write(config), open_dict(config):
        sweeper.direction = f"{direction_of(config.checkpoint.monitor, config.checkpoint.mode)}imize"
        sweeper.study_name = sweeper.study_name or run_name(None, config.hydra.overrides.task)
        sweeper.storage = sweeper.storage or f"sqlite:///{directory}/optuna.db"
        if "hydra.sweeper.max_failure_rate" not in given:
            sweeper.max_failure_rate = 1.0
        study = optuna.create_study(
            study_name=sweeper.study_name, storage=sweeper.storage, direction=sweeper.direction, load_if_exists=True
        )
        again = queue_lost_trials(study)
        complete = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        log.info("%d of %d trials are done, %d are to be tried again", complete, sweeper.n_trials, again)
        sweeper.n_trials = max(0, sweeper.n_trials - complete)


def queue_lost_trials(study: optuna.Study) -> int:
    """Queue again what was begun and has no result. Killed in here, it may queue something twice, but loses nothing.

    Returns:
        How many trials are queued.
    """
    trials = study.get_trials(deepcopy=False)
    known = [trial.params for trial in trials if trial.state is TrialState.COMPLETE]
    known += [trial.system_attrs.get("fixed_params", {}) for trial in trials if trial.state is TrialState.WAITING]
    for trial in trials:
        # Of one that was killed while its parameters were drawn there are only some.
        is_known = any(trial.params.items() <= params.items() for params in known)
        if trial.state in (TrialState.RUNNING, TrialState.FAIL) and trial.params and not is_known:
            study.enqueue_trial(trial.params)
            known.append(trial.params)
        if trial.state is TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
    return len(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
