"""Monarch: a kernel replaced by two block-diagonal factors with a fixed shuffle between them.

    h[k] = x[k] R[k]             x read as n1 rows of i       R (n1, i, rho n2), i = d_in / n1
    y[:, j] = h[:, j] L[j]       h read as (n1 rho) x n2      L (n2, n1 rho, o), o = d_out / n2

and y written as o rows of n2: output number a n2 + j is the a-th of block j. So W' (d_in, d_out),
read as (n1, i, o, n2), has in every (k, j) a sub-matrix i x o of rank rho:
    W'[k, :, :, j] = sum_r R[k, :, r n2 + j] L[j, k rho + r, :]

R and L start at the projection of W, the best such matrix in the Frobenius norm: each sub-matrix is
cut to its rho largest singular values, whose roots go to both factors. That changes the model at
step 0, by `projection_error`. Trainable: rho (n2 d_in + n1 d_out) per kernel; multiply-adds per
token are as many.
"""

import math
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import linalg, paths, views
from pefts.bound import BoundKernel, Call, Rule, State, effective_matrix
from pefts.core import FULL_PRECISION, Declaration, Params, Peft, PeftState, Traits, factory
from pefts.methods.lora import check_rank
from pefts.targets import Select, Site, selection


@factory
def monarch(
    blocks: Sequence[int] | None = None,
    rank: int = 1,
    *,
    padding: bool = False,
    **select: Unpack[Select],
) -> Declaration:
    """Monarch factors in place of W: block-diagonal R (n1, i, rho n2) and L (n2, n1 rho, o).

    i = d_in / n1 and o = d_out / n2. W itself is no longer used: these are the weights, so weight
    decay shrinks the model. A small rho loses most of a pretrained kernel, and the hidden vector
    has rho n1 n2 entries: for a larger rho choose fewer blocks.

    Args:
      blocks: (n1, n2), how many blocks R and L have. None: the factor of d_in and the one of d_out
        nearest to their roots, n1 from above and n2 from below (the paper, for square kernels).
      rank: rho, from 1 to the smaller of i and o (the paper: 1).
      padding: extend a side that its number of blocks does not divide with zeros, instead of
        refusing it; the padded inputs and outputs do not exist outside.
      **select: targets, exclude, rank_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, the dense form of R and L.

    Raises:
      ValueError: blocks not two positive integers, more blocks than a side is long, blocks that do
        not divide it (without padding), rank out of range, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.monarch(blocks=(3, 2)).init(jax.random.key(0), params).trainable)
      24

    Source: Monarch: Expressive Structured Matrices for Efficient and Accurate Training,
      arXiv 2204.00595.
    """
    check_rank(rank)
    _check_blocks(blocks)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, stats
        n1, n2 = _block_counts(site, blocks, padding)
        R, L = project(W, n1, n2, site.rank)
        return {"L": L, "R": R}, {}

    return Declaration(
        rule=Rule(start, effective, linear),
        selection=selection(**select),
        traits=Traits(identity_at_init=False),
        rank=rank,
    )


def linear(x: jax.Array, W: Any, p: State, call: Call) -> jax.Array:
    """x times R, shuffled, times L."""
    d_out = jax.eval_shape(call.dense, W).shape[-1]
    return product(x, p["R"], p["L"])[..., :d_out]


def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
    """The dense form of R and L."""
    del call
    d_in, d_out = W.shape
    return densify(p["R"], p["L"])[:d_in, :d_out].astype(W.dtype)


def project(W: jax.Array, n1: int, n2: int, rank: int) -> tuple[jax.Array, jax.Array]:
    """The nearest Monarch matrix to W (d_in, d_out) in the Frobenius norm.

    Sides that n1 and n2 do not divide are extended by zeros.

    Returns:
      R (n1, i, rank n2) and L (n2, n1 rank, o), with i and o rounded up, in float32, or float64
      where W is.
    """
    W = jnp.pad(W, [(0, -side % n) for side, n in zip(W.shape, (n1, n2), strict=True)])
    i, o = W.shape[0] // n1, W.shape[1] // n2
    U, S, V = linalg.svd(jnp.transpose(W.reshape(n1, i, o, n2), (0, 3, 1, 2)), rank)
    root = jnp.sqrt(S)[:, :, None]
    R = jnp.transpose(U * root, (0, 2, 3, 1))
    L = jnp.transpose(V * root, (1, 0, 3, 2))
    return R.reshape(n1, i, rank * n2), L.reshape(n2, n1 * rank, o)


def densify(R: jax.Array, L: jax.Array) -> jax.Array:
    """The matrix (n1 i, o n2) of R (n1, i, rho n2) and L (n2, n1 rho, o)."""
    (n1, i, width), (n2, _, o) = R.shape, L.shape
    rho = width // n2
    R, L = R.reshape(n1, i, rho, n2), L.reshape(n2, n1, rho, o)
    return jnp.einsum("kirj,jkra->kiaj", R, L).reshape(n1 * i, o * n2)


