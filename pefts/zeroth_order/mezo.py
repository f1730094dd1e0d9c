"""MeZO: fine-tuning by forward passes alone, in the memory of inference.

    g_q = (L(theta + eps z_q) - L(theta - eps z_q)) / (2 eps),  z_q ~ N(0, I)
    theta <- theta - eta ((1/Q) sum_q g_q z_q + lambda theta)

L is any scalar of the parameters, differentiable or not. State: a key and a few scalars.
"""

import functools
import re
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from pefts.optimizers.decay import leaf_paths
from pefts.zeroth_order import directions, engine, estimator
from pefts.zeroth_order.engine import Rule, ZerothOrder
from pefts.zeroth_order.estimator import Sampling

NO_DECAY = r"(bias|norm|scale)"  # the paper's code spares biases and layer norms
MASKS = 2**31 - 1
RULES = ("sgd", "sign", "conservative", "momentum", "adam", "sign_full")


def mezo(
    learning_rate: Any,
    *,
    rule: str = "sgd",
    sparsity: float = 0.0,
    weight_decay: float = 0.0,
    no_decay: str = NO_DECAY,
    **sampling: Unpack[Sampling],
) -> ZerothOrder:
    """Memory-efficient zeroth-order SGD: theta <- theta - eta (mean_q g_q z_q + lambda theta).

    The paper's code walks theta to +eps, -eps and back, which drifts in low precision; here theta
    does not change until the update.

    Args:
      learning_rate: eta, a number or an optax schedule (paper: constant; 1e-6 for all parameters,
        1e-4 for LoRA, 1e-2 for prefixes).
      rule: "sgd"; "sign", of g_q alone, z_q as it is; "conservative", the best of theta, the step
        and its opposite on the same batch (Q = 1); and, with a dense gradient's memory, "momentum"
        (0.9), "adam" and "sign_full" (of every entry) as optax has them.
      sparsity: share of all entries that never move, chosen at random once, by the run's seed; not
        for rules with a dense gradient.
        NOTE(paper): ZO-Bench's code compares normal numbers with the share and spares another one.
      weight_decay: lambda, coupled to eta (paper: 0).
      no_decay: pattern of the paths it spares (paper: biases and layer norms).
      **sampling: eps (paper: 1e-3; LoRA 1e-2, prefix 1e-1), queries (1), sides ("two"),
        distribution, parallel, seed; see pefts.zeroth_order.estimator.Sampling.

    Returns:
      A `ZerothOrder`: an optax transformation whose update takes value_fn, and `step`, in place.
      An update of which some value is not finite changes nothing and counts as skipped.

    Raises:
      ValueError: an unknown rule or name, a number out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.zeroth_order import mezo
      >>> tx, theta = mezo(0.1), jnp.ones(3)
      >>> state = tx.init(theta)
      >>> for _ in range(100):
      ...     theta, state = tx.step(theta, state, lambda theta: jnp.sum(theta**2))
      >>> bool(jnp.sum(theta**2) < 0.1)
      True

    Source: Fine-Tuning Language Models with Just Forward Passes, arXiv 2305.17333; the rules:
      Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning, arXiv 2402.11592.
    """
    how = estimator.options(sampling)
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; choose one of {RULES}.")
    if rule == "conservative" and how.queries != 1:
        raise ValueError(f"rule='conservative' tries one direction; queries={how.queries}.")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r}: give the share that stays, from 0 to below 1.")
    if rule in ("momentum", "adam", "sign_full"):
        if sparsity:
            raise ValueError(f"sparsity={sparsity!r} has no part in rule={rule!r}; leave it out.")
        return engine.through(_chain(rule, learning_rate, weight_decay, no_decay), how)
    steps = Rule(signed=rule == "sign", conservative=rule == "conservative")
    if sparsity:
        steps = steps._replace(
            prepare=functools.partial(_mask_keys, how.seed),
            mask=functools.partial(_is_chosen, sparsity),
        )
    return engine.build(learning_rate, how, steps, decay_of(weight_decay, no_decay))


def _mask_keys(seed: int, theta: Any) -> Any:
    """A key for each leaf, or for each layer of a stacked one, uint32 (..., 2)."""
    # No step of a run has this number, so that no direction is drawn from the same key.
    root = directions.fold_in(directions.run_key(seed), MASKS)

    def one(leaf: directions.Leaf, value: jax.Array) -> jax.Array:
        key = directions.fold_in(root, max(leaf.index, 0))
        if not leaf.stacked:
            return key
        return jax.vmap(directions.fold_in, (None, 0))(key, jnp.arange(value.shape[0]))

    values, treedef = jax.tree.flatten(theta)
    return treedef.unflatten(
        [one(*pair) for pair in zip(directions.leaves_of(theta), values, strict=True)]
    )


def _is_chosen(sparsity: float, value: jax.Array, key: jax.Array) -> jax.Array:
    key = jax.random.wrap_key_data(key, impl=directions.IMPL)
    return jax.random.bernoulli(key, 1 - sparsity, value.shape)


def decay_of(weight_decay: float, no_decay: str) -> engine.Decay | None:
    """Decay of the paths in which the pattern is not found; None for a rate of zero."""
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay={weight_decay!r}: give a number from 0.")
    spared = re.compile(no_decay)
    if weight_decay == 0:
        return None
    return engine.Decay(weight_decay, lambda path: bool(spared.search(path)))


def _chain(
    rule: str, learning_rate: Any, weight_decay: float, no_decay: str
) -> optax.GradientTransformation:
    direction = {
        "momentum": lambda: optax.trace(0.9),
        "adam": optax.scale_by_adam,
        "sign_full": optax.scale_by_sign,
    }[rule]()
    decay = decay_of(weight_decay, no_decay)
    parts = [direction]
    if decay is not None:
        parts.append(
            optax.add_decayed_weights(
                weight_decay,
                lambda tree: jax.tree.map(lambda path: not decay.spared(path), leaf_paths(tree)),
            )
        )
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
