"""IncreLoRA: kernels start at rank 1, and those that matter most grow, up to one sum of ranks.

    y = x W + s ((drop(x) A) * e) B     A (d_in, r), e (r,), B (r, d_out), s = alpha / (R + 1e-5)

r is the largest rank a kernel may reach, R <= r the one it has. Behind the R active components lie
`add` reserves, whose e is held at 1e-5 while their A and B learn; the rest is zero. After each
optimizer step t, until the ranks' sum is the target,

    S = sum |dW * dL/dW| / sqrt(d_in d_out)              dW = s A diag(e) B
    S' <- b1 S' + (1 - b1) S,   U <- b2 U + (1 - b2) |S - S'|

and every `interval` steps the `top_h` kernels with the largest S' U turn their reserves into active
components and get new ones. At the target the e of what is left in reserve becomes zero.
"""

import math
from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, Rule, State, matmul
from pefts.core import Declaration, Params, PeftState, Traits, factory
from pefts.methods.lora import check_dropout, drop
from pefts.rank_growth import (
    ALWAYS,
    FACTORS,
    ByPath,
    Schedule,
    active,
    advanced,
    below,
    check_target,
    plan_of,
)
from pefts.targets import Select, Site, selection


@factory
def increlora(
    target_rank: float = 8,
    max_rank: int = 16,
    alpha: float = 16.0,
    *,
    growth: tuple[int, int | None] = (4, None),
    schedule: tuple[int, int, int] = (100, 100, 0),
    betas: tuple[float, float] = (0.85, 0.85),
    gamma: float = 0.1,
    dropout: float = 0.0,
    score: str = "sqrt",
    **select: Unpack[Select],
) -> Declaration:
    """Incremental allocation: y = x W + s ((x A) * e) B, A (d_in, r), e (r,), B (r, d_out).

    NOTE(paper): `update` sees the gradients of A, B and e, which determine the sums of dW * dL/dW
      along rows and along columns, not its entries. S is the least sum of absolute values that
      these allow, max(sum |row sums|, sum |column sums|); `update_from_dense` has the paper's.

    Args:
      target_rank: the average rank of a kernel at the end, from 1; a fraction is allowed as long
        as its sum over kernels is what is meant after rounding (official scripts: 2 to 8).
      max_rank: r, which no kernel outgrows, reserves included (official code: no limit).
      alpha: s = alpha / (R + 1e-5), which falls where R grows (official scripts: 16 to 32).
      growth: (top_h, add), the kernels that grow at a time, and by how much each (official scripts:
        top_h 2 to 9). add None: half of target_rank (official code: 1, 2, 3, 4 for 2, 4, 6, 8).
      schedule: (warmup, interval, ramp): ranks grow after step `warmup`, where `interval` divides
        the step (official scripts: 100 to 1000 both); a new component's steps are shortened, rising
        linearly to their full length over `ramp` steps (official multi_lr; 0: never shortened).
      betas: (b1, b2), of the smoothed score and of its uncertainty (0.85 both).
      gamma: weight of the penalty, the mean of |1 - ||v||^2| over A's columns and B's rows, active
        and in reserve (official scripts: 0.1 to 0.3).
      dropout: probability of dropping an input of the adapter; active in calls that are given a
        "dropout" random stream (official scripts: 0 to 0.3).
      score: "sqrt" divides S by sqrt(d_in d_out) (official code), "mean" by d_in d_out.
      **select: targets, exclude, rank_pattern (max_rank), alpha_pattern, axes; see
        pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + s A diag(e) B. Training needs its `penalty` and `update`.

    Raises:
      ValueError: a target below 1 or above the largest ranks' average, a number out of range, an
        unknown score, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> peft = pefts.increlora(target_rank=2, max_rank=3)
      >>> pefts.count(peft.init(jax.random.key(0), params).trainable)
      33

    Source: IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning,
      arXiv 2308.12043.
    """
    plan = plan_of(target_rank, growth, schedule, betas, gamma, score)
    check_dropout(dropout)
    if not isinstance(max_rank, int) or isinstance(max_rank, bool) or max_rank < 1:
        raise ValueError(f"max_rank={max_rank!r}: give a positive integer, such as 16.")

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        h = call.dot(drop(x, dropout, call.key), p["A"])
        weight = (_scale(p, p["A"].dtype) * _learning(p)).astype(h.dtype)
        h = h * weight.reshape((1,) * (h.ndim - 1) + weight.shape)
        return call.dot(x, W) + matmul(h, p["B"])

    def penalty(state: PeftState, params: Params | None = None) -> jax.Array:
        del params
        return plan.gamma * _mean_distance(state.trainable, state.frozen)

    def update(state: PeftState, grads: Any, step: jax.Array) -> PeftState:
        return advanced(state, scores(state, grads, plan), jnp.asarray(step, jnp.int32), plan)

    def shared(key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict, dict]:
        check_target(plan, max_rank, sites)
        return {}, {"seed": jax.random.bits(key, (), jnp.uint32)}

    return Declaration(
        rule=Rule(
            _start, _effective, linear, factors=_factors, through_dot=True, uses_key=dropout > 0
        ),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0, reads_gradients=True),
        rank=max_rank,
        alpha=alpha,
        init_shared=shared,
        penalty=penalty,
        update=update,
    )


