"""DoRA: a low-rank update of a kernel's direction, and a trained magnitude per output unit.

    V = W + A B                      A (d_in, r), B (r, d_out)
    y = (m / c) * (x V)              c_j = ||V[:, j]||, m (d_out,)

c is a constant for the gradient (paper, section 4.3). The update of the direction is LoRA's, with
s = alpha / r inside B, or that of any other additive low-rank method (`direction`), with its
trained and frozen arrays, its data, its penalty and its schedule. m starts as the column norms of
the V that it starts with, so where the update leaves W unchanged at step 0, so does this, up to
rounding. The norms come from
    c_j^2 = ||W_j||^2 + 2 (W^T A)_j . B_j + B_j . (A^T A) B_j
without a product of the kernel's size. A column of zeros has m = 0 and stays zero.
Trainable: r (d_in + d_out) + d_out per kernel with LoRA's direction; d_out beside any other's.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, Rule, State, matmul
from pefts.core import SHARED, Declaration, PeftState, PenaltyFn, UpdateFn, factory
from pefts.low_rank import additive
from pefts.methods.lora import check_dropout, check_rank, drop, factors, scaling
from pefts.targets import Select, Site, selection

MAGNITUDE = "m"


@factory
def dora(
    rank: int = 8,
    alpha: float = 8.0,
    *,
    rslora: bool = False,
    dropout: float = 0.0,
    direction: Mapping[str, Any] | None = None,
    **select: Unpack[Select],
) -> Declaration:
    """Weight-decomposed low-rank adaptation: y = (m / c) * (x W + s (x A) B).

    A (d_in, r), B (r, d_out), m (d_out,); c (d_out,) holds the column norms of W + s A B, through
    which no gradient flows. The module's bias is not scaled.

    Args:
      rank: r, from 1 to the kernel's smaller side (Hugging Face PEFT: 8; the paper: 16 and 32).
      alpha: s = alpha / r (Hugging Face PEFT: 8; the paper: 2 r).
      rslora: s = alpha / sqrt(r) instead.
      dropout: probability of dropping an input of the adapter, that is, of everything that the
        adapted product adds to x W; active in calls that are given a "dropout" random stream.
      direction: config of the method that updates the direction in LoRA's place, for instance
        {"method": "pissa", "rank": 8}: any whose change of a kernel is a low-rank product. The four
        arguments above are LoRA's and stay at their defaults then; targets, exclude, patterns and
        axes are given to dora.
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, (m / c) * (W + s A B) column by column.

    Raises:
      ValueError: rank out of range, dropout outside [0, 1), no kernel matches, or a direction that
        is no config of an additive method without dropout, or is given beside LoRA's arguments.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.dora(rank=2).init(jax.random.key(0), params).trainable)
      24

    Source: DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353.
    """
    check_rank(rank)
    check_dropout(dropout)
    if direction is not None:
        given = {"rank": rank, "alpha": alpha, "rslora": rslora, "dropout": dropout}
        return with_magnitude(_declared(direction, given, select))

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del W, stats
        return factors(key, site), {"scale": jnp.float32(scaling(site, rslora))}

    def low_rank(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
        del call
        return p["A"], p["B"] * p["scale"].astype(p["B"].dtype)

    chosen = selection(**select)
    return with_magnitude(
        Declaration(additive(start, low_rank), chosen, rank=rank, alpha=alpha), dropout
    )


def with_magnitude(direction: Declaration, dropout: float = 0.0) -> Declaration:
    """The method whose kernel is (m / c) * V, V = W + A B the kernel of `direction`."""
    begin, product = direction.rule.init, direction.rule.factors
    if product is None or direction.rule.uses_key:
        raise ValueError(
            "direction: this method does not change a kernel by adding a low-rank product without "
            "dropout, which is what DoRA can normalise. Leave it out for LoRA's direction."
        )
    changed = not direction.traits.identity_at_init
    if changed and direction.init_shared is not None:
        raise ValueError(
            "direction: this method changes the kernels at step 0 by arrays that they share, so "
            "that no kernel alone gives its first magnitude; it cannot be combined with DoRA."
        )

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        trainable, frozen = begin(key, W, site=site, stats=stats)
        if MAGNITUDE in {**trainable, **frozen}:
            raise ValueError(
                f"direction: its state has an array {MAGNITUDE!r} of its own, which is DoRA's name "
                "for the magnitude; it cannot be combined with DoRA."
            )
        V = W.astype(jnp.float32)
        if changed:
            A, B = product({**trainable, **frozen}, Call())
            V = V + (A @ B).astype(V.dtype)
        return {**trainable, MAGNITUDE: jnp.linalg.norm(V, axis=0)}, frozen

    def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
        A, B = (factor.astype(W.dtype) for factor in product(p, call))
        V = W + A @ B
        c = jnp.linalg.norm(jax.lax.stop_gradient(V), axis=0)
        floor = jnp.finfo(V.dtype).tiny
        return V * (p[MAGNITUDE].astype(V.dtype) / jnp.maximum(c, floor))[None]

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        A, B = product(p, call)
        c = norms(call.dense(W), A, B)
        gain = p[MAGNITUDE].astype(c.dtype) / c
        dropped = drop(x, dropout, call.key)
        y = _times(call.dot(dropped, W) + matmul(call.dot(dropped, A), B), gain)
        # The base product keeps every input; what dropout takes away is the adapter's change alone.
        return y if dropped is x else y + call.dot(x - dropped, W)

    return direction._replace(
        rule=Rule(start, effective, linear, through_dot=True, uses_key=dropout > 0),
        traits=dataclasses.replace(direction.traits, stochastic=dropout > 0),
        penalty=direction.penalty and _penalty(direction.penalty),
        update=direction.update and _update(direction.update),
    )


def norms(W: jax.Array, A: jax.Array, B: jax.Array) -> jax.Array:
    """c (d_out,): the column norms of W + A B in float32 or better, a constant for the gradient.

    The norms of W are taken anew at each call: that is one more reading of W, and a stored copy
    would be wrong where the base is cast, quantised, trained or adapted by a method before this.
    """
    W = jax.lax.stop_gradient(W.astype(_float32_or_better(W.dtype)))
    A, B = (jax.lax.stop_gradient(factor).astype(W.dtype) for factor in (A, B))
    exact = jax.lax.Precision.HIGHEST
    own = jnp.sum(W * W, axis=0)
    cross = jnp.sum(jnp.matmul(A.T, W, precision=exact) * B, axis=0)
    gram = jnp.matmul(A.T, A, precision=exact)
    update = jnp.sum(jnp.matmul(gram, B, precision=exact) * B, axis=0)
    squared = own + 2 * cross + update
    # Below eps ||W_j||^2 the sum is nothing but its own rounding.
    info = jnp.finfo(W.dtype)
    return jnp.sqrt(jnp.maximum(jnp.maximum(squared, info.eps * own), info.tiny))


def _times(y: jax.Array, gain: jax.Array) -> jax.Array:
    """y * gain, unrounded: in bfloat16 a gain's rounding is an error that all tokens share."""
    dtype = _float32_or_better(y.dtype)
    gain = gain.astype(dtype).reshape((1,) * (y.ndim - 1) + gain.shape)
    return (y.astype(dtype) * gain).astype(y.dtype)


