"""A sweep by Optuna that is killed and goes on: towards a number of trials in all, losing none that was begun."""

import logging
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write
from optuna.trial import TrialState

from src.launch import ending_the_program
from src.run import locked

log = logging.getLogger(__name__)

_until_the_end = ExitStack()  # of the process


class ContinueStudy(Callback):
    """Prepares the study before Hydra's Optuna sweeper opens it.

    The sweeper always runs `n_trials` more, and does not know what became of trials that it was killed in. The study
    hands out queued trials first: so those that have no result are queued again, with the same parameters, hence in the
    same directories, where they resume.
    """

    @ending_the_program()
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before the first trial."""
        sweeper = config.hydra.sweeper
        directory = Path(config.hydra.sweep.dir)
        directory.mkdir(parents=True, exist_ok=True)
        _until_the_end.enter_context(locked(directory))  # whatever is said to be running now has died
        for library in ("optuna", "alembic"):  # Hydra has just turned all of them up
            logging.getLogger(library).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # of queueing trials
        study = optuna.create_study(
            study_name=sweeper.study_name, storage=sweeper.storage, direction=sweeper.direction, load_if_exists=True
        )
        again = queue_lost_trials(study)
        complete = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        log.info("%d of %d trials are done, %d are tried again", complete, sweeper.n_trials, again)
        with read_write(config), open_dict(config):
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
        if trial.state in (TrialState.RUNNING, TrialState.FAIL) and trial.params and trial.params not in known:
            study.enqueue_trial(trial.params)
            known.append(trial.params)
        if trial.state is TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
    return len(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
