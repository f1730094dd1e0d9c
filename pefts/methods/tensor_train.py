"""Tensor-train adapters: bottleneck adapters whose two matrices are chains of small cores.

    h' = h + s Up(act(Down(h)))             Down (d -> b) and Up (b -> d), each x W + bias
    W[i_1 ... i_m, o_1 ... o_m] = G_1[:, i_1] G_2[:, i_2] ... G_2m[:, o_m]

Core G_k is (r, n_k, r), but G_1 (1, n_1, r) and G_2m (r, n_2m, 1). The sizes n_k are m factors of
the inputs and then m of the outputs, so the chain falls into W = L R, with L (d_in, r) from the
first half of the cores and R (r, d_out) from the second: x W = (x L) R, and W, of rank r at most,
is never built. h is the input or the output of a linear module. In AdaZeta's code a Llama's gate
and up projections have an adapter before them, and its down projections one behind them:

    pefts.chain(pefts.tensor_train(placement="input"), pefts.tensor_train(placement="output"))

It is computed in float32 at full precision, as zeroth-order steps look at tiny differences. The
model is changed at step 0 unless zero_init is set, and the adapter cannot be merged. Trainable: the
cores and the biases, b + d; norms stay frozen.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import views
from pefts.bound import Call, Rule, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.linalg import precise
from pefts.methods.bottleneck import ACTIVATIONS, PLACEMENTS
from pefts.methods.lora import check_rank
from pefts.targets import Select, Site, selection

_FIRST_FEED_FORWARD = (
    r"(^|/)(gate|gate_proj|up|up_proj|fc1|fc_in|w1|w3|wi|wi_\d)/kernel$"
    r"|(?i:mlp|ffn|feed_?forward)[^/]*/(intermediate|c_fc|[Dd]ense_0)(/dense)?/kernel$"
    r"|layer[^/]*/(\d+/)?intermediate/dense/kernel$"
)
DEFAULTS = {"input": _FIRST_FEED_FORWARD, "output": PLACEMENTS["pfeiffer"]}
HIGHEST = jax.lax.Precision.HIGHEST


@factory
def tensor_train(
    bottleneck: int = 64,
    rank: int = 5,
    *,
    placement: str = "output",
    factors: int | Sequence[int] = 3,
    scale: float = 1.0,
    activation: str = "relu",
    zero_init: bool = False,
    **select: Unpack[Select],
) -> Declaration:
    """Tensor-train adapter: h' = h + s Up(act(Down(h))), W = L R from cores (r, n, r).

    Cores start as N(0, 1) sigma^(1/(2m)) / sqrt(r_k), r_k their last axis, which gives the entries
    of W the standard deviation sigma = 1 / sqrt(d_in + d_out); biases are uniform within
    1 / sqrt(d_out).

    Args:
      bottleneck: b, from 1 to the adapted width d (paper's code: 64).
      rank: r, between all cores, at most the kernel's smaller side (paper's code: 5); rank_pattern
        gives single sites another one.
      placement: of the adapter, "input" (before the linear module) or "output" (behind it, bias
        included). Axes of a DenseGeneral are taken together as d.
      factors: m, or Down's sizes n_1 ... n_2m; Up has them in reverse. From m, the sizes are the
        factors of d, descending, and those of b, ascending, with the smallest sum: (16, 16, 16, 4,
        4, 4) for 4096 and 64, as in the paper's code.
      scale: s (paper's code: 1); alpha_pattern gives single sites another one.
      activation: act, one of "gelu" (by the error function), "relu" (paper's code), "swish".
      zero_init: start with Up's last core and both biases at zero: the model is then unchanged at
        step 0, and in the paper's code it is not.
      **select: targets (default: the first feed-forward layers for "input" and the second ones for
        "output", by their usual names), exclude, rank_pattern, alpha_pattern, axes; see
        pefts.targets.Select.

    Returns:
      A Peft; it cannot be merged.

    Raises:
      ValueError: bottleneck, rank or scale out of range, unknown placement or activation, an odd
        number of factors or ones that do not multiply to d and b, an input that is no vector (of
        an embedding or a convolution), or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"mlp": {"down_proj": {"kernel": jax.numpy.ones((6, 4096))}}}
      >>> adapter = pefts.tensor_train()
      >>> pefts.count(adapter.init(jax.random.key(0), params).trainable)
      6360

    Source: AdaZeta: Adaptive Zeroth-Order Tensor-Train Adaption for Memory-Efficient Large Language
      Models Fine-Tuning, arXiv 2406.18060; details checked against its code.
    """
    check_rank(rank)
    _check(bottleneck, placement, activation, scale)
    _check_factors(factors, bottleneck)
    before = placement == "input"

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del W, stats
        if before:
            _check_input(site)
        shape = _shape(site, site.d_in if before else site.d_out, bottleneck, factors)
        down, up = jax.random.split(key)
        trainable = {
            **_train(down, "down", shape, site.rank),
            **_train(up, "up", shape[::-1], site.rank),
        }
        if zero_init:
            last = ("down_bias", "up_bias", f"up_G{len(shape)}")
            trainable |= {name: jnp.zeros_like(trainable[name]) for name in last}
        return trainable, {"scale": jnp.float32(site.alpha)}

    def linear(x: jax.Array, W: Any, p: State, call: Call) -> jax.Array:
        return call.dot(_adapt(x, p, activation), W)

    def output(y: jax.Array, p: State, call: Call) -> jax.Array:
        del call
        d = p["up_bias"].shape[0]
        return _adapt(views.outputs(y, d), p, activation).reshape(y.shape)

    return Declaration(
        rule=Rule(start, _no_dense_kernel, linear) if before else Rule(start, output=output),
        selection=selection(default=DEFAULTS[placement], **select),
        traits=Traits(mergeable=False, identity_at_init=zero_init),
        rank=rank,
        alpha=scale,
    )


def product(x: jax.Array, cores: Sequence[jax.Array]) -> jax.Array:
    """(x L) R (..., d_out), for x (..., d_in) and an even number of cores."""
    L, R = halves(cores)
    return matmul(matmul(x, L, HIGHEST), R, HIGHEST)


def halves(cores: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """L (d_in, r) of the first half of the cores, and R (r, d_out) of the second."""
    m = len(cores) // 2
    L, R = jnp.ones((1, 1), cores[0].dtype), jnp.ones((1, 1), cores[0].dtype)
    for G in cores[:m]:
        L = matmul(L, G.reshape(len(G), -1), HIGHEST).reshape(-1, G.shape[-1])
    for G in cores[m:][::-1]:
        R = matmul(G, R, HIGHEST).reshape(len(G), -1)
    return L, R


@functools.cache
def balanced(size: int, parts: int) -> tuple[int, ...]:
    """The factors of a size with the smallest sum, descending; ones where it has too few.

    >>> balanced(4096, 3), balanced(768, 3), balanced(7, 3)
    ((16, 16, 16), (12, 8, 8), (7, 1, 1))
    """
    if parts == 1:
        return (size,)
    found = [(n, *balanced(size // n, parts - 1)) for n in _divisors(size)]
    return min((tuple(sorted(split, reverse=True)) for split in found), key=lambda s: (sum(s), s))


def _divisors(size: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(size) + 1) if size % n == 0]
    return sorted({*small, *(size // n for n in small)})


def _train(key: jax.Array, name: str, shape: Sequence[int], rank: int) -> dict[str, jax.Array]:
    """The cores and the bias of one matrix."""
    m = len(shape) // 2
    d_in, d_out = math.prod(shape[:m]), math.prod(shape[m:])
    spread = (d_in + d_out) ** (-0.5 / (2 * m))
    *keys, bias_key = jax.random.split(key, 2 * m + 1)
    ranks = [1, *[rank] * (2 * m - 1), 1]
    bound = 1 / math.sqrt(d_out)
    bias = jax.random.uniform(bias_key, (d_out,), jnp.float32, -bound, bound)
    leaves = {f"{name}_bias": bias}
    for k, n in enumerate(shape):
        G = jax.random.normal(keys[k], (ranks[k], n, ranks[k + 1]), jnp.float32)
        leaves[f"{name}_G{k + 1}"] = G * (spread / math.sqrt(ranks[k + 1]))
    return leaves


def _adapt(h: jax.Array, p: State, activation: str) -> jax.Array:
    """h + s Up(act(Down(h))) on the last axis of h, in h's dtype."""
    z = ACTIVATIONS[activation](_affine(precise(h), p, "down"))
    y = _affine(z, p, "up")
    return h + (p["scale"].astype(y.dtype) * y).astype(h.dtype)


def _affine(x: jax.Array, p: State, name: str) -> jax.Array:
    count = sum(leaf.startswith(f"{name}_G") for leaf in p)
    y = product(x, [p[f"{name}_G{k + 1}"].astype(x.dtype) for k in range(count)])
    return y + p[f"{name}_bias"].astype(x.dtype).reshape(*(1,) * (y.ndim - 1), -1)


def _no_dense_kernel(W: jax.Array, p: State, call: Call) -> jax.Array:
    del W, p, call
    raise ValueError(
        "tensor_train(placement='input') changes what a linear module reads, which no dense kernel "
        "can stand for: exclude kernels whose module pefts does not know, and in pefts.chain put "
        "methods that need the dense kernel of the same site before this one."
    )


def _shape(site: Site, d: int, bottleneck: int, factors: int | Sequence[int]) -> tuple[int, ...]:
    """Down's sizes n_1 ... n_2m at this site."""
    if bottleneck > d:
        raise ValueError(
            f"bottleneck={bottleneck} is wider than the {d} features that the adapter of "
            f"{site.path!r} reads: choose 1 to {d}, or exclude this kernel."
        )
    if isinstance(factors, int):
        return (*balanced(d, factors), *balanced(bottleneck, factors)[::-1])
    width = factors[: len(factors) // 2]
    if math.prod(width) != d:
        raise ValueError(
            f"factors={list(factors)}: the first half multiplies to {math.prod(width)}, and the "
            f"adapter of {site.path!r} reads {d} features; give their number alone, or a method of "
            "its own to each width by pefts.partition."
        )
    return tuple(factors)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_factors(factors: int | Sequence[int], bottleneck: int) -> None:
    if _is_positive(factors):
        return
    if not isinstance(factors, Sequence) or not factors or not all(map(_is_positive, factors)):
        raise ValueError(
            f"factors={factors!r}: give a positive integer, such as 3, or as many for the width as "
            "for the bottleneck, such as (16, 16, 16, 4, 4, 4)."
        )
    half, odd = divmod(len(factors), 2)
    if odd:
        raise ValueError(
            f"factors={list(factors)} are {len(factors)}, an odd number: the first half splits the "
            "width and the second the bottleneck; fill up with ones."
        )
    if math.prod(factors[half:]) != bottleneck:
        raise ValueError(
            f"factors={list(factors)}: the second half multiplies to "
            f"{math.prod(factors[half:])}, and bottleneck={bottleneck}; they must be equal."
        )


def _check_input(site: Site) -> None:
    if site.is_embedding or "k" in site.axes:
        raise ValueError(
            f"placement='input': {site.path!r} belongs to an embedding or a convolution, which "
            "reads no vectors of features; exclude it, or choose placement='output'."
        )


def _check(bottleneck: int, placement: str, activation: str, scale: float) -> None:
    if not _is_positive(bottleneck):
        raise ValueError(f"bottleneck={bottleneck!r}: give a positive integer, such as 64.")
    for name, value, known in (
        ("placement", placement, DEFAULTS),
        ("activation", activation, ACTIVATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {sorted(known)}.")
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale={scale!r}: give a finite number other than 0, such as 1.0.")
