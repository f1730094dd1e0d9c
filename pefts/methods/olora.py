"""OLoRA: a low-rank adapter that starts from a kernel's QR decomposition.

    W^T = Q R                                           Q (d_out, k) orthonormal columns
    y = x W + s (x A B - x A0 B0)                       A (d_in, r), B (r, d_out), s = alpha / r
    A0 = R[:r]^T,  B0 = Q[:, :r]^T

B0 has orthonormal rows, and A0 B0 is W with its rows projected onto the span of the first r of
them. As in PiSSA W is never rewritten: A and B start at A0 and B0, which are kept, and the change
is exactly zero at step 0. s is not divided out of A0 and B0, as in Hugging Face PEFT.
Trainable: r (d_in + d_out) per kernel.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import linalg
from pefts.core import Declaration, factory
from pefts.low_rank import additive
from pefts.methods.lora import check_rank, scaling
from pefts.methods.pissa import check_alpha, factors, taken_over
from pefts.targets import Select, Site, selection


@factory
def olora(rank: int = 8, alpha: float = 8.0, **select: Unpack[Select]) -> Declaration:
    """Orthonormal low-rank adaptation: y = x W + s (x A B - x A0 B0), from W^T = Q R.

    A, A0 (d_in, r), B, B0 (r, d_out); A0 = R[:r]^T and B0 = Q[:, :r]^T with Q (d_out, k). Train
    without weight decay: A and B are a part of the pretrained kernel.

    Args:
      rank: r, from 1 to the kernel's smaller side (Hugging Face PEFT: 8).
      alpha: s = alpha / r (Hugging Face PEFT: 8).
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + s (A B - A0 B0). pefts.to_lora makes a LoRA of rank 2r of it.

    Raises:
      ValueError: rank out of range, alpha not positive, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.eye(6, 4)}}
      >>> pefts.count(pefts.olora(rank=2).init(jax.random.key(0), params).trainable)
      20

    Source: OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, arXiv 2406.01775.
    """
    check_rank(rank)
    check_alpha(alpha, select)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, stats
        # The first r columns of Q need those of W^T alone, and R[:r] = Q[:, :r]^T W^T.
        Q, _ = linalg.qr(W[: site.rank].T)
        return taken_over(W.astype(Q.dtype) @ Q, Q.T, jnp.asarray(scaling(site), Q.dtype))

    return Declaration(
        rule=additive(start, factors), selection=selection(**select), rank=rank, alpha=alpha
    )
