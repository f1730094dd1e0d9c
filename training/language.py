"""Learning to write: packed rows of texts, the mean loss of learned tokens, perplexity."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import models
import pefts
from configs.base import Config, plain
from data import language
from data.pipeline import Batches
from training import evaluate, report, writing
from training.objective import Apply, Call, Experiment, Forward, Objective, rows_of


class Perplexity(NamedTuple):
    """How surprising the learned tokens of a split are.

    Attributes:
      loss: mean of -log p, natural logarithm.
      tokens: how many were predicted.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def summary(self) -> dict[str, float]:
        """The figures that tables and curves show, by name."""
        return {"loss": self.loss, "perplexity": self.perplexity}

    def record(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        return {**self._asdict(), "perplexity": self.perplexity}


def load(config: Config, task: Any) -> tuple[dict[str, Any], Any, Any, Any]:
    """Encoded splits, and the decoder.

    Raises:
      ValueError: a classification head or distillation of logits is asked for.
    """
    if config.head or config.distill.logits:
        raise ValueError(
            f"head={config.head}, distill.logits={config.distill.logits}: the language task "
            f"{task.name!r} has no classification head and no such distillation; set them to "
            "False and 0.0."
        )
    model, params, names = models.load(seed=config.seed, **plain(config.model))
    tokenizer = models.load_tokenizer(config.model.source)
    rows = {
        split: language.tokenise(texts, tokenizer, max_length=config.data.max_length)
        for split, texts in task.splits.items()
    }
    return rows, model, params, names


def describe(experiment: Experiment) -> str:
    """Tokens of the splits."""
    sizes = {split: sum(map(len, rows.ids)) for split, rows in experiment.rows.items()}
    counts = ", ".join(f"{count:,} {split}" for split, count in sizes.items())
    return f"{experiment.task.name}: tokens {counts}"


def train_batches(experiment: Experiment) -> Batches:
    """The endless, seeded, packed batches of the training split."""
    options = experiment.config.data
    return language.train_batches(
        experiment.rows["train"],
        length=options.max_length,
        batch_size=options.batch_size,
        seed=experiment.config.seed,
    )


def call(apply: Apply) -> Call:
    """-log p of every target of a batch, (B, T)."""

    def run(variables: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        return apply(
            variables,
            batch["tokens"],
            targets=batch["targets"],
            mask=batch["mask"],
            segments=batch["segments"],
            method="loss",
            **options,
        )

    return run


def loss(losses: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The mean over the learned tokens of a batch."""
    return jnp.sum(losses * batch["weight"]) / jnp.maximum(weight(batch), 1.0)


def weight(batch: Mapping[str, jax.Array]) -> jax.Array:
    """How many learned tokens a batch has."""
    return jnp.sum(batch["weight"])


def predict(experiment: Experiment, run: Forward, argument: Any, split: str) -> np.ndarray:
    """-log p of every learned token of the split, in order."""
    options = experiment.config.data
    batches = language.eval_batches(
        rows_of(experiment, split), length=options.max_length, batch_size=options.eval_batch_size
    )
    found = []
    for step in range(batches.steps_per_epoch):
        batch = batches[step]
        found.append(np.asarray(run(argument, batch))[batch["weight"] > 0])
    return np.concatenate(found)


def scores(experiment: Experiment, losses: np.ndarray, split: str) -> Perplexity:
    """Loss and perplexity of the losses of a split."""
    del experiment, split
    return Perplexity(float(np.mean(losses, dtype=np.float64)), len(losses))


def finish(run: Experiment, folder: Path, state: Any, adapted: Forward) -> dict[str, Path]:
    """Score the adapted model on test beside the base; write results.json and figure.png."""
    split = "test" if "test" in run.rows else "dev"
    base = evaluate.forward(run)
    results = {
        "base": evaluate.score(run, base, run.params, split),
        "adapted": evaluate.score(run, adapted, (run.params, state.peft_state), split),
    }
    floor = evaluate.score(run, base, run.params, "dev").summary()["loss"]
    files = {"results": folder / "results.json", "figure": folder / "figure.png"}
    facts = {"split": split, "steps": int(state.step), "method": run.config.method.method}
    trainable = pefts.count(state.peft_state.trainable)
    report.save_results(files["results"], results, trainable=trainable, **facts)
    rows = report.read_rows(folder / "metrics.csv")
    report.language_figure(files["figure"], rows, floor)
    report.show_results(results, split)
    return files


OBJECTIVE = Objective(
    ("dev_loss", "dev_perplexity"),
    load,
    describe,
    train_batches,
    call,
    loss,
    weight,
    predict,
    scores,
    finish,
    {},
    writing.write,
    lower_is_better=True,
)
