"""LoRA-FA: LoRA with frozen A, whose B follows the gradient of the full kernel.

    g_B <- (A^T A + damping I)^-1 g_B / s^2        A (d_in, r), B (r, d_out), y = x W + s (x A) B

is the step of B for which s A g_B is nearest to the gradient of W. A gets zero updates, and has no
state: 2 r d_out numbers per kernel with Adam, instead of 2 r (d_in + d_out). Inside one jitted step
XLA drops the gradient of A, unless something in front of this (clipping) reads it.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pefts import linalg, targets
from pefts.optimizers import projection as subspaces
from pefts.optimizers.factors import (
    check_damping,
    check_params,
    damped_inverse,
    einsum,
    factor_pairs,
    like,
)
from pefts.optimizers.raw_adam import correct_bias, raw_adam

Scaling = float | Mapping[str, float]


def lora_fa(
    learning_rate: Any,
    *,
    scaling: Scaling,
    damping: Any = 1e-8,
    inner: optax.GradientTransformation | None = None,
    weight_decay: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-FA with weight decay and a learning rate; A neither moves nor decays.

    NOTE(paper): Hugging Face PEFT decays B after the step, B (1 - eta lambda); the difference is of
      order eta^2.

    Args:
      learning_rate: eta, a number or an optax schedule (Hugging Face PEFT: 1e-3).
      scaling, damping, inner: as in `scale_by_lora_fa`.
      weight_decay: lambda, of every leaf but A.

    Returns:
      A transformation of the trainable tree; its update needs params.

    Raises:
      ValueError: as `scale_by_lora_fa`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from pefts.optimizers.lora_fa import lora_fa
      >>> params = {"query/kernel": {"A": jnp.ones((6, 1)), "B": jnp.ones((1, 4))}}
      >>> tx = lora_fa(1e-3, scaling=16 / 1, weight_decay=0.01)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> updates["query/kernel"]["A"].any().item()
      False

    Source: LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning,
      arXiv 2308.03303.
    """
    behind = subspaces.with_rate(
        _inner_or_adam(inner), learning_rate=learning_rate, weight_decay=weight_decay
    )
    return scale_by_lora_fa(scaling=scaling, damping=damping, inner=behind)


def scale_by_lora_fa(
    *,
    scaling: Scaling,
    damping: Any = 1e-8,
    inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on (A^T A + damping I)^-1 g_B / s^2, and on all other leaves but A as they are.

    NOTE(paper): the projection of g_B is that of Hugging Face PEFT; without it LoRA-FA is
      optax.partition of any optimizer for B and optax.set_to_zero() for A.

    Args:
      scaling: s of every adapter, alpha / r or with rsLoRA alpha / sqrt(r); or {regular expression:
        s}, searched in the path of the kernel ("query/kernel"), of which the first to match counts.
      damping: added to the diagonal, from 0 (Hugging Face PEFT: 1e-8). Directions in which A is
        zero to rounding get no update: the inverse is a pseudo-inverse.
      inner: a transformation (None: Adam with eps 1e-6 before the correction of the bias, as in
        Hugging Face PEFT).

    Returns:
      A transformation; its state is that of optax.partition, in float32 or better and with
      optax.MaskedNode for A; its updates are in the gradients' dtype.

    Raises:
      ValueError: a scale is not above 0, damping is negative, or `inner` is no transformation; at
        init: the tree has no pair of factors, a pattern matches none, or none matches a pair; at
        update: no params.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from pefts.optimizers.lora_fa import scale_by_lora_fa
      >>> params = {"query/kernel": {"A": jnp.full((1, 1), 0.5), "B": jnp.ones((1, 1))}}
      >>> tx = scale_by_lora_fa(scaling={"query": 2.0}, damping=0.0, inner=optax.identity())
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["query/kernel"]["A"].item(), updates["query/kernel"]["B"].item()
      (0.0, 1.0)

    Source: LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning,
      arXiv 2308.03303.
    """
    _check_scaling(scaling)
    check_damping("damping", damping)
    inside = optax.partition(
        {"frozen": optax.set_to_zero(), "rest": _inner_or_adam(inner)}, _labels
    )

    def init(params: Any) -> Any:
        _scales(scaling, [pair.path for pair in factor_pairs(params)])
        return inside.init(linalg.precise_floats(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        check_params("lora_fa", params)
        full, (G, treedef) = (
            linalg.precise_floats(params),
            jax.tree.flatten(linalg.precise_floats(updates)),
        )
        factors, pairs = jax.tree.leaves(full), factor_pairs(updates)
        for pair, s in zip(pairs, _scales(scaling, [p.path for p in pairs]), strict=True):
            A, g = factors[pair.A], G[pair.B]
            inverse = damped_inverse(einsum("...ir,...is->...rs", A, A), damping)
            G[pair.B] = einsum("...rs,...so->...ro", inverse, g) / jnp.asarray(s, g.dtype) ** 2
        stepped, state = inside.update(treedef.unflatten(G), state, full, **extra)
        return like(stepped, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _inner_or_adam(
    inner: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    adam = optax.chain(raw_adam(eps=1e-6), correct_bias())
    return subspaces.inner_or_adam(adam if inner is None else inner)


def _labels(tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    frozen = {pair.A for pair in factor_pairs(tree)}
    return treedef.unflatten(["frozen" if n in frozen else "rest" for n in range(len(leaves))])


def _scales(scaling: Any, paths: list[str]) -> list[Any]:
    if not isinstance(scaling, Mapping):
        return [scaling] * len(paths)
    if not paths:  # an empty tree, by which optax learns where a state holds leaves like its
        return []
    for pattern in scaling:
        targets.match(pattern, paths, argument="scaling")
    for path in paths:
        if not any(re.search(pattern, path) for pattern in scaling):
            raise ValueError(
                f"scaling={dict(scaling)!r} has no scale for {path!r}: add a pattern, such as '.' "
                "at its end for all others."
            )
    return [targets.first(scaling.items(), path, None) for path in paths]


def _check_scaling(scaling: Any) -> None:
    for value in scaling.values() if isinstance(scaling, Mapping) else [scaling]:
        if isinstance(value, int | float) and not 0 < value < float("inf"):
            raise ValueError(f"scaling={scaling!r}: give s, alpha / r or alpha / sqrt(r), above 0.")