def update_from_dense(
    config: Mapping[str, Any], state: PeftState, gradients: Mapping[str, jax.Array], step: jax.Array
) -> PeftState:
    """`Peft.update` by the paper's score, for who has the gradients of the whole kernels.

    Args:
      config: Peft.config.
      state: the state after the optimizer's step.
      gradients: {path: dL/dW (*stack, d_in, d_out)} at the parameters before that step.
      step: the number of updates before this one.
    """
    names = ("target_rank", "growth", "schedule", "betas", "gamma", "score")
    plan = plan_of(*(config[name] for name in names))

    def one(path: str) -> jax.Array:
        p = state.frozen[path]
        held = {name: p[f"held_{name}"] for name in FACTORS}
        scale = _scale(p, held["A"].dtype)[..., None, None]
        delta = scale * ((held["A"] * held["e"][..., None, :]) @ held["B"])
        found = jnp.sum(jnp.abs(delta * gradients[path]), axis=(-2, -1))
        return found / _size(delta.shape[-2:], plan.score)

    found = {path: one(path) for path in sorted(state.trainable)}
    return advanced(state, found, jnp.asarray(step, jnp.int32), plan)


def ranks(state: PeftState) -> dict[str, Any]:
    """{path: R}, a list by layer where layers are stacked."""
    return {path: state.frozen[path]["rank"].tolist() for path in sorted(state.trainable)}


def prune(state: PeftState) -> PeftState:
    """The state without what is not active; once the target is reached the model stays the same.

    Stacked layers keep as many components as the layer with most of them. For use after training:
    without reserves no rank can grow, and pefts.save wants all of the state.
    """

    def one(group: Mapping[str, Any], left: int) -> dict[str, Any]:
        return {name: _first(name.removeprefix("held_"), group[name], left) for name in group}

    def pruned(part: Mapping[str, Any]) -> dict[str, Any]:
        kept = {path: int(jnp.max(state.frozen[path]["rank"])) for path in state.trainable}
        return {path: one(part[path], kept[path]) if path in kept else part[path] for path in part}

    bare = {
        path: {**group, "e": jnp.where(active(state.frozen[path]), group["e"], 0.0)}
        for path, group in state.trainable.items()
    }
    return PeftState(pruned(bare), pruned(state.frozen))


def _first(name: str, leaf: jax.Array, left: int) -> jax.Array:
    """The first components of a leaf that has an axis of them."""
    if name == "B":
        return leaf[..., :left, :]
    return leaf[..., :left] if name in ("A", "e", "born", "grown") else leaf


