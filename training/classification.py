"""Classifying texts or images: labelled rows, cross-entropy, accuracy, baselines to beat."""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import models
import pefts
from configs.base import Config, plain
from data import image_batches, metrics, pipeline
from data.images import ImageTask
from training import report
from training.objective import Apply, Call, Experiment, Forward, Objective, rows_of


class Kind(NamedTuple):
    """What is classified: how it is made into batches, and what of a batch the model is given.

    Attributes:
      rows: (config, task, model) -> encoded splits, each with `labels`.
      train_batches: (rows, config) -> endless batches.
      eval_batches: (rows, config) -> one pass, with "index".
      positional: entries of a batch that the model is called with, in this order.
      named: those that it is given by their names.
    """

    rows: Callable[[Config, Any, Any], dict[str, Any]]
    train_batches: Callable[[Any, Config], pipeline.Batches]
    eval_batches: Callable[[Any, Config], pipeline.Batches]
    positional: tuple[str, ...]
    named: tuple[str, ...] = ()


def load(kind: Kind, config: Config, task: Any) -> tuple[dict[str, Any], Any, Any, Any]:
    """Encoded splits, and the model with a classification head."""
    model, params, names = models.load(
        num_labels=len(task.labels), seed=config.seed, **plain(config.model)
    )
    return kind.rows(config, task, model), model, params, names


def describe(experiment: Experiment) -> str:
    """Sizes of the splits and number of classes."""
    sizes = ", ".join(f"{len(rows.labels):,} {split}" for split, rows in experiment.rows.items())
    return f"{experiment.task.name}: {sizes}; {len(experiment.task.labels)} classes"


def train_batches(kind: Kind, experiment: Experiment) -> pipeline.Batches:
    """The endless, seeded batches of the training split."""
    return kind.train_batches(experiment.rows["train"], experiment.config)


def call(kind: Kind, apply: Apply) -> Call:
    """Logits (B, C) of a batch."""

    def run(variables: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        inputs = [batch[entry] for entry in kind.positional]
        named = {entry: batch[entry] for entry in kind.named}
        return apply(variables, *inputs, **named, **options)

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


def predict(
    kind: Kind, experiment: Experiment, run: Forward, argument: Any, split: str
) -> np.ndarray:
    """run(argument, batch) for every row of the split, in order."""
    batches = kind.eval_batches(rows_of(experiment, split), experiment.config)
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
    """Logistic regression on the frozen base's vectors; its strength is chosen on dev."""
    embed = _embedding(experiment)
    splits = list(splits)
    features = {
        split: experiment.objective.predict(experiment, embed, experiment.params, split)
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
    run = experiment.objective.call(experiment.model.apply)
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
        "adapted": scores(run, run.objective.predict(run, adapted, argument, split), split),
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


def _encoded_texts(config: Config, task: Any, model: Any) -> dict[str, pipeline.Rows]:
    del model
    tokenizer = models.load_tokenizer(config.model.source)
    return {
        split: pipeline.tokenise(
            examples, tokenizer, labels=task.labels, max_length=config.data.max_length
        )
        for split, examples in task.splits.items()
    }


def _text_batches(rows: pipeline.Rows, config: Config) -> pipeline.Batches:
    options = config.data
    return pipeline.train_batches(
        rows,
        batch_size=options.batch_size,
        buckets=options.buckets,
        balance=options.balance,
        token_dropout=options.token_dropout,
        seed=config.seed,
    )


def _text_pass(rows: pipeline.Rows, config: Config) -> pipeline.Batches:
    options = config.data
    return pipeline.eval_batches(rows, batch_size=options.eval_batch_size, buckets=options.buckets)


def _prepared_images(
    config: Config, task: ImageTask, model: Any
) -> dict[str, image_batches.ImageRows]:
    sizes = model.config
    if not hasattr(sizes, "image_size"):
        raise ValueError(
            f"model.source={config.model.source!r} is a {sizes.model_type}, and task {task.name!r} "
            "has images: choose a vision transformer, such as 'tiny-vit'."
        )
    return {
        split: image_batches.prepare(
            images,
            classes=len(task.labels),
            size=sizes.image_size,
            tokens=sizes.num_tokens,
            channels=sizes.num_channels,
            mean=config.data.mean,
            std=config.data.std,
        )
        for split, images in task.splits.items()
    }


def _image_batches(rows: image_batches.ImageRows, config: Config) -> pipeline.Batches:
    options = config.data
    return image_batches.train_batches(
        rows,
        batch_size=options.batch_size,
        balance=options.balance,
        augmentation=image_batches.Augmentation(options.shift, options.flip),
        seed=config.seed,
    )


def _image_pass(rows: image_batches.ImageRows, config: Config) -> pipeline.Batches:
    return image_batches.eval_batches(rows, batch_size=config.data.eval_batch_size)


def _objective(kind: Kind) -> Objective:
    return Objective(
        ("dev_accuracy", "dev_macro_f1"),
        functools.partial(load, kind),
        describe,
        functools.partial(train_batches, kind),
        functools.partial(call, kind),
        cross_entropy,
        weight,
        functools.partial(predict, kind),
        scores,
        finish,
        {"error_rate": error_rate},
    )


TEXTS = Kind(
    _encoded_texts,
    _text_batches,
    _text_pass,
    positional=("tokens", "mask"),
    named=("token_types",),
)
IMAGES = Kind(_prepared_images, _image_batches, _image_pass, positional=("images",))
OBJECTIVE = _objective(TEXTS)
IMAGE_OBJECTIVE = _objective(IMAGES)
