"""LoRA-SB: LoRA-XS whose factors and core come from an estimate of the first full update.

    D = -eta0 sign(G)                G (d_in, d_out), the loss's gradient with respect to W
    D ~ U diag(S) V^T at rank r      A = U (d_in, r), R = diag(S) / s (r, r), B = V^T (r, d_out)
    y = x W + s ((x A) R) B          s = 1

A and B are frozen and orthonormal, so that R's gradient A^T G B^T is, between A and B, the
projection of the full gradient G with no scaling factor to tune. The model is not unchanged at
step 0: it holds the rank-r part of the first step of Adam already; W itself stays whole. Only the
signs of G count, so the loss may be scaled freely; where G is exactly zero D is zero too.
Trainable: r^2 per kernel.
"""

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import linalg
from pefts.core import Declaration, Traits, factory
from pefts.methods.lora import check_rank
from pefts.methods.lora_xs import between
from pefts.targets import Select, Site, selection


@factory
def lora_sb(
    rank: int = 96,
    *,
    eta0: float,
    svd: str = "exact",
    **select: Unpack[Select],
) -> Declaration:
    """LoRA-XS started at the first full update: y = x W + ((x A) R) B, -eta0 sign(G) ~ A R B.

    A (d_in, r) and B (r, d_out) are frozen with orthonormal columns and rows, R (r, r) is trained
    and starts diagonal and positive. G comes from pefts.calibrate(..., peft, loss=loss).

    NOTE(paper): the released code rounds A, B and R to bfloat16, where they are orthonormal to 1e-2
      only; here they are float32.

    Args:
      rank: r, from 1 to the kernel's smaller side (paper: 96 for arithmetic and commonsense, 24 on
        GLUE).
      eta0: the size of the first step, above 0: see `first_step_size`.
      svd: "exact", or "randomized", which is faster for a small rank of a large kernel. That of
        the released code has no oversampling, and misses the best approximation by about a percent
        where D's spectrum is flat.
      **select: targets, exclude, rank_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + A R B.

    Raises:
      ValueError: rank or eta0 out of range, unknown svd, no gradients in stats, or no kernel
        matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
      >>> stats = {"query/kernel": {"gradient": jax.numpy.ones((6, 4))}}
      >>> peft = pefts.lora_sb(rank=1, eta0=0.01)
      >>> dense = peft.merge(params, peft.init(jax.random.key(0), params, stats))
      >>> round(float(dense["query"]["kernel"][0, 0]), 6)
      0.99

    Source: Initialization using Update Approximation is a Silver Bullet for Extremely Efficient
      Low-Rank Fine-Tuning, arXiv 2411.19557.
    """
    check_rank(rank)
    if svd not in linalg.METHODS:
        raise ValueError(f"svd={svd!r} is unknown; choose one of {linalg.METHODS}.")
    if not 0 < eta0 < math.inf:
        raise ValueError(
            f"eta0={eta0!r}: give the size of the first step, a positive number; see "
            "pefts.methods.lora_sb.first_step_size."
        )

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, W
        U, S, V = linalg.svd(-eta0 * jnp.sign(stats["gradient"]), site.rank, method=svd)
        return {"R": jnp.diag(S)}, {"A": U, "B": V.T, "scale": jnp.ones((), S.dtype)}

    return Declaration(
        rule=between(start),
        selection=selection(**select),
        traits=Traits(identity_at_init=False, needs=("gradient",)),
        rank=rank,
    )


def first_step_size(learning_rate: float, warmup_steps: int) -> float:
    """eta0 of a run: the learning rate of its first update, learning_rate / warmup_steps.

    NOTE(paper): the released code counts the steps of the loader that estimates the gradients, not
      those of the optimizer.

    Args:
      learning_rate: the peak.
      warmup_steps: the length of a linear warm-up, in updates of the optimizer; 0 for none.

    Raises:
      ValueError: either out of range.

    Example:
      >>> first_step_size(1e-4, 20)
      5e-06
    """
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate={learning_rate!r}: give a positive number.")
    if not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps!r}: give a number of updates from 0.")
    return learning_rate / max(1, warmup_steps)
