"""Full fine-tuning of the targeted leaves, as one more row of the same table.

    W' = value         value has W's shape and starts as a float32 copy of W

`full` takes any leaf, `bitfit` the biases, `head_only` the output head. Trainable: their sizes.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, Rule, State
from pefts.core import Declaration, factory
from pefts.targets import HEADS, Select, Site, selection


@factory
def full(**select: Unpack[Select]) -> Declaration:
    """Train the targeted leaves themselves: W' = value, of W's shape, a float32 copy at first.

    Args:
      **select: targets (default: every leaf, biases and scales included), exclude; see
        pefts.targets.Select.

    Returns:
      A Peft; merging casts the values to the dtype of the leaves they replace.

    Raises:
      ValueError: no leaf matches.

    Example:
      >>> import jax, pefts
      >>> params = {"dense": {"kernel": jax.numpy.ones((6, 4)), "bias": jax.numpy.ones(4)}}
      >>> pefts.count(pefts.full().init(jax.random.key(0), params).trainable)
      28

    Source: the baseline of every paper in this package.
    """
    return replace_leaves(".", select)


@factory
def bitfit(**select: Unpack[Select]) -> Declaration:
    """Train the biases alone: b' = value, a float32 copy of b at first.

    Args:
      **select: targets (default: every leaf named bias), exclude; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact.

    Raises:
      ValueError: the model has no bias.

    Example:
      >>> import jax, pefts
      >>> params = {"dense": {"kernel": jax.numpy.ones((6, 4)), "bias": jax.numpy.ones(4)}}
      >>> pefts.count(pefts.bitfit().init(jax.random.key(0), params).trainable)
      4

    Source: BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
      Language-models, arXiv 2106.10199.
    """
    return replace_leaves(r"(^|/)bias$", select)


@factory
def head_only(**select: Unpack[Select]) -> Declaration:
    """Train the output head alone, a linear probe by gradient descent: W' = value, a copy at first.

    Args:
      **select: targets (default: leaves under classifier, lm_head, head, score, logits), exclude;
        see pefts.targets.Select.

    Returns:
      A Peft; merging is exact.

    Raises:
      ValueError: the model has no such head.

    Example:
      >>> import jax, pefts
      >>> head = {"kernel": jax.numpy.ones((6, 4))}
      >>> params = {"classifier": head, "body": jax.numpy.ones((2, 2))}
      >>> pefts.count(pefts.head_only().init(jax.random.key(0), params).trainable)
      24

    Source: the baseline of every paper in this package.
    """
    return replace_leaves(HEADS, select)


def replace_leaves(default: str, select: Select) -> Declaration:
    """What trains whole leaves: those that match `default` unless `select` has targets."""
    rule = Rule(_copy, _value, eager=True)
    return Declaration(rule, selection(default=default, whole=True, **select))


def _copy(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
    del key, stats
    return {"value": W.reshape(site.shape).astype(jnp.float32)}, {}


def _value(W: jax.Array, p: State, call: Call) -> jax.Array:
    del call
    return p["value"].reshape(W.shape)
