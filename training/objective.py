"""What a run is made of, and what each kind of task decides about it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

import pefts
from configs.base import Config
from data.pipeline import Batches

Apply = Callable[..., Any]  # model.apply, or pefts.apply of it
Call = Callable[..., Any]  # (variables, batch, **options) -> what the loss and the scores read
Forward = Callable[[Any, Mapping[str, Any]], jax.Array]  # (argument, batch) -> the same, jitted


class Scores(Protocol):
    """How good a model is on a split."""

    def summary(self) -> dict[str, float]:
        """The figures that tables and curves show, by name."""
        ...

    def record(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        ...


class Opening(NamedTuple):
    """What is to be continued.

    Attributes:
      text: any.
      marked: whether special tokens are written out in it, as chat templates do.
    """

    text: str
    marked: bool = False


class Writing(NamedTuple):
    """How texts are continued: at most so many tokens, at a temperature (0: the likeliest)."""

    new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Objective(NamedTuple):
    """One kind of task: how its model is called, what it learns and how it is scored.

    Attributes:
      columns: of metrics.csv, beside those of every run.
      load: (config, task) -> encoded splits, model, params, names.
      describe: experiment -> what the data is, in a line.
      train_batches: experiment -> endless batches of the training split.
      call: apply -> a `Call` on a batch.
      loss: (output of the call, batch) -> scalar, a mean.
      weight: batch -> what its loss counts in a mean over batches.
      predict: (experiment, forward, argument, split) -> one number or row for each prediction.
      scores: (experiment, predictions, split) -> `Scores`.
      finish: writes what a finished run leaves beside its adapter.
      values: what can be lowered instead of the loss by an optimizer that needs no gradients: name
        -> (output of the call, batch) -> scalar, a mean.
      write: (experiment, argument of the adapted model, prompts, options) -> continuations; None
        where a model writes nothing.
      lower_is_better: of the first figure of its scores.
    """

    columns: tuple[str, ...]
    load: Callable[[Config, Any], tuple[dict[str, Any], Any, Any, Any]]
    describe: Callable[["Experiment"], str]
    train_batches: Callable[["Experiment"], Batches]
    call: Callable[[Apply], Call]
    loss: Callable[[Any, Mapping[str, Any]], jax.Array]
    weight: Callable[[Mapping[str, Any]], jax.Array]
    predict: Callable[["Experiment", Forward, Any, str], np.ndarray]
    scores: Callable[["Experiment", np.ndarray, str], Scores]
    finish: Callable[["Experiment", Path, Any, Forward], dict[str, Path]]
    values: Mapping[str, Callable[[Any, Mapping[str, Any]], jax.Array]]
    write: Callable[["Experiment", Any, Sequence[Opening], Writing], list[str]] | None = None
    lower_is_better: bool = False


class Experiment(NamedTuple):
    """A config made concrete."""

    config: Config
    task: Any
    rows: dict[str, Any]  # encoded splits
    model: Any
    params: Any  # the frozen base, with a fresh classification head where there is one
    names: Any  # parameter path <-> Hugging Face name
    peft: pefts.Peft
    objective: Objective


def rows_of(experiment: Experiment, split: str) -> Any:
    """The encoded rows of a split.

    Raises:
      ValueError: the task has no such split.
    """
    if split not in experiment.rows:
        raise ValueError(f"split={split!r} is none of {sorted(experiment.rows)}.")
    return experiment.rows[split]