def product(x: jax.Array, R: jax.Array, L: jax.Array) -> jax.Array:
    """x (..., d_in) times the matrix of R (n1, i, m) and L (n2, p, o): (..., o n2), in x's dtype.

    n1 m = n2 p; m need not be a multiple of n2. x is extended by zeros where n1 does not divide
    d_in.

    Raises:
      ValueError: x does not fit R.
    """
    (n1, i, _), (n2, p, o) = R.shape, L.shape
    missing = n1 * i - x.shape[-1]
    if not 0 <= missing < n1:
        raise ValueError(
            f"x of shape {x.shape} does not fit the {n1} blocks of R, {i} inputs each: its last "
            f"axis must be {n1 * i}, or up to {n1 - 1} less where the kernel was padded."
        )
    tokens = jnp.pad(x.reshape(-1, x.shape[-1]), [(0, 0), (0, missing)])
    # Blocks outermost in every product: with tokens there a step takes twice as long.
    rows = jnp.swapaxes(tokens.reshape(-1, n1, i), 0, 1)
    h = jnp.einsum("kti,kim->ktm", rows, R.astype(x.dtype))
    columns = jnp.transpose(jnp.swapaxes(h, 0, 1).reshape(-1, p, n2), (2, 0, 1))
    y = jnp.einsum("jtp,jpa->jta", columns, L.astype(x.dtype))
    return jnp.transpose(y, (1, 2, 0)).reshape(*x.shape[:-1], o * n2)


def projection_error(peft: Peft, params: Params, state: PeftState) -> dict[str, jax.Array]:
    """{path: ||W' - W||_F / ||W||_F} of every bound kernel, one number for each stacked layer.

    Of a fresh state, what replacing the kernels costs before any training; 0 where nothing is lost
    and sqrt(1 - kept energy) at a projection.

    Example:
      >>> import jax, pefts
      >>> from pefts.methods.monarch import projection_error
      >>> params = {"query": {"kernel": jax.numpy.eye(4)}}
      >>> peft = pefts.monarch(blocks=(2, 2))
      >>> error = projection_error(peft, params, peft.init(jax.random.key(0), params))
      >>> round(float(error["query/kernel"]), 3)
      0.0
    """
    base, flat = paths.flatten(params), paths.flatten(peft.bind(params, state))
    ambient, errors = flat.pop(paths.RESERVED), {}
    for path, kernel in flat.items():
        if not isinstance(kernel, BoundKernel):
            continue
        with FULL_PRECISION():
            changed = effective_matrix(kernel, ambient)
        W = views.to_matrix(base[path], kernel.axes).astype(changed.dtype)
        norm = jnp.linalg.norm(W, axis=(-2, -1))
        errors[path] = jnp.linalg.norm(changed - W, axis=(-2, -1)) / norm
    return errors


def _near_root(side: int) -> tuple[int, int]:
    """The two factors of a side that are nearest to its root, the larger first."""
    smaller = next(n for n in range(math.isqrt(side), 0, -1) if side % n == 0)
    return side // smaller, smaller


def _block_counts(site: Site, blocks: Sequence[int] | None, padding: bool) -> tuple[int, int]:
    """(n1, n2) of this kernel, which the rank fits."""
    n1, n2 = (_near_root(site.d_in)[0], _near_root(site.d_out)[1]) if blocks is None else blocks
    for name, n, side in (("n1", n1, site.d_in), ("n2", n2, site.d_out)):
        if n > side or (side % n and not padding):
            raise ValueError(
                f"blocks={(n1, n2)!r}: {name}={n} does not divide a side of {site.path!r}, a "
                f"{site.d_in} x {site.d_out} kernel: choose a divisor of {side}, leave blocks out, "
                "or set padding=True where there are no more blocks than entries."
            )
    i, o = -(-site.d_in // n1), -(-site.d_out // n2)
    if site.rank > min(i, o):
        raise ValueError(
            f"rank={site.rank} is out of range for {site.path!r}, whose {n1} x {n2} sub-matrices "
            f"are {i} x {o}: choose 1 to {min(i, o)}, fewer blocks, or a rank of its own by "
            "rank_pattern."
        )
    return n1, n2


def _check_blocks(blocks: Sequence[int] | None) -> None:
    if blocks is None:
        return
    given = list(blocks) if isinstance(blocks, Sequence) else [blocks]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in given)
    if len(given) != 2 or not whole:
        raise ValueError(
            f"blocks={blocks!r}: give two positive integers (n1, n2), such as (4, 4), or None."
        )
