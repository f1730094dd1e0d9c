"""SORSA: W's r largest singular triplets are trained, their vectors kept nearly orthonormal.

    y = x W + s (((x P) * sigma) Q - ((x P0) * sigma0) Q0)        s = 1, or alpha / r

P (d_in, r), sigma (r,) and Q (r, d_out) start at P0, sigma0 and Q0, the largest singular triplets
of W, so the model is unchanged at step 0; in the paper's terms W - s P0 diag(sigma0) Q0 is frozen
and s P diag(sigma) Q trained. The penalty is gamma / peak_learning_rate times

    L = mean over the N kernels of (||P^T P - I||_F + ||Q Q^T - I||_F) / 2.

Trainable: r (d_in + d_out + 1) per kernel. Weight decay would shrink the pretrained model itself:
set it to 0.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import linalg
from pefts.bound import Call, State
from pefts.core import Declaration, Params, PeftState, factory
from pefts.low_rank import additive, moved
from pefts.methods.lora import check_rank, scaling
from pefts.methods.pissa import check_alpha
from pefts.targets import Select, Site, selection


@factory
def sorsa(
    rank: int = 4,
    alpha: float | None = None,
    *,
    gamma: float = 4e-4,
    peak_learning_rate: float = 3e-5,
    decoupled: bool = False,
    **select: Unpack[Select],
) -> Declaration:
    """Regularised singular triplets: y = x W + s (x P diag(sigma) Q - x P0 diag(sigma0) Q0).

    P (d_in, r), sigma (r,) and Q (r, d_out) train; P0, sigma0 and Q0 are where they start, W's
    largest singular triplets. Set weight decay to 0.

    Args:
      rank: r, from 1 to the kernel's smaller side (released code: 4; the paper on Llama-2-7B: 128).
      alpha: s = alpha / r; s = 1 if None (the released code).
      gamma: strength of the orthonormality penalty (the paper: 4e-4).
      peak_learning_rate: the penalty's weight is gamma / peak_learning_rate; give the peak of the
        optimizer's schedule (the paper on Llama-2-7B: 3e-5).
      decoupled: no penalty; instead each P and Q moves by -gamma times L's gradient after each
        update of the optimizer, as the paper has it, and peak_learning_rate is not used.
      **select: targets, exclude, rank_pattern, alpha_pattern (with an alpha), axes; see
        pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + s (P diag(sigma) Q - P0 diag(sigma0) Q0). Training needs its
      `penalty`, or its `update` if decoupled.

    Raises:
      ValueError: rank out of range, alpha or peak_learning_rate not positive, a negative gamma, or
        no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.eye(6, 4)}}
      >>> pefts.count(pefts.sorsa(rank=2).init(jax.random.key(0), params).trainable)
      22

    Source: SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large
      Language Models, arXiv 2409.00055.
    """
    check_rank(rank)
    if alpha is not None:
        check_alpha(alpha, select)
    _check(gamma, peak_learning_rate)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, stats
        U, S, V = linalg.svd(W, site.rank)
        # NOTE(paper): with s != 1 the frozen part of W keeps (1 - s) of the triplets, as in the
        # released code; no 1 / s stands in the factors.
        s = 1.0 if alpha is None else scaling(site)
        trainable = {"P": U, "sigma": S, "Q": V.T}
        return trainable, {"P0": U, "sigma0": S, "Q0": V.T, "scale": jnp.asarray(s, S.dtype)}

    def penalty(state: PeftState, params: Params | None = None) -> jax.Array:
        # NOTE(paper): the released code adds this gradient after it has clipped the task's; here
        # both are clipped together.
        del params
        return gamma / peak_learning_rate * _distance(state.trainable)

    def update(state: PeftState, grads: Any, step: jax.Array) -> PeftState:
        # NOTE(paper): L's gradient is taken where the optimizer's step has led, not before it.
        del grads, step
        pull = jax.grad(_distance)(state.trainable)
        return state._replace(
            trainable=jax.tree.map(lambda leaf, g: leaf - gamma * g, state.trainable, pull)
        )

    return Declaration(
        rule=additive(start, _factors),
        selection=selection(**select),
        rank=rank,
        alpha=alpha,
        penalty=None if decoupled else penalty,
        update=update if decoupled else None,
    )


def _factors(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
    del call
    A, A0 = p["P"] * p["sigma"][None], p["P0"] * p["sigma0"][None]
    return moved(A, p["Q"], A0, p["Q0"], p["scale"])


def _distance(trainable: Any) -> jax.Array:
    """L, a mean over 2 N matrices; each layer of a stack counts."""
    distances = []
    for group in trainable.values():
        for F in (group["P"], jnp.matrix_transpose(group["Q"])):
            distances.append(_from_orthonormal(F).ravel())
    return jnp.mean(jnp.concatenate(distances))


def _from_orthonormal(F: jax.Array) -> jax.Array:
    """||F^T F - I||_F of F (*stack, d, r), and zero up to the rounding of F^T F."""
    d, r = F.shape[-2:]
    gram = jnp.matmul(jnp.matrix_transpose(F), F, precision=jax.lax.Precision.HIGHEST)
    eye = jnp.broadcast_to(jnp.eye(r, dtype=F.dtype), gram.shape)
    squared = jnp.sum((gram - eye) ** 2, axis=(-2, -1))
    # NOTE(paper): the root has no derivative at its minimum, and beside it, as after every
    # initialisation, a gradient of full size in whatever direction the rounding points; with the
    # weight of some 13 that would be noise of its own on every device count.
    floor = 4 * d * r * float(jnp.finfo(F.dtype).eps) ** 2
    counts = squared > floor
    root = jnp.sqrt(jnp.where(counts, squared, jnp.ones_like(squared)))
    return jnp.where(counts, root, jnp.zeros_like(root))


def _check(gamma: float, peak_learning_rate: float) -> None:
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma={gamma!r}: give a finite number of at least 0, such as 4e-4.")
    if not 0 < peak_learning_rate < float("inf"):
        raise ValueError(
            f"peak_learning_rate={peak_learning_rate!r}: give the positive peak of the optimizer's "
            "schedule, such as 3e-5."
        )
