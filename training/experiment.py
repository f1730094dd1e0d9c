"""From a config to everything a run needs: model, task, batches, method, optimizer."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

import data
import models
import pefts
from configs.base import Config
from data import pipeline
from pefts import core, optimizers, targets
from pefts.optimizers import decay

HEAD = r"(^|/)classifier/"


class Experiment(NamedTuple):
    """A config made concrete."""

    config: Config
    task: data.Task
    rows: dict[str, pipeline.Rows]  # encoded splits
    model: Any
    params: Any  # the frozen base, with a fresh classification head
    names: Any  # parameter path <-> Hugging Face name
    peft: pefts.Peft


def build(config: Config) -> Experiment:
    """Load data and model and make the method; nothing is trained or written."""
    options = plain(config.task)
    task = data.load(options.pop("name"), **options)
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
    tokens = np.zeros((1, min(config.data.buckets)), np.int32)
    axes = pefts.infer_axes(model.apply, params, tokens, np.ones_like(tokens))
    return Experiment(config, task, rows, model, params, names, method(config, axes))


def method(config: Config, axes: Mapping[str, str]) -> pefts.Peft:
    """The configured method, with the classification head trained beside it if `config.head`."""
    adapter = pefts.from_config({**plain(config.method), "axes": dict(axes)})
    if not config.head:
        return adapter
    return pefts.chain(pefts.full(targets=HEAD), adapter)


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


def statistics(experiment: Experiment, batches: Iterable[Any]) -> Any:
    """What the method has to know of the data before it starts; None for most methods.

    Args:
      experiment: its method says which statistics.
      batches: the first training batches, placed on the devices.
    """
    needs = set(experiment.peft.traits.needs) - {core.CONTEXT}
    if not needs:
        return None

    def forward(variables: Any, batch: Any) -> jax.Array:
        return experiment.model.apply(
            variables, batch["tokens"], batch["mask"], token_types=batch["token_types"]
        )

    return pefts.calibrate(
        forward,
        experiment.params,
        batches,
        experiment.peft,
        loss=cross_entropy if "gradient" in needs else None,
        weights="mask" if needs - {"gradient"} else None,
    )


def cross_entropy(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The mean over a batch of the weighted cross-entropy with the labels."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return jax.numpy.mean(losses * batch["weight"])


def total_steps(config: Config, batches: pipeline.Batches) -> int:
    """`train.steps` if it is set, else `train.epochs` passes over the data."""
    return config.train.steps or max(1, round(config.train.epochs * batches.steps_per_epoch))


def optimizer(
    config: Config, trainable: Any, steps: int, restart_steps: tuple[int, ...] = ()
) -> optax.GradientTransformation:
    """Clipping, Adam, decay and learning-rate factors by pattern, warm-up and cosine decay.

    A name other than "adamw" is looked up in pefts.OPTIMIZERS and given the schedule and
    `optimizer.options`.
    """
    options = config.optimizer
    warmup = max(1, round(options.warmup * steps))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, warmup, max(warmup + 1, steps)
    )
    clip = optax.clip_by_global_norm(options.clip_norm)
    if options.name != "adamw":
        if restart_steps:
            raise ValueError(
                f"{config.method.method} clears the optimizer's moments after step "
                f"{restart_steps[0]}; that is built for optimizer.name='adamw', not "
                f"{options.name!r}."
            )
        return optax.chain(clip, _named(options.name)(schedule, **plain(options.options)))
    factors = _by_pattern(plain(options.factors), trainable)
    return optax.chain(
        clip,
        optimizers.restart_at(optax.scale_by_adam(), restart_steps),
        optax.add_decayed_weights(
            options.weight_decay, optimizers.decay_mask(tuple(options.no_decay))
        ),
        optax.stateless(lambda updates, _: jax.tree.map(jax.numpy.multiply, updates, factors)),
        optax.scale_by_learning_rate(schedule),
    )


def _named(name: str) -> Any:
    if name not in optimizers.OPTIMIZERS:
        known = ["adamw", *optimizers.OPTIMIZERS]
        near = difflib.get_close_matches(name, known)
        raise ValueError(f"optimizer.name={name!r} is unknown; near {near}, all: {known}.")
    return optimizers.OPTIMIZERS[name]


def _by_pattern(patterns: Mapping[str, float], tree: Any) -> Any:
    """A tree of one number per leaf: that of the first pattern found in its path, else 1."""
    names = decay.leaf_paths(tree)
    for pattern in patterns:
        targets.match(pattern, jax.tree.leaves(names), argument="optimizer pattern")
    return jax.tree.map(lambda name: targets.first(patterns.items(), name, 1.0), names)


def plain(section: Any) -> Any:
    """A config section as the dicts and lists that JSON would give back."""
    if isinstance(section, ConfigDict | dict):
        return {name: plain(value) for name, value in section.items()}
    if isinstance(section, tuple | list):
        return [plain(value) for value in section]
    return section
