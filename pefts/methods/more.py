"""MoRe: a rectangular Monarch product of low block rank beside a frozen kernel.

    h[n] = x[n] w1[n]            x read as N rows of d_in / N    w1 (N, d_in / N, q)
    m[n] = h'[n] w2[n]           h' (N, q): h's N q entries, read as q rows of N, transposed
    y = x W + drop(m)            w2 (N, q, d_out / N); m written with the block's index fastest

There is no scale. w1 starts uniform on +-1/sqrt(d_in / N) and w2 at zero, so the model is unchanged
at step 0. With as many parameters as a LoRA of rank q, q (d_in + d_out), the update can have rank
N q. N = 1 is a LoRA of rank q.
"""

import functools
import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import linalg
from pefts.bound import Call, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.low_rank import additive
from pefts.methods.lora import check_dropout, check_rank, drop
from pefts.targets import Select, Site, selection


@factory
def more(
    blocks: int = 4,
    rank: int = 4,
    *,
    dropout: float = 0.0,
    **select: Unpack[Select],
) -> Declaration:
    """Monarch adapter: y = x W + drop(M(x)), M of w1 (N, d_in / N, q) and w2 (N, q, d_out / N).

    M is block-diagonal, shuffle, block-diagonal; its rank is at most N q.

    Args:
      blocks: N, a divisor of both sides of every kernel (the paper: 4).
      rank: q, the rank of a block, from 1 to the shorter side of one (the paper: 4).
      dropout: probability of dropping an output of the adapter (the paper: 0.1 for LLaMA, the
        released code's default 0); active in calls that are given a "dropout" random stream.
      **select: targets, exclude, rank_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + M(I).

    Raises:
      ValueError: blocks not positive or no divisor of a side, rank out of range, dropout outside
        [0, 1), or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> peft = pefts.more(blocks=2, rank=2)
      >>> pefts.count(peft.init(jax.random.key(0), params).trainable)
      20

    Source: MoRe Fine-Tuning with 10x Fewer Parameters, arXiv 2408.17383.
    """
    check_rank(rank)
    check_dropout(dropout)
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
        raise ValueError(f"blocks={blocks!r}: give a positive integer, such as 4.")

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        A, B = factors(p, call)
        return call.dot(x, W) + drop(matmul(call.dot(x, A), B), dropout, call.key)

    rule = additive(functools.partial(_start, blocks=blocks), factors)
    return Declaration(
        rule=rule._replace(linear=linear, uses_key=dropout > 0),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0),
        rank=rank,
    )


def factors(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
    """M = A B, A (d_in, N q) and B (N q, d_out): the blocks, with both shuffles in the columns.

    The product is that of a LoRA of rank N q. Block by block it would have N times fewer
    multiply-adds, of the few that an adapter has, and take longer: its shuffles move activations,
    these move weights.
    """
    del call
    N, _, q = p["w1"].shape
    A, B = linalg.block_diagonal_matrix(p["w1"]), linalg.block_diagonal_matrix(p["w2"])
    return _transposed(A, q, N), _transposed(B, N, B.shape[-1] // N)


def _transposed(M: jax.Array, rows: int, columns: int) -> jax.Array:
    """M (d, rows columns) with its columns, a grid of rows x columns, in the other order."""
    return jnp.swapaxes(M.reshape(-1, rows, columns), 1, 2).reshape(M.shape)


def _start(
    key: jax.Array, W: jax.Array, *, site: Site, stats: Any, blocks: int
) -> tuple[dict, dict]:
    del W, stats
    N, q = blocks, site.rank
    if site.d_in % N or site.d_out % N:
        raise ValueError(
            f"blocks={N} does not divide both sides of {site.path!r}, a {site.d_in} x {site.d_out} "
            f"kernel: choose a divisor of {math.gcd(site.d_in, site.d_out)}, or exclude it."
        )
    i, o = site.d_in // N, site.d_out // N
    if q > min(i, o):
        raise ValueError(
            f"rank={q} is out of range for {site.path!r}, whose {N} blocks have sides {i} and {o}: "
            f"choose 1 to {min(i, o)}, fewer blocks, or a rank of its own by rank_pattern."
        )
    bound = 1 / math.sqrt(i)
    w1 = jax.random.uniform(key, (N, i, q), jnp.float32, -bound, bound)
    return {"w1": w1, "w2": jnp.zeros((N, q, o), jnp.float32)}, {}
