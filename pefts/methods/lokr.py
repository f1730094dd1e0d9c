"""LoKr: a Kronecker product of two small matrices beside a frozen kernel.

    W' = W + s kron(K1, K2)        K1 (m, l), K2 (n, k), m n = d_in, l k = d_out
    y = x W + s X' with X'_lk = sum_mn X_mn K1_ml K2_nk        x read as m rows X of n

s = alpha / r. Each side is the product of two of its divisors, the smaller first: near its root, or
near `decompose_factor`. K2 is a product K2_a (n, r) K2_b (r, k) where r is below half of its
larger side, and with `decompose_both` so is K1; whole otherwise. A convolution's channels are
factored, and K2 has its window: K2 (w, n, k) or K2_a (w, n, r). K1 (or K1_b) starts at zero and the
others uniform on +-1/sqrt of what they sum over, so the model is unchanged at step 0. Trainable per
kernel: m l + n k, or r (m + l) and r (n + k) for the parts that are products.
"""

import functools
import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, Rule, State
from pefts.core import Declaration, Traits, factory
from pefts.methods.loha import uniform
from pefts.methods.lora import check_rank, scaling
from pefts.targets import Select, Site, selection


@factory
def lokr(
    rank: int = 8,
    alpha: float = 8.0,
    *,
    decompose_factor: int | None = None,
    decompose_both: bool = False,
    **select: Unpack[Select],
) -> Declaration:
    """Low-rank Kronecker product: W' = W + s kron(K1, K2), K1 (m, l), K2 (n, k) or of rank r.

    kron is never built for a linear module: x (m, n) meets K1 and K2 one after the other, for
    m n k + m l k multiply-adds per token, or n l m + n k l, or fewer with K2's factors; whatever
    order takes the fewest. Convolutions and embeddings use the whole kernel, one layer at a time.

    Args:
      rank: r, from 1 to the kernel's smaller side (Hugging Face PEFT: 8). Where it is half of the
        larger side of K2 or more, K2 is whole and r is but a part of s.
      alpha: s = alpha / r (Hugging Face PEFT: 8).
      decompose_factor: of each side the divisor that K1 gets: this number where it divides the
        side, else the largest divisor below it, up to the side's root. None: the largest up to the
        root (PEFT's -1).
      decompose_both: K1 too is of rank r, where r is below half of its larger side.
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact.

    Raises:
      ValueError: rank out of range, decompose_factor not positive, a convolution whose kernel does
        not begin with its window, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.lokr(rank=2).init(jax.random.key(0), params).trainable)
      10

    Source: Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation,
      arXiv 2309.14859; KronA: Parameter Efficient Tuning with Kronecker Adapter, arXiv 2212.10650.
      Starts, scale and the rules for the factors are Hugging Face PEFT's.
    """
    check_rank(rank)
    _check_factor(decompose_factor)
    start = functools.partial(_start, factor=decompose_factor, decompose_both=decompose_both)
    return Declaration(
        rule=Rule(start, effective, linear),
        selection=selection(**select),
        traits=Traits(),
        rank=rank,
        alpha=alpha,
    )


def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
    """W + s kron(K1, K2), a window outermost on the side of the inputs."""
    del call
    K1, K2 = whole({name: leaf.astype(W.dtype) for name, leaf in p.items()})
    K2 = K2.reshape(-1, *K2.shape[-2:])
    kron = jnp.einsum("ml,wnk->wmnlk", K1, K2).reshape(W.shape)
    return W + p["scale"].astype(W.dtype) * kron


