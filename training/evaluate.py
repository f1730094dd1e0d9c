"""Scores of a model on a split, and the baselines that an adapter has to beat."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import pefts
from data import metrics, pipeline
from training.experiment import Experiment

Forward = Callable[..., jax.Array]  # (params, tokens, mask, token_types) -> (B, ...)


def forward(experiment: Experiment, method: str = "__call__") -> Forward:
    """The model in evaluation mode, jitted, on plain parameters."""
    model = experiment.model

    def run(params: Any, tokens: Any, mask: Any, types: Any) -> jax.Array:
        return model.apply({"params": params}, tokens, mask, token_types=types, method=method)

    return jax.jit(run)


def adapted_forward(experiment: Experiment) -> Forward:
    """The adapted model in evaluation mode, jitted, on (params, peft_state)."""
    run, peft = pefts.apply(experiment.model.apply), experiment.peft

    def logits(argument: Any, tokens: Any, mask: Any, types: Any) -> jax.Array:
        params, peft_state = argument
        return run({"params": peft.bind(params, peft_state)}, tokens, mask, token_types=types)

    return jax.jit(logits)


def predict(experiment: Experiment, run: Forward, argument: Any, split: str) -> np.ndarray:
    """run(argument, tokens, mask, token_types) for every row of the split, in order."""
    rows = rows_of(experiment, split)
    config = experiment.config.data
    batches = pipeline.eval_batches(rows, batch_size=config.eval_batch_size, buckets=config.buckets)
    values, indices = [], []
    for step in range(batches.steps_per_epoch):
        batch = batches[step]
        out = run(argument, batch["tokens"], batch["mask"], batch["token_types"])
        values.append(np.asarray(out))
        indices.append(batch["index"])
    return pipeline.in_order(values, indices)


def rows_of(experiment: Experiment, split: str) -> pipeline.Rows:
    """The encoded rows of a split.

    Raises:
      ValueError: the task has no such split.
    """
    if split not in experiment.rows:
        raise ValueError(f"split={split!r} is none of {sorted(experiment.rows)}.")
    return experiment.rows[split]


def score(experiment: Experiment, run: Forward, argument: Any, split: str) -> metrics.Scores:
    """Accuracy, macro-F1 and confusion matrix of the logits that `run` gives."""
    logits = predict(experiment, run, argument, split)
    labels = rows_of(experiment, split).labels
    return metrics.score(labels, logits.argmax(-1), classes=len(experiment.task.labels))


def majority(experiment: Experiment, split: str) -> metrics.Scores:
    """The scores of always naming the training split's most frequent class."""
    labels, rows = experiment.rows["train"].labels, rows_of(experiment, split)
    return metrics.majority_baseline(labels, rows.labels, classes=len(experiment.task.labels))


def linear_probe(
    experiment: Experiment,
    splits: Iterable[str],
    *,
    strengths: Iterable[float] = (0.003, 0.03, 0.3),
) -> dict[str, metrics.Scores]:
    """Logistic regression on the frozen base's sentence vectors; its strength is chosen on dev."""
    run = forward(experiment, "embed")
    splits = list(splits)
    features = {
        split: predict(experiment, run, experiment.params, split)
        for split in {"train", "dev", *splits}
    }
    scaler = StandardScaler().fit(features["train"])
    features = {split: scaler.transform(x) for split, x in features.items()}
    classes = len(experiment.task.labels)

    def fit(strength: float) -> tuple[float, LogisticRegression]:
        probe = LogisticRegression(C=strength, max_iter=500)
        probe.fit(features["train"], experiment.rows["train"].labels)
        guess = probe.predict(features["dev"])
        return metrics.score(experiment.rows["dev"].labels, guess, classes=classes).macro_f1, probe

    best = max((fit(strength) for strength in strengths), key=lambda pair: pair[0])[1]
    return {
        split: metrics.score(
            experiment.rows[split].labels, best.predict(features[split]), classes=classes
        )
        for split in splits
    }
