"""MiSS, Bat and their small form: one small tile of weights, spread over a frozen kernel.

    miss    y = x W + S(drop(x)) D                       D (r, d_out)
    mini    y = x W + [S(drop(x)) D, S(drop(x)) D, ...]  D (r, m), repeated over the d_out outputs
    bat     W'_ab = W_ab + C_b W_ab + C_b                C (d_out / r, r, r), W_ab the r x r blocks

S(x)_j = x_j + x_(j+r) + x_(j+2r) + ... sums the inputs over groups of r, so MiSS adds row i mod r
of D to row i of W: a LoRA whose A is a stack of identities and costs no product. Bat gives every
output block b one C_b, on the side of the inputs, for all blocks a of the inputs. There is no
scale. D and C start at zero, so the model is unchanged at step 0. Trainable: r d_out for miss and
bat, r m for mini, per kernel.
"""

import functools
import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, Rule, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.methods.lora import check_dropout, check_rank, drop
from pefts.targets import Select, Site, selection

FORMS = ("miss", "bat", "mini")


@factory
def miss(
    rank: int = 64,
    *,
    form: str = "miss",
    mini_rank: int | None = None,
    dropout: float = 0.0,
    **select: Unpack[Select],
) -> Declaration:
    """Matrix shard sharing: y = x W + S(x) D, with S(x) (r,) sums of inputs and D (r, d_out).

    One paper under three titles, and the names have moved between its forms. "Bone: Block-Affine
    Adaptation" is what its first abstract describes, and its code calls Bat: form="bat" here. The
    sum form came later, as the default of "Bone" in Hugging Face PEFT; it is DiSHA's and MiSS's
    form="miss". PEFT keeps all of them under MISS.

    "miss" and "mini" cost less than a LoRA of the same rank, as the sums take the place of a
    product. "bat" depends on W and has to build its kernel, one layer at a time.

    Args:
      rank: r, from 1 to d_in, one for all kernels (the authors' scripts: 64). For "bat" it divides
        d_in and d_out; otherwise a last group of fewer inputs meets the first rows of D.
      form: "miss", "bat" or "mini".
      mini_rank: m, a divisor of every d_out; for "mini" alone. Output j gets column j mod m of D.
        (PEFT's default is 1, which makes all outputs change alike; here it has to be chosen.)
      dropout: probability of dropping an input of the adapter, in calls that are given a "dropout"
        random stream; not for "bat".
      **select: targets, exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact.

    Raises:
      ValueError: rank not positive, larger than d_in, or (bat) no divisor of a side, unknown form,
        mini_rank missing, not wanted or no divisor of d_out, dropout outside [0, 1) or with bat, a
        rank_pattern or alpha_pattern, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.miss(rank=2).init(jax.random.key(0), params).trainable)
      8

    Source: Bone: Block-Affine Adaptation of Large Language Models (later DiSHA: Dimension-Sharding
      Adaptation, and MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing
      Structure), arXiv 2409.15371.
    """
    check_rank(rank)
    check_dropout(dropout)
    _check_form(form, mini_rank, dropout)
    start = functools.partial(_start, rank=rank, form=form, mini_rank=mini_rank)
    return Declaration(
        rule=Rule(start, _affine) if form == "bat" else _summed(start, dropout),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0),
    )


def _summed(start: Any, dropout: float) -> Rule:
    """The forms that add sums of inputs times D."""

    def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
        del call
        d_in, d_out = W.shape
        D = p["D"].astype(W.dtype)
        tiles = jnp.tile(D, (-(-d_in // D.shape[0]), d_out // D.shape[1]))
        return W + tiles[:d_in]

    def linear(x: jax.Array, W: Any, p: State, call: Call) -> jax.Array:
        y, D = call.dot(x, W), p["D"]
        update = matmul(group_sums(drop(x, dropout, call.key), D.shape[0]), D)
        return y + jnp.tile(update, y.shape[-1] // D.shape[1])

    return Rule(start, effective, linear, uses_key=dropout > 0)


def group_sums(x: jax.Array, r: int) -> jax.Array:
    """S(x) (..., r): S(x)_j is the sum of the x_i with i mod r = j."""
    missing = -x.shape[-1] % r
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return padded.reshape(*x.shape[:-1], -1, r).sum(-2)


def _affine(W: jax.Array, p: State, call: Call) -> jax.Array:
    """Every block W_ab as W_ab + C_b (W_ab + I)."""
    del call
    C = p["C"].astype(W.dtype)
    blocks, r, _ = C.shape
    tiles = W.reshape(-1, r, blocks, r)
    moved = tiles + jnp.eye(r, dtype=W.dtype)[None, :, None, :]
    return (tiles + jnp.einsum("bij,ajbk->aibk", C, moved)).reshape(W.shape)


def _start(
    key: jax.Array,
    W: jax.Array,
    *,
    site: Site,
    stats: Any,
    rank: int,
    form: str,
    mini_rank: int | None,
) -> tuple[dict, dict]:
    del key, W, stats
    _check_fit(site, rank, form, mini_rank)
    if form == "bat":
        return {"C": jnp.zeros((site.d_out // rank, rank, rank), jnp.float32)}, {}
    return {"D": jnp.zeros((rank, mini_rank or site.d_out), jnp.float32)}, {}


def _check_fit(site: Site, rank: int, form: str, mini_rank: int | None) -> None:
    where = f"{site.path!r}, a {site.d_in} x {site.d_out} kernel"
    if rank > site.d_in:
        raise ValueError(
            f"rank={rank} is out of range for {where}: rows of D beyond its inputs would meet "
            f"none; choose 1 to {site.d_in}, or exclude it."
        )
    if form == "bat" and (site.d_in % rank or site.d_out % rank):
        raise ValueError(
            f"rank={rank} does not divide both sides of {where}, into blocks of which form='bat' "
            f"cuts it: choose one of {_divisors(math.gcd(site.d_in, site.d_out))}, or exclude it."
        )
    if mini_rank and site.d_out % mini_rank:
        raise ValueError(
            f"mini_rank={mini_rank} does not divide the outputs of {where}, over which D is "
            f"repeated: choose one of {_divisors(site.d_out)}, or exclude it."
        )


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _check_form(form: str, mini_rank: int | None, dropout: float) -> None:
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; choose one of {FORMS}.")
    if (form == "mini") != (mini_rank is not None):
        raise ValueError(
            f"mini_rank={mini_rank!r} with form={form!r}: it is the number of columns of D in "
            "form='mini', which needs it, and in no other; give a divisor of d_out, such as 64, or "
            "None."
        )
    if mini_rank is not None:
        _check_mini_rank(mini_rank)
    if form == "bat" and dropout > 0:
        raise ValueError(
            f"dropout={dropout!r} with form='bat': its adapter is part of the kernel and has no "
            "input of its own; set it to 0."
        )


def _check_mini_rank(mini_rank: int) -> None:
    if not isinstance(mini_rank, int) or isinstance(mini_rank, bool) or mini_rank < 1:
        raise ValueError(f"mini_rank={mini_rank!r}: give a positive integer, such as 64.")
