"""From a config to everything a run needs: model, task, batches, method, optimizer."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax

import data
import models
import pefts
from configs.base import Config, plain
from data.images import ImageTask
from data.pipeline import Batches
from data.written import LanguageTask
from pefts import core, optimizers, targets
from pefts.optimizers import decay
from pefts.zeroth_order import ZerothOrder
from training import checkpoint, classification, language
from training.objective import Experiment, Objective

HEAD = r"(^|/)classifier/"
NUMBERS = ("learning_rate", "weight_decay", "clip_norm")  # of the optimizer's section


def build(config: Config) -> Experiment:
    """Load data and model and make the method; nothing is trained or written."""
    options = plain(config.task)
    task = data.load(options.pop("name"), **options)
    objective = _objective(task)
    rows, model, params, names = objective.load(config, task)
    axes = pefts.infer_axes(model.apply, params, *models.example(model))
    peft = method(config, axes)
    return Experiment(config, task, rows, model, params, names, peft, objective)


def _objective(task: Any) -> Objective:
    if isinstance(task, LanguageTask):
        return language.OBJECTIVE
    if isinstance(task, ImageTask):
        return classification.IMAGE_OBJECTIVE
    return classification.OBJECTIVE


def load_run(folder: Path, adapter: Path | None = None) -> tuple[Experiment, pefts.PeftState]:
    """The experiment of a run's folder with the method of its adapter file, and the adapter.

    Args:
      folder: what train.py was given.
      adapter: a file; the folder's adapter.safetensors if None.

    Raises:
      ValueError: the folder holds no run, or the file no adapter of its base.
    """
    run = build(checkpoint.read_config(folder))
    peft, state = pefts.load(adapter or folder / "adapter.safetensors", run.params)
    return run._replace(peft=peft), state


def method(config: Config, axes: Mapping[str, str]) -> pefts.Peft:
    """The configured method, with the classification head trained beside it if `config.head`."""
    adapter = pefts.from_config({**plain(config.method), "axes": dict(axes)})
    if not config.head:
        return adapter
    return pefts.chain(pefts.full(targets=HEAD), adapter)


def statistics(experiment: Experiment, batches: Iterable[Any]) -> Any:
    """What the method has to know of the data before it starts; None for most methods.

    Args:
      experiment: its method says which statistics.
      batches: the first training batches, placed on the devices.
    """
    needs = set(experiment.peft.traits.needs) - {core.CONTEXT}
    if not needs:
        return None

    return pefts.calibrate(
        experiment.objective.call(experiment.model.apply),
        experiment.params,
        batches,
        experiment.peft,
        loss=experiment.objective.loss if needs & set(core.GRADIENTS) else None,
        weights="mask" if needs - set(core.GRADIENTS) else None,
    )


def total_steps(config: Config, batches: Batches) -> int:
    """`train.steps` if it is set, else `train.epochs` passes over the data."""
    return config.train.steps or max(1, round(config.train.epochs * batches.steps_per_epoch))


def optimizer(
    config: Config,
    trainable: Any,
    steps: int,
    restart_steps: tuple[int, ...] = (),
    epoch_steps: int | None = None,
    numbers: Mapping[str, Any] | None = None,
) -> optax.GradientTransformation:
    """Clipping, Adam, decay and learning-rate factors by pattern, and a schedule.

    A name other than "adamw" is looked up in pefts.OPTIMIZERS and given the schedule,
    `optimizer.options`, and where it asks for them the run's steps and epoch_steps, and that the
    schedule's ticks are updates. One that works
    by values alone gets no clipping in front of it. `numbers` stand in the place of the config's
    learning_rate, weight_decay or clip_norm, and may be traced.
    """
    options = config.optimizer
    chosen = {name: options[name] for name in NUMBERS} | dict(numbers or {})
    schedule = _schedule(options, steps, chosen["learning_rate"])
    clip = optax.clip_by_global_norm(chosen["clip_norm"])
    if options.name != "adamw":
        if restart_steps:
            raise ValueError(
                f"{config.method.method} clears the optimizer's moments after step "
                f"{restart_steps[0]}; that is built for optimizer.name='adamw', not "
                f"{options.name!r}."
            )
        factory = _named(options.name)
        known = {"steps": steps, "epoch_steps": epoch_steps or steps, "ticks": "updates"}
        asked = inspect.signature(factory).parameters.keys() & known.keys()
        facts = {name: known[name] for name in asked - set(options.options)}
        made = factory(schedule, **facts, **_built(plain(options.options)))
        return made if isinstance(made, ZerothOrder) else optax.chain(clip, made)
    factors = _by_pattern(plain(options.factors), trainable)
    return optax.chain(
        clip,
        optimizers.restart_at(optax.scale_by_adam(), restart_steps),
        optax.add_decayed_weights(
            chosen["weight_decay"], optimizers.decay_mask(tuple(options.no_decay))
        ),
        optax.stateless(lambda updates, _: jax.tree.map(jax.numpy.multiply, updates, factors)),
        optax.scale_by_learning_rate(schedule),
    )


def lowered(run: Experiment, tx: optax.GradientTransformation) -> Callable[..., jax.Array]:
    """What training lowers: (output of the call, batch) -> scalar.

    Raises:
      ValueError: train.value is unknown, or has no gradient and the optimizer needs one; a method
        that looks at gradients, with an optimizer that has none.
    """
    by_values, name = isinstance(tx, ZerothOrder), run.config.train.value
    if by_values and run.peft.traits.reads_gradients:
        raise ValueError(
            f"{run.config.method.method} decides by gradients, and optimizer.name="
            f"{run.config.optimizer.name!r} has none: choose another method or optimizer."
        )
    if name == "loss":
        return run.objective.loss
    if name not in run.objective.values:
        known = ["loss", *run.objective.values]
        raise ValueError(f"train.value={name!r} is unknown for this task; choose one of {known}.")
    if not by_values:
        raise ValueError(
            f"train.value={name!r} has no gradient, which optimizer.name="
            f"{run.config.optimizer.name!r} needs: choose one that works by values, such as 'mezo'."
        )
    return run.objective.values[name]


def _schedule(options: Any, steps: int, peak: Any) -> optax.Schedule:
    warmup = max(1, round(options.warmup * steps))
    if options.schedule == "cosine":
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(warmup + 1, steps))
        return lambda count: peak * shape(count)
    if options.schedule == "constant":
        return optax.constant_schedule(peak)
    raise ValueError(
        f"optimizer.schedule={options.schedule!r} is unknown; choose 'cosine' or 'constant' (which "
        "has no warm-up)."
    )


def _built(options: dict[str, Any]) -> dict[str, Any]:
    """The options, with a transformation in the place of the name of one under "inner"."""
    name = options.get("inner")
    if not isinstance(name, str):
        return options
    known = [n for n in dir(optimizers) + dir(optax) if n.startswith("scale_by_")]
    if name not in known:
        near = difflib.get_close_matches(name, known)
        raise ValueError(
            f"optimizer.options.inner={name!r} is none of the transformations of optax and pefts "
            f"that scale updates; near: {near}."
        )
    source = optimizers if hasattr(optimizers, name) else optax
    return {**options, "inner": getattr(source, name)()}


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
