"""AdaZeta's optimizer: MeZO with more and more queries, epoch by epoch.

    Q_e = min(max(floor(alpha e^beta), 1), Q_max),  e = floor(t / steps of an epoch), from 0
    beta = ln(N / alpha) / ln(E), so that alpha E^beta = N at the end of E epochs

It is meant for pefts.tensor_train, whose cores are few and small.
"""

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.zeroth_order import engine, estimator
from pefts.zeroth_order.engine import Rule, ZerothOrder
from pefts.zeroth_order.estimator import Sampling
from pefts.zeroth_order.mezo import NO_DECAY, decay_of


def adazeta(
    learning_rate: Any,
    *,
    steps: int,
    epoch_steps: int,
    final_queries: float = 20,
    growth: float = 0.85,
    max_queries: int = 15,
    weight_decay: float = 0.0,
    no_decay: str = NO_DECAY,
    **sampling: Unpack[Sampling],
) -> ZerothOrder:
    """theta <- theta - eta ((1/Q_e) sum_q g_q z_q + lambda theta), with Q_e from `schedule`.

    Args:
      learning_rate: eta (official script: 1e-4, constant).
      steps: of the whole run; with epoch_steps it gives E.
      epoch_steps: of one pass over the data.
      final_queries: N, what alpha e^beta reaches after E epochs (official script: 20).
      growth: alpha (official script: 0.85).
      max_queries: Q_max (official script: 15).
      weight_decay, no_decay, **sampling: as in `mezo`, but queries (eps: 1e-3).

    Returns:
      A `ZerothOrder`; one compiled program serves every Q.

    Raises:
      ValueError: a run of one epoch or less, numbers out of range, and what `mezo` refuses.

    Example:
      >>> from pefts.zeroth_order import adazeta
      >>> tx = adazeta(1e-4, steps=1600, epoch_steps=10, weight_decay=0.01)

    Source: AdaZeta: Adaptive Zeroth-Order Tensor-Train Adaption for Memory-Efficient Large
      Language Models Fine-Tuning, arXiv 2406.18060; schedule checked against its code.
    """
    if "queries" in sampling:
        raise ValueError("queries follow AdaZeta's schedule: set max_queries instead.")
    estimator.check_count("max_queries", max_queries)
    estimator.check_count("steps", steps)
    estimator.check_count("epoch_steps", epoch_steps)
    rate = exponent(steps / epoch_steps, final_queries, growth)
    # A table: float32 powers near a whole number would round to the one below.
    table = [schedule(e, rate, growth, max_queries) for e in range(-(-steps // epoch_steps))]

    def queries(count: jax.Array) -> jax.Array:
        epoch = jnp.minimum(count // epoch_steps, len(table) - 1)
        return jnp.asarray(table, jnp.int32)[epoch]

    how = estimator.options({**sampling, "queries": max_queries})
    decay = decay_of(weight_decay, no_decay)
    return engine.build(learning_rate, how, Rule(queries=queries), decay)


def exponent(epochs: float, final_queries: float, growth: float) -> float:
    """beta = ln(N / alpha) / ln(E).

    Raises:
      ValueError: E at most 1, or N or alpha not above 0.
    """
    if not epochs > 1:
        raise ValueError(
            f"the run has {epochs:g} epochs; AdaZeta's schedule divides by the logarithm of their "
            "number: train for more than one, or use mezo with a fixed number of queries."
        )
    for name, value in (("final_queries", final_queries), ("growth", growth)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r}: give a number above 0.")
    return math.log(final_queries / growth) / math.log(epochs)


def schedule(epoch: int, rate: float, growth: float, max_queries: int) -> int:
    """Q_e.

    >>> rate = exponent(160, 20, 0.85)
    >>> [schedule(e, rate, 0.85, 15) for e in (0, 3, 5, 10, 20, 40, 80, 100, 159)]
    [1, 1, 2, 3, 5, 8, 12, 14, 15]
    """
    grown = growth * float(epoch) ** rate if epoch else 0.0
    return min(max(math.floor(grown), 1), max_queries)
