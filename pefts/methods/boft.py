"""BOFT: the input of a frozen kernel is rotated by a product of sparse rotations, a butterfly.

    y = ((x R) W) * s + b            R = F_m ... F_1, s (d_out,)
    F_i = P_i diag(D_i1, ..., D_in) P_i^T        D_ij = (I - K_ij)(I + K_ij)^-1, each b x b

K = (A - A^T) / 2 with A (m, n, b, b), n = d_in / b; half of A's entries say what the others do. F_i
reads x in half blocks and rotates pairs of them: neighbours in F_1, those 2^(i-1) apart in F_i, so
that m factors mix 2^(m-1) b inputs. The shuffles P_i are transpositions of x, no matrices. A starts
at zero and s at one, so the model is unchanged at step 0. Trainable: m n b^2 + d_out per kernel.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import linalg
from pefts.bound import Call, Rule, State
from pefts.core import Declaration, Traits, factory
from pefts.methods.lora import check_dropout
from pefts.methods.oft import check_sizes, kept, sizes
from pefts.targets import Select, Site, selection

DEFAULT_SIZE = 4


@factory
def boft(
    block_size: int | None = None,
    blocks: int | None = None,
    *,
    factors: int = 1,
    dropout: float = 0.0,
    **select: Unpack[Select],
) -> Declaration:
    """Butterfly orthogonal fine-tuning: y = ((x R) W) * s + b, R of m sparse rotations, s (d_out,).

    R is exactly orthogonal. Set weight decay to 0, which would pull s to zero and not to one.

    Args:
      block_size: b, a divisor of every kernel's d_in, from 2 (4 where `blocks` is absent too);
        even where m > 1.
      blocks: n = d_in / b instead; a multiple of 2^(m-1).
      factors: m (Hugging Face PEFT: 1, which is a block-diagonal rotation).
      dropout: probability of replacing a block of a factor by the identity; active in calls that
        are given a "dropout" random stream.
      **select: targets, exclude, axes; see pefts.targets.Select. A convolution's kernel is rotated
        over its window and channels, densely, one layer at a time.

    Returns:
      A Peft; merging is exact, (R W) * s column by column.

    Raises:
      ValueError: block_size and blocks both given, out of range or no divisor of a d_in, factors
        below 1 or more than the blocks of a kernel allow, an odd block size with factors, dropout
        outside [0, 1), a target that is an embedding, a rank_pattern or alpha_pattern, or no
        kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((8, 3))}}
      >>> peft = pefts.boft(block_size=2, factors=3)
      >>> pefts.count(peft.init(jax.random.key(0), params).trainable)
      51

    Source: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv 2311.06243.
    """
    check_sizes(block_size, blocks)
    check_dropout(dropout)
    if not isinstance(factors, int) or isinstance(factors, bool) or factors < 1:
        raise ValueError(f"factors={factors!r}: give a positive integer, such as 1.")

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, W, stats
        b, n = sizes(site, block_size, blocks, DEFAULT_SIZE)
        _check_factors(site, factors, b, n)
        A = jnp.zeros((factors, n, b, b), jnp.float32)
        return {"A": A, "s": jnp.ones((site.d_out,), jnp.float32)}, {}

    def linear(x: jax.Array, W: Any, p: State, call: Call) -> jax.Array:
        D = kept(rotations(p["A"]), dropout, call.key)
        for level in reversed(range(factors)):
            x = factor_product(x, D[level], level)
        y = call.dot(x, W)
        return y * p["s"].astype(y.dtype).reshape((1,) * (y.ndim - 1) + p["s"].shape)

    return Declaration(
        rule=Rule(start, effective, linear, uses_key=dropout > 0),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0),
    )


def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
    """(R W) * s."""
    del call
    D, columns = rotations(p["A"].astype(W.dtype)), W.T
    for level in range(len(D)):
        columns = factor_product(columns, jnp.swapaxes(D[level], -1, -2), level)
    return columns.T * p["s"].astype(W.dtype)[None]


def rotations(A: jax.Array) -> jax.Array:
    """D (m, n, b, b) of A (m, n, b, b), in float32 or better."""
    return linalg.cayley((A - jnp.swapaxes(A, -1, -2)) / 2)


def factor_product(x: jax.Array, D: jax.Array, level: int) -> jax.Array:
    """x (..., d_in) times F_i of D (n, b, b), i = level + 1; half blocks 2^level apart meet."""
    if level == 0:
        return linalg.block_diagonal(x, D)
    half, span = D.shape[-1] // 2, 2**level
    together = jnp.swapaxes(x.reshape(*x.shape[:-1], -1, 2, span, half), -3, -2)
    rotated = linalg.block_diagonal(together.reshape(x.shape), D)
    apart = jnp.swapaxes(rotated.reshape(*x.shape[:-1], -1, span, 2, half), -3, -2)
    return apart.reshape(x.shape)


def _check_factors(site: Site, factors: int, b: int, n: int) -> None:
    if factors == 1:
        return
    if b % 2:
        raise ValueError(
            f"factors={factors} exchange half blocks, and the blocks of {site.path!r} have b={b} "
            "entries, an odd number: choose an even block size, or factors=1."
        )
    most = (n & -n).bit_length()  # one more than how often 2 divides n
    if factors > most:
        raise ValueError(
            f"factors={factors} mix {2 ** (factors - 1)} blocks with each other, which does not "
            f"divide the n={n} blocks of {site.path!r} (d_in={site.d_in}, b={b}): choose factors "
            f"from 1 to {most}, or another size of the blocks."
        )
