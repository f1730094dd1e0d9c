"""HiRA: a frozen kernel multiplied entry by entry with one plus a low-rank matrix.

    y = x W + drop(x) (W * (A B)) + b          A (d_in, r), B (r, d_out), * entry by entry

W * (A B) has a rank of up to r times W's, that is, any. A starts uniform on +-1/sqrt(d_in) and B at
zero (embeddings: A zero and B normal), so the model is unchanged at step 0. There is no scale.
Trainable: r (d_in + d_out) per kernel, as LoRA.

No product avoids the dense kernel: one for each column of A, sum_k ((x * A_k) W) * B_k, would cost
r products with W. So W * (1 + A B) is made in each call, of r d_in d_out multiply-adds, and again
in its backward pass instead of being kept; that pass also computes x^T dy (d_in, d_out), as in full
fine-tuning. The memory beside LoRA's is that of the one kernel in work; dropout takes a second
product with a kernel.
"""

from typing import Any, Unpack

import jax

from pefts.bound import Call, Rule, State
from pefts.core import Declaration, Traits, factory
from pefts.linalg import precise
from pefts.methods.lora import check_dropout, check_rank, drop, factors
from pefts.targets import Select, Site, selection


@factory
def hira(
    rank: int = 32,
    *,
    dropout: float = 0.0,
    **select: Unpack[Select],
) -> Declaration:
    """Hadamard high-rank adaptation: y = x (W * (1 + A B)), with A (d_in, r) and B (r, d_out).

    Entries of W that are zero stay zero, and changes are in proportion to the others.

    Args:
      rank: r, from 1 to the kernel's smaller side (Hugging Face PEFT: 32).
      dropout: probability of dropping an input of the adapter; active in calls that are given a
        "dropout" random stream.
      **select: targets, exclude, rank_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W * (1 + A B).

    Raises:
      ValueError: rank out of range, dropout outside [0, 1), an alpha_pattern, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> pefts.count(pefts.hira(rank=2).init(jax.random.key(0), params).trainable)
      20

    Source: HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models, ICLR
      2025 (openreview TwJrTz9cRS); checked in Hugging Face PEFT's code, unchecked in the paper.
    """
    check_rank(rank)
    check_dropout(dropout)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del W, stats
        return factors(key, site), {}

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        dropped = drop(x, dropout, call.key)
        is_whole = dropped is x

        # Made again in the backward pass, or the adapted kernels of all layers would be kept.
        @jax.checkpoint
        def product(x: Any, W: Any, p: State) -> jax.Array:
            W = precise(call.dense(W))
            return call.dot(x, effective(W, p, call) if is_whole else W * share(p, W.dtype))

        y = product(dropped, W, dict(p))
        return y if is_whole else call.dot(x, W) + y

    return Declaration(
        rule=Rule(start, effective, linear, through_dot=True, uses_key=dropout > 0),
        selection=selection(**select),
        traits=Traits(stochastic=dropout > 0),
        rank=rank,
    )


def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
    """W * (1 + A B)."""
    del call
    return W * (1 + share(p, W.dtype))


def share(p: State, dtype: Any) -> jax.Array:
    """A B (d_in, d_out): by which share of itself each entry of W changes."""
    return p["A"].astype(dtype) @ p["B"].astype(dtype)
