"""Losses that optax lacks.

    s(x) = x + 1  (x >= 0),  1 / (1 - x)  (x < 0)
    StableMax(x)_i = s(x_i) / sum_j s(x_j)

is softmax with s in place of exp: it grows linearly, so that probabilities neither round to one nor
their logarithms to zero while logits grow.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pefts import linalg


def stablemax(logits: Any, axis: int = -1) -> jax.Array:
    """StableMax s(x_i) / sum_j s(x_j), of the shape of the logits.

    Args:
      logits: x, floating, any shape.
      axis: of the classes.

    Returns:
      Probabilities in float32, or float64 where the logits are.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.losses import stablemax
      >>> stablemax(jnp.array([2.0, 0.0, 3.0])).tolist()
      [0.375, 0.125, 0.5]

    Source: Grokking at the Edge of Numerical Stability, arXiv 2501.04697.
    """
    s = _stretch(linalg.precise(logits))
    return s / jnp.sum(s, axis=axis, keepdims=True)


def log_stablemax(logits: Any, axis: int = -1) -> jax.Array:
    """log StableMax, by log s(x) = log1p(x) or -log1p(-x).

    Args:
      logits: x, floating, any shape.
      axis: of the classes.

    Returns:
      Log-probabilities in float32, or float64 where the logits are.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.losses import log_stablemax
      >>> round(float(log_stablemax(jnp.array([0.0, 0.0]))[0]), 4)
      -0.6931

    Source: Grokking at the Edge of Numerical Stability, arXiv 2501.04697.
    """
    x = linalg.precise(logits)
    above, below = _halves(x)
    log_s = jnp.where(x >= 0, jnp.log1p(above), -jnp.log1p(-below))
    return log_s - jnp.log(jnp.sum(_stretch(x), axis=axis, keepdims=True))


def stablemax_cross_entropy(logits: Any, labels: Any, axis: int = -1) -> jax.Array:
    """-log StableMax of the label, one number per example, as optax's losses are.

    Args:
      logits: x (..., C), or with the classes on another axis.
      labels: integers (...) from 0 to C - 1; the loss of others is NaN.
      axis: of the classes.

    Returns:
      Losses (...) in float32, or float64 where the logits are.

    Raises:
      ValueError: labels are no integers, or not of the logits' shape without the axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.losses import stablemax_cross_entropy
      >>> losses = stablemax_cross_entropy(jnp.array([[7.0, -1.0]]), jnp.array([0]))
      >>> losses.shape, round(float(losses[0]), 4)
      ((1,), 0.0606)

    Source: Grokking at the Edge of Numerical Stability, arXiv 2501.04697.
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels are {labels.dtype}: give integers, the index of each class.")
    shape = list(logits.shape)
    classes = shape.pop(axis)
    if list(labels.shape) != shape:
        raise ValueError(
            f"labels have shape {labels.shape}, logits {logits.shape} with classes on axis {axis}: "
            f"labels must be {tuple(shape)}."
        )
    outside = jnp.full_like(labels, classes)  # what take_along_axis gives no value
    at = jnp.expand_dims(jnp.where(labels < 0, outside, labels), axis)
    picked = jnp.take_along_axis(log_stablemax(logits, axis), at, axis, mode="fill")
    return -jnp.squeeze(picked, axis)


def _stretch(x: jax.Array) -> jax.Array:
    above, below = _halves(x)
    return jnp.where(x >= 0, 1 + above, 1 / (1 - below))


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x where it is not negative and where it is, zero elsewhere."""
    # The branch that is not taken must be finite too, or its gradient times zero is NaN (at x = 1);
    # and not by maximum, whose gradient at zero is a half.
    zero = jnp.zeros_like(x)
    return jnp.where(x >= 0, x, zero), jnp.where(x < 0, x, zero)
