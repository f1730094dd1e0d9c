"""LISA: a few layers, drawn anew every K steps, beside the embeddings and the head.

    every K steps   gamma of L layers, all equally likely and none twice
    each step       AdamW on those, and on every leaf outside the layers; nothing elsewhere

A layer that is drawn again keeps its moments, one that was not at work before starts from zero.
State, with Adam: 2 gamma / L of the layers' size and twice that of the rest.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pefts.optimizers import active, projection


def lisa(
    learning_rate: Any,
    *,
    gamma: int = 2,
    interval: int = 20,
    inner: optax.GradientTransformation | None = None,
    weight_decay: Any = 0.0,
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """Layerwise importance sampled AdamW: W_l <- W_l - eta (Adam(G_l) + lambda W_l), l in gamma.

    NOTE(paper): the released code keeps the moments of every layer that was ever drawn, which in
      the end are those of all; here a layer that is drawn anew starts from zero.

    Args:
      learning_rate: eta, a number or an optax schedule of the update's number.
      gamma: layers at work, from 1 to all L of them (paper: 2).
      interval: K, updates between two draws (paper's code: 20).
      inner: the transformation of each layer and of the leaves outside (None:
        optax.scale_by_adam()).
      weight_decay: lambda, of what is at work (paper: 0). For some leaves only, put
        optax.add_decayed_weights(lambda, mask) behind `inner`; around lisa all would decay.
      seed: the draws are a function of it and of the interval's number.

    Returns:
      A transformation whose update needs params, with a `pefts.optimizers.active.ActiveState`;
      there is what counts as a layer, and what unrolled ones cost. optax.inject_hyperparams takes
      it with static_args=("gamma", "interval").

    Raises:
      ValueError: gamma or interval below 1; at init: gamma above L, no layers, stacks of different
        length.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.optimizers.lisa import lisa
      >>> params = {"layers": {"kernel": jnp.ones((8, 3, 2))}, "norm": {"scale": jnp.ones(3)}}
      >>> tx = lisa(0.1, gamma=2)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> int(jnp.count_nonzero(updates["layers"]["kernel"])) // 6, state[0].layers.count.shape
      (2, (2,))

    Source: LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model
      Fine-Tuning, arXiv 2403.17919.
    """
    active.check_steps("gamma", gamma)
    active.check_steps("interval", interval)

    def choose(window: Any, layers: int) -> jax.Array:
        active.check_at_most("gamma", gamma, layers)
        return draw(seed, window, (1 / layers,) * layers, gamma)

    policy = active.Policy(interval, choose, reset="joining", outside="active")
    tx = active.scale_by_units(active.decayed(inner, weight_decay), policy)
    return projection.with_rate(tx, learning_rate=learning_rate, weight_decay=0.0)


def draw(seed: Any, window: Any, probabilities: Sequence[float], gamma: int) -> jax.Array:
    """gamma different numbers, as drawn one after the other with these weights; sorted.

    The largest of log p + Gumbel noise are distributed as such draws without replacement are.
    """
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), window)
    with np.errstate(divide="ignore"):
        log_p = jnp.asarray(np.log(np.asarray(probabilities, np.float64)), jnp.float32)
    noise = jax.random.gumbel(key, log_p.shape, jnp.float32)
    return jnp.sort(jax.lax.top_k(log_p + noise, gamma)[1])