def _start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
    del W, stats
    key_A, key_B = jax.random.split(key)
    first = jnp.arange(site.rank, dtype=jnp.int32) == 0
    trainable = {
        "A": jnp.where(
            first[None], 0.02 * jax.random.normal(key_A, (site.d_in, 1), jnp.float32), 0.0
        ),
        "B": jnp.where(
            first[:, None], 0.02 * jax.random.normal(key_B, (1, site.d_out), jnp.float32), 0.0
        ),
        "e": jnp.zeros((site.rank,), jnp.float32),
    }
    since = jnp.where(first, jnp.int32(ALWAYS), jnp.int32(0))
    frozen = {
        "alpha": jnp.float32(site.alpha),
        "rank": jnp.int32(1),
        "reach": jnp.int32(1),  # active components and reserves
        "born": since,  # the step after which A's and B's part of a component exists
        "grown": since,  # and after which its e is trained
        "sensitivity": jnp.float32(0),
        "uncertainty": jnp.float32(0),
    }
    # What the next gradient is taken at: the optimizer's step will have moved the leaves themselves
    # before `update` sees that gradient.
    return trainable, {**frozen, **{f"held_{name}": leaf for name, leaf in trainable.items()}}


def _scale(p: State, dtype: Any) -> jax.Array:
    """s (*stack,)."""
    return p["alpha"].astype(dtype) / (p["rank"].astype(dtype) + 1e-5)


def _learning(p: State) -> jax.Array:
    """e (r,) whose gradient is zero in reserve."""
    return jnp.where(active(p), p["e"], jax.lax.stop_gradient(p["e"]))


def _factors(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
    """A diag(e) and s B."""
    del call
    return p["A"] * _learning(p)[None], p["B"] * _scale(p, p["B"].dtype)


def _effective(W: jax.Array, p: State, call: Call) -> jax.Array:
    """W + s A diag(e) B."""
    del call
    A, B, e = (leaf.astype(W.dtype) for leaf in (p["A"], p["B"], _learning(p)))
    return W + _scale(p, W.dtype) * ((A * e[None]) @ B)


def _mean_distance(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> jax.Array:
    """The mean of |1 - ||v||^2| over columns of A and rows of B, active and in reserve.

    Each component is a parameter of its own in the official code, so none is asked to be orthogonal
    to another.
    """
    total, number = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    for path, group in trainable.items():
        exists = below(frozen[path], frozen[path]["reach"])
        for squares in (jnp.sum(group["A"] ** 2, -2), jnp.sum(group["B"] ** 2, -1)):
            distance = jnp.where(exists, jnp.abs(squares - 1), jnp.zeros_like(squares))
            total = total.astype(squares.dtype) + jnp.sum(distance)
            number += jnp.sum(exists, dtype=jnp.float32)
    return total / number.astype(total.dtype)


def scores(state: PeftState, grads: Any, plan: Schedule) -> ByPath:
    """A lower bound of S (*stack,) for each site, from the gradients of A and B.

    sum_k A_ik dL/dA_ik = sum_j dW_ij dL/dW_ij, and likewise for B's columns. No sum of absolute
    values with these margins is smaller than max(sum |rows|, sum |columns|), and one equals it.
    """
    held = {
        path: {name: state.frozen[path][f"held_{name}"] for name in FACTORS}
        for path in sorted(state.trainable)
    }
    # The penalty does not reach dL/dW: its part of the gradients is known, and taken off.
    beside = jax.grad(lambda tree: plan.gamma * _mean_distance(tree, state.frozen))(held)

    def one(path: str) -> jax.Array:
        A, B = held[path]["A"], held[path]["B"]
        rows = jnp.sum(A * (grads[path]["A"] - beside[path]["A"]), axis=-1)
        columns = jnp.sum(B * (grads[path]["B"] - beside[path]["B"]), axis=-2)
        least = jnp.maximum(jnp.sum(jnp.abs(rows), -1), jnp.sum(jnp.abs(columns), -1))
        return least / _size((A.shape[-2], B.shape[-1]), plan.score)

    return {path: one(path) for path in held}


def _size(shape: tuple[int, ...], score: str) -> float:
    entries = shape[-2] * shape[-1]
    return math.sqrt(entries) if score == "sqrt" else float(entries)
