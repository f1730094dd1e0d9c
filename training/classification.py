"""Classifying texts: batches of labelled rows, cross-entropy, accuracy, baselines to beat."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import models
import pefts
from configs.base import Config, plain
from data import metrics, pipeline
from training import report
from training.objective import Apply, Call, Experiment, Forward, Objective, rows_of


def load(config: Config, task: Any) -> tuple[dict[str, Any], Any, Any, Any]:
    """Encoded splits, and the model with a classification head."""
    model, params, names = models.load(
        num_labels=len(task.labels), seed=config.seed, **plain(config.model)
    )
    tokenizer = models.load_tokenizer(config.model.source)
    rows = {
        split: pipeline.tokenise(
            examples, tokenizer, labels=task.labels, max_length=config.data.max_length
        )
        for split, examples in task.splits.items()
    }
    return rows, model, params, names


def describe(experiment: Experiment) -> str:
    """Sizes of the splits and number of classes."""
    sizes = ", ".join(f"{len(rows.ids):,} {split}" for split, rows in experiment.rows.items())
    return f"{experiment.task.name}: {sizes}; {len(experiment.task.labels)} classes"


def train_batches(experiment: Experiment) -> pipeline.Batches:
    """The endless, seeded batches of the training split."""
    options = experiment.config.data
    return pipeline.train_batches(
        experiment.rows["train"],
        batch_size=options.batch_size,
        buckets=options.buckets,
        balance=options.balance,
        token_dropout=options.token_dropout,
        seed=experiment.config.seed,
    )


def call(apply: Apply) -> Call:
    """Logits (B, C) of a batch."""

    def run(variables: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        return apply(
            variables, batch["tokens"], batch["mask"], token_types=batch["token_types"], **options
        )

    return run


def cross_entropy(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The mean over a batch of the weighted cross-entropy with the labels."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return jax.numpy.mean(losses * batch["weight"])


def error_rate(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The share of a batch's rows whose likeliest class is not their label."""
    return jax.numpy.mean(logits.argmax(-1) != batch["label"])


def weight(batch: Mapping[str, jax.Array]) -> jax.Array:
    """How many rows a batch has."""
    return jax.numpy.asarray(float(batch["label"].shape[0]))


def predict(experiment: Experiment, run: Forward, argument: Any, split: str) -> np.ndarray:
    """run(argument, batch) for every row of the split, in order."""
    rows = rows_of(experiment, split)
    config = experiment.config.data
    batches = pipeline.eval_batches(rows, batch_size=config.eval_batch_size, buckets=config.buckets)
    values, indices = [], []
    for step in range(batches.steps_per_epoch):
        batch = batches[step]
        indices.append(batch.pop("index"))
        values.append(np.asarray(run(argument, batch)))
    return pipeline.in_order(values, indices)


def scores(experiment: Experiment, logits: np.ndarray, split: str) -> metrics.Scores:
    """Accuracy, macro-F1 and confusion matrix of the logits of a split."""
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
    embed = _embedding(experiment)
    splits = list(splits)
    features = {
        split: predict(experiment, embed, experiment.params, split)
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


def _embedding(experiment: Experiment) -> Callable[[Any, Mapping[str, Any]], jax.Array]:
    run = call(experiment.model.apply)
    return jax.jit(lambda params, batch: run({"params": params}, batch, method="embed"))


def finish(run: Experiment, folder: Path, state: Any, adapted: Forward) -> dict[str, Path]:
    """Score the adapted model on test against the baselines; write results.json and figure.png."""
    labels, split = run.task.labels, "test"
    probe = linear_probe(run, ["dev", split])
    floors = {"majority class": majority(run, "dev"), "linear probe": probe["dev"]}
    argument = (run.params, state.peft_state)
    results = {
        "majority class": majority(run, split),
        "linear probe": probe[split],
        "adapted": scores(run, predict(run, adapted, argument, split), split),
    }
    files = {"results": folder / "results.json", "figure": folder / "figure.png"}
    facts = {"split": split, "steps": int(state.step), "method": run.config.method.method}
    trainable = pefts.count(state.peft_state.trainable)
    report.save_results(
        files["results"], results, labels=list(labels), trainable=trainable, **facts
    )
    rows = report.read_rows(folder / "metrics.csv")
    report.figure(files["figure"], rows, floors, results["adapted"], labels)
    report.show_results(results, split)
    return files


OBJECTIVE = Objective(
    ("dev_accuracy", "dev_macro_f1"),
    load,
    describe,
    train_batches,
    call,
    cross_entropy,
    weight,
    predict,
    scores,
    finish,
    {"error_rate": error_rate},
)
