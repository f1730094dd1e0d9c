"""The adapted model in evaluation mode, and its scores on a split."""

from typing import Any

import jax

import pefts
from training.objective import Experiment, Forward, Scores


def forward(experiment: Experiment) -> Forward:
    """The model in evaluation mode, jitted, on plain parameters."""
    run = experiment.objective.call(experiment.model.apply)
    return jax.jit(lambda params, batch: run({"params": params}, batch))


def adapted_forward(experiment: Experiment) -> Forward:
    """The adapted model in evaluation mode, jitted, on (params, peft_state)."""
    run = experiment.objective.call(pefts.apply(experiment.model.apply))
    bind = experiment.peft.bind
    return jax.jit(lambda argument, batch: run({"params": bind(*argument)}, batch))


def score(experiment: Experiment, run: Forward, argument: Any, split: str) -> Scores:
    """The scores of what `run` gives for every row of the split."""
    objective = experiment.objective
    return objective.scores(experiment, objective.predict(experiment, run, argument, split), split)
