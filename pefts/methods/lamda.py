"""LaMDA: a small trained core between a frozen projection and one that freezes on the way.

    y = x W + s ((x A) Sg) B      A (d_in, r) frozen, Sg (r, r), B (r, d_out), s = alpha / r

"spectral": A = U_r, Sg0 = diag(S_r) / s and B0 = V_r^T of W = U diag(S) V^T; this part of W is
taken over, not repeated, so that the product adds
    s A (Sg B - Sg0 B0) = s A [(Sg - Sg0) B + Sg0 (B - B0)]
which is exactly zero at step 0. "code": A and Sg random, B zero. Rows of B freeze in order, in the
first t_i = eta T of T updates: min(r, floor(r t / t_i)) of them after t updates; then Sg alone
trains. A frozen row has no gradient and is put back after each update, whatever the optimizer's
momentum and decay did to it. Trainable: r^2 + r d_out per kernel at first, r^2 in the end.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pefts import linalg
from pefts.bound import Call, State, matmul
from pefts.core import Declaration, PeftState, Sites, Traits, factory
from pefts.low_rank import additive
from pefts.methods.lora import check_dropout, check_rank, drop
from pefts.spectra import spectra
from pefts.targets import Select, Site, selection

INITS = ("spectral", "code")
Build = Callable[..., tuple[jax.Array, jax.Array, dict]]


@factory
def lamda(
    total_steps: int | None = None,
    rank: int = 64,
    alpha: float = 16.0,
    *,
    init: str = "spectral",
    freezing: float = 0.3,
    ranks: Sequence[int] | None = None,
    dropout: float = 0.0,
    **select: Unpack[Select],
) -> Declaration:
    """Spectrally decomposed core: y = x W + s ((x A) Sg) B, A (d_in, r), Sg (r, r), B (r, d_out).

    A is frozen, Sg trains to the end, B row by row less. The spectral start is made from the
    paper's abstract (its details are unchecked); the released code has the other start alone.

    Args:
      total_steps: T, the optimizer steps of the whole training; required.
      rank: r (released script: 64); with `ranks` the mean over all kernels.
      alpha: s = alpha / r (released script: 16).
      init: "spectral" (paper) or "code" (released code: A uniform on +-1/sqrt(d_in), Sg on
        +-1/sqrt(r), B zero).
      freezing: eta, the share of T in which B freezes (released code: 0.3). NOTE(paper): the
        released schedule lacks the factor r and never freezes more than three rows.
      ranks: ranks that kernels may have, for LaMDA++: each kernel, and each of stacked layers, gets
        the one of them with which all kernels together keep most of their energy,
        sum S[:r]^2 / sum S^2 averaged over kernels, at a mean of at most `rank`. A reconstruction
        (unchecked): the paper's rule is not in its released code. None: all have `rank`.
      dropout: probability of dropping an input of the adapter, in calls that are given a "dropout"
        random stream (released script: 0.1); for init "code" alone, as the spectral product carries
        a part of W.
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact. Training needs its `update`. Give the spectral start no weight
      decay, which would shrink the part of W that Sg and B carry.

    Raises:
      ValueError: total_steps missing, rank, alpha, freezing, ranks or dropout out of range, unknown
        init, dropout with init "spectral"; with `ranks`, init inside jit.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.eye(6, 4)}}
      >>> peft = pefts.lamda(total_steps=100, rank=2)
      >>> pefts.count(peft.init(jax.random.key(0), params).trainable)
      12

    Source: LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation,
      arXiv 2406.12832.
    """
    check_rank(rank)
    check_dropout(dropout)
    _check(alpha, freezing, init, dropout)
    t_i = freezing * _checked_total(total_steps)
    allocated = None if ranks is None else _checked_ranks(ranks)

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        # Sg and B are not multiplied out: with A frozen, the gradients need only r features.
        return call.dot(x, W) + _core(call.dot(drop(x, dropout, call.key), p["A"]), p)

    build = _spectral if init == "spectral" else _random
    rule = additive(functools.partial(_start, build=build, t_i=t_i), factors)
    return Declaration(
        rule=rule._replace(linear=linear, uses_key=dropout > 0),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0, shapes_from_values=allocated is not None),
        rank=rank,
        alpha=alpha,
        prepare=functools.partial(_prepare, ranks=allocated, t_i=t_i) if allocated else None,
        update=_update,
        failure="its decomposition failed, or its alpha is 0",
    )


def frozen_after(rank: int, t_i: float) -> np.ndarray:
    """(r,): the number of updates after which each row of B is frozen.

    The first t with floor(r t / t_i) > row, in exact arithmetic: a compiled float32 formula could
    move a step.
    """
    each = Fraction(t_i) / rank
    return np.asarray([math.ceil((row + 1) * each) for row in range(rank)], np.int32)


def ranks(state: PeftState) -> dict[str, Any]:
    """{path: r}, a list by layer where layers are stacked."""
    return {
        path: jnp.sum(group["until"] > 0, axis=-1).tolist() for path, group in state.frozen.items()
    }


def allocate(energies: Sequence[np.ndarray], options: Sequence[Sequence[int]], budget: int) -> list:
    """The rank of each kernel, from its own options, at most `budget` in all.

    Starts from the smallest options and takes, again and again, the step to a kernel's next option
    that gains most energy per rank, until none fits. As energy is concave in the rank, no other
    choice of the same total keeps more, unless a step was passed over because it did not fit.

    Args:
      energies: of each kernel, the share of sum S^2 in its first r singular values, for each of
        its options.
      options: of each kernel, ranks in rising order.
      budget: the sum of all ranks.
    """
    chosen = [0] * len(options)
    left = budget - sum(own[0] for own in options)

    def step(kernel: int) -> tuple[float, int]:
        at, own = chosen[kernel], options[kernel]
        gain = energies[kernel][at + 1] - energies[kernel][at]
        return -float(gain) / (own[at + 1] - own[at]), kernel

    waiting = [step(kernel) for kernel, own in enumerate(options) if len(own) > 1]
    heapq.heapify(waiting)
    while waiting:
        _, kernel = heapq.heappop(waiting)
        own, at = options[kernel], chosen[kernel]
        cost = own[at + 1] - own[at]
        if cost > left:
            continue
        left -= cost
        chosen[kernel] += 1
        if chosen[kernel] + 1 < len(own):
            heapq.heappush(waiting, step(kernel))
    return [own[at] for own, at in zip(options, chosen, strict=True)]


def factors(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
    """A (d_in, r) and s (Sg B - Sg0 B0) (r, d_out)."""
    del call
    return p["A"], _core(jnp.eye(p["Sg"].shape[-1], dtype=p["Sg"].dtype), p)


def _core(h: jax.Array, p: State) -> jax.Array:
    """s h (Sg B - Sg0 B0) (..., d_out) of h (..., r)."""
    B = jnp.where(p["active"][:, None], p["B"], jax.lax.stop_gradient(p["held"]))
    if "Sg0" not in p:
        return matmul(matmul(h, p["Sg"] * p["scale"]), B)
    Sg0 = p["Sg0"]
    moved = matmul(matmul(h, (p["Sg"] - jnp.diag(Sg0)) * p["scale"]), B)
    return moved + matmul(h, (Sg0 * p["scale"])[:, None] * (B - p["B0"]))


def _start(
    key: jax.Array, W: jax.Array, *, site: Site, stats: Any, build: Build, t_i: float
) -> tuple[dict, dict]:
    until = (stats or {}).get("until")
    if until is None:
        until = jnp.asarray(frozen_after(site.rank, t_i))
    inside = until > 0
    scale = site.alpha / jnp.sum(inside).astype(jnp.float32)
    Sg, B, frozen = build(key, W, inside, scale)
    frozen |= {"until": until, "active": inside, "held": B, "scale": scale}
    return {"Sg": Sg, "B": B}, frozen


def _spectral(
    key: jax.Array, W: jax.Array, inside: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, dict]:
    """Sg and B, and what stays: A, the diagonal of Sg0, and B0."""
    del key
    U, S, V = linalg.svd(W, inside.size)
    kept = inside.astype(S.dtype)
    Sg0, B0 = S * kept / scale.astype(S.dtype), kept[:, None] * V.T
    return jnp.diag(Sg0), B0, {"A": U * kept[None], "Sg0": Sg0, "B0": B0}


def _random(
    key: jax.Array, W: jax.Array, inside: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, dict]:
    """Sg and B, and A; entries beyond the rank of this layer are zero."""
    del scale
    (d_in, d_out), r, kept = W.shape, inside.size, inside.astype(jnp.float32)
    key_A, key_Sg = jax.random.split(key)
    A = jax.random.uniform(key_A, (d_in, r), jnp.float32, -1, 1) / math.sqrt(d_in)
    Sg = jax.random.uniform(key_Sg, (r, r), jnp.float32, -1, 1) / jnp.sqrt(jnp.sum(kept))
    B = jnp.zeros((r, d_out), jnp.float32)
    return Sg * kept[:, None] * kept[None], B, {"A": A * kept[None]}


def _update(state: PeftState, grads: Any, step: jax.Array) -> PeftState:
    """Frozen rows back to their values; those whose time has come join them."""
    del grads
    t = jnp.asarray(step, jnp.int32) + 1
    trainable, frozen = {}, {}
    for path, group in state.trainable.items():
        old = state.frozen[path]
        B = jnp.where(old["active"][..., None], group["B"], old["held"])
        active = t < old["until"]
        held = jnp.where(active[..., None], old["held"], B)
        trainable[path] = {**group, "B": B}
        frozen[path] = {**old, "active": active, "held": held}
    return PeftState(trainable, frozen)


def _prepare(
    sites: Sites,
    matrix_of: Callable[[Site], jax.Array],
    stats: Any,
    *,
    ranks: tuple[int, ...],
    t_i: float,
) -> tuple[Sites, dict[str, Any]]:
    """When each row freezes, by each kernel's own rank; the site has the largest of its layers."""
    found = spectra("lamda", sites, matrix_of)
    options, energies, budget = [], [], 0
    for site in sites:
        own = [n for n in ranks if n <= min(site.d_in, site.d_out)]
        if not own:
            raise ValueError(
                f"ranks={list(ranks)}: none is possible for {site.path!r}, a {site.d_in} x "
                f"{site.d_out} kernel; add smaller ones, or exclude it."
            )
        power = np.cumsum(found[site.path].astype(np.float64) ** 2, axis=-1)
        share = power / np.maximum(power[:, -1:], np.finfo(np.float64).tiny)
        energies += list(share[:, np.asarray(own) - 1])
        options += [own] * len(share)
        budget += site.rank * len(share)
    least = sum(own[0] for own in options)
    if least > budget:
        raise ValueError(
            f"ranks={list(ranks)}: the smallest of them on each of the {len(options)} kernels is "
            f"{least} in all, and rank with rank_pattern allows {budget}; add a smaller one."
        )
    chosen = iter(allocate(energies, options, budget))
    handed, out = {}, []
    for site in sites:
        own = [next(chosen) for _ in found[site.path]]
        until = np.zeros((len(own), max(own)), np.int32)
        for row, rank in zip(until, own, strict=True):
            row[:rank] = frozen_after(rank, t_i)
        out.append(dataclasses.replace(site, rank=max(own)))
        handed[site.path] = {
            **(stats or {}).get(site.path, {}),
            "until": jnp.asarray(until.reshape(*site.stack, -1)),
        }
    return tuple(out), {**(stats or {}), **handed}


def _checked_total(total_steps: int | None) -> int:
    if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
        raise ValueError(
            f"total_steps={total_steps!r}: B freezes along the training; give the number of "
            "optimizer steps it will take."
        )
    return total_steps


def _check(alpha: float, freezing: float, init: str, dropout: float) -> None:
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha!r}: give a positive number, such as 16.")
    if not 0 < freezing <= 1:
        raise ValueError(f"freezing={freezing!r}: give a share of the steps, in (0, 1].")
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; choose one of {INITS}.")
    if dropout and init == "spectral":
        raise ValueError(
            f"dropout={dropout!r} with init='spectral' would drop parts of the pretrained kernel: "
            "leave it at 0, or take init='code'."
        )


def _checked_ranks(ranks: Sequence[int]) -> tuple[int, ...]:
    counts = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in ranks)
    if not ranks or not counts or list(ranks) != sorted(set(ranks)):
        raise ValueError(f"ranks={ranks!r}: give positive integers in rising order.")
    return tuple(ranks)