def _float32_or_better(dtype: Any) -> Any:
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


# A direction of its own


def _declared(
    direction: Mapping[str, Any], given: Mapping[str, Any], select: Mapping[str, Any]
) -> Declaration:
    """The direction's declaration, on the kernels that DoRA selects."""
    # The registry lists this method too.
    from pefts.registry import declare

    if not isinstance(direction, Mapping):
        raise ValueError(
            f"direction={direction!r}: give a method's config, such as "
            '{"method": "pissa", "rank": 8}.'
        )
    defaults = inspect.signature(dora).parameters
    for name, value in given.items():
        if value != defaults[name].default:
            raise ValueError(
                f"{name}={value!r} beside direction={dict(direction)!r}: {name} is of LoRA, whose "
                "place the direction takes; leave it out, and give the direction its own."
            )
    for name in sorted(set(direction) & set(Select.__annotations__)):
        raise ValueError(
            f"direction: {name!r} says which kernels are adapted; give it to dora itself."
        )
    return declare({**direction, **select})


def _penalty(inner: PenaltyFn) -> PenaltyFn:
    return lambda state, params=None: inner(_without_magnitudes(state), params)


def _update(inner: UpdateFn) -> UpdateFn:
    def update(state: PeftState, grads: Any, step: jax.Array) -> PeftState:
        gradient = _without_magnitudes(PeftState(grads, {})).trainable
        new = inner(_without_magnitudes(state), gradient, step)
        magnitudes = {
            path: {MAGNITUDE: group[MAGNITUDE]}
            for path, group in state.trainable.items()
            if path != SHARED
        }
        trainable = {
            path: {**new.trainable.get(path, {}), **magnitudes.get(path, {})}
            for path in {**magnitudes, **new.trainable}
        }
        return new._replace(trainable=trainable)

    return update


def _without_magnitudes(state: PeftState) -> PeftState:
    """The direction's own state, as it would be without DoRA."""
    bare = {
        path: {name: leaf for name, leaf in group.items() if path == SHARED or name != MAGNITUDE}
        for path, group in state.trainable.items()
    }
    return state._replace(trainable={path: group for path, group in bare.items() if group})