def linear(x: jax.Array, W: Any, p: State, call: Call) -> jax.Array:
    """x as a matrix between the transposed K1 and K2, in the order of fewest multiply-adds."""
    y = call.dot(x, W)
    left = [p["K1"]] if "K1" in p else [p["K1_a"], p["K1_b"]]
    right = [p["K2"]] if "K2" in p else [p["K2_a"], p["K2_b"]]
    m, n = left[0].shape[0], right[0].shape[0]
    letters = ["ml"] if len(left) == 1 else ["mp", "pl"]
    letters += ["nk"] if len(right) == 1 else ["nq", "qk"]
    factors = [factor.astype(y.dtype) for factor in (*left, *right)]
    rows = x.reshape(-1, m, n).astype(y.dtype)
    update = jnp.einsum(f"tmn,{','.join(letters)}->tlk", rows, *factors, optimize="optimal")
    return y + p["scale"].astype(y.dtype) * update.reshape(y.shape)


def whole(p: State) -> tuple[jax.Array, jax.Array]:
    """K1 (m, l) and K2 (n, k), or K2 (w, n, k) with a window of w."""
    K1 = p["K1"] if "K1" in p else p["K1_a"] @ p["K1_b"]
    return K1, p["K2"] if "K2" in p else p["K2_a"] @ p["K2_b"]


def divisors(side: int, factor: int | None = None) -> tuple[int, int]:
    """The two divisors of a side, for K1 and K2.

    Example:
      >>> divisors(128), divisors(128, 4), divisors(128, 6), divisors(128, 32), divisors(7)
      ((8, 16), (4, 32), (4, 32), (32, 4), (1, 7))
    """
    if factor is not None and side % factor == 0:
        return factor, side // factor
    limit = min(math.isqrt(side), factor or side)
    first = next(n for n in range(limit, 0, -1) if side % n == 0)
    return first, side // first


def shapes(
    sides: tuple[int, int],
    window: int | None,
    rank: int,
    factor: int | None,
    decompose_both: bool,
) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf, for sides (channels in, d_out) and, of a convolution, w places."""
    (m, n), (ell, k) = (divisors(side, factor) for side in sides)
    rows = (n,) if window is None else (window, n)
    halves = {"K1_a": (m, rank), "K1_b": (rank, ell)}, {"K2_a": (*rows, rank), "K2_b": (rank, k)}
    wholes = {"K1": (m, ell)}, {"K2": (*rows, k)}
    is_split = decompose_both and rank < max(m, ell) / 2, rank < max(n, k) / 2
    left, right = (
        half if split else full for half, full, split in zip(halves, wholes, is_split, strict=True)
    )
    return {**left, **right}


def window_of(site: Site) -> tuple[int, ...]:
    """The sizes of a convolution's window; () for any other kernel."""
    letters = [letter for letter in site.axes if letter in "ik"]
    if "k" in letters and letters != sorted(letters, reverse=True):
        raise ValueError(
            f"{site.path!r} has axes {site.axes!r}, and the window 'k' of a convolution must come "
            "before its channels 'i' here: exclude it."
        )
    return tuple(n for n, axis in zip(site.shape, site.axes, strict=True) if axis == "k")


def _start(
    key: jax.Array,
    W: jax.Array,
    *,
    site: Site,
    stats: Any,
    factor: int | None,
    decompose_both: bool,
) -> tuple[dict, dict]:
    del W, stats
    window = math.prod(window_of(site))
    sides, is_conv = (site.d_in // window, site.d_out), "k" in site.axes
    leaves = shapes(sides, window if is_conv else None, site.rank, factor, decompose_both)
    trainable = {
        # the last axis is the output, what lies before it is summed over
        name: jnp.zeros(shape, jnp.float32)
        if name in ("K1", "K1_b")
        else uniform(jax.random.fold_in(key, n), shape, math.prod(shape[:-1]))
        for n, (name, shape) in enumerate(leaves.items())
    }
    return trainable, {"scale": jnp.float32(scaling(site))}


def _check_factor(factor: int | None) -> None:
    whole = isinstance(factor, int) and not isinstance(factor, bool)
    if factor is not None and (not whole or factor < 1):
        raise ValueError(
            f"decompose_factor={factor!r}: give a positive integer, such as 4, or None."
        )
