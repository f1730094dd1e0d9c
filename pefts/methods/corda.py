"""CorDA: a low-rank adapter that takes over the part of a kernel that its inputs single out.

    C = E_samples[X^T X]                                X (tokens, d_in) of one sample, normalised
    C_d = C + delta mean(diag C) I                      delta = 0.01, doubled while C_d is singular
    C_d W = U diag(S) V^T                               V (d_out, k), S descending
    y = x W + s (x A B - x A0 B0)                       A (d_in, r), B (r, d_out), s = alpha / r
    A0 = C_d^-1 U[:, I] sqrt(S[I] / s),  B0 = sqrt(S[I] / s) V[:, I]^T

I holds the first r indices (instruction-previewed mode, for a new task) or the last r
(knowledge-preserved mode). It is C_d that weights W and not its root, so the first r parts are the
best approximation of W in ||C_d (W - .)||_F. As in PiSSA A and B start at A0 and B0 and the change
is exactly zero at step 0. Trainable: r (d_in + d_out) per kernel.

C_d^-1 U diag(S) = W V, so A0 is computed as W V[:, I] / sqrt(s S[I]), without an inverse: s A0 B0
is then W projected onto V[:, I] to float32's rounding, whatever the condition of C_d, where a solve
loses three digits more at a condition number of 1e5. Singular values below the rounding of the
largest count as that rounding.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import jax.scipy.linalg as scipy_linalg

from pefts import linalg
from pefts.core import Declaration, Traits, factory
from pefts.low_rank import additive
from pefts.methods.lora import check_rank, scaling
from pefts.methods.pissa import check_alpha, factors, taken_over
from pefts.targets import Select, Site, selection

MODES = ("ipm", "kpm")
DAMPING = 0.01  # delta at first
LARGEST = 1e4  # delta at last: C_d is then a multiple of the identity but for 1 part in 10,000
INVERTIBLE = 0.05  # ||C_d C_d^-1 - I||_F below which C_d counts as invertible


@factory
def corda(
    rank: int = 8, alpha: float = 8.0, *, mode: str = "ipm", **select: Unpack[Select]
) -> Declaration:
    """Context-oriented decomposition adaptation: y = x W + s (x A B - x A0 B0), from C_d W.

    A, A0 (d_in, r), B, B0 (r, d_out); s A0 B0 = W V V^T with r right singular vectors V (d_out, r)
    of C_d W, and C_d (d_in, d_in) the damped second moment of the kernel's inputs. `peft.init`
    needs the statistics of pefts.calibrate. Train without weight decay: A and B are a part of the
    pretrained kernel.

    Args:
      rank: r, from 1 to the kernel's smaller side (the paper: 128; Hugging Face PEFT: 8).
      alpha: s = alpha / r (the paper's code: alpha = r, so s = 1).
      mode: "ipm" takes over the r directions that matter most on the calibration data, which is
        that of the new task; "kpm" the r that matter least, on data of the knowledge to keep
        (Hugging Face PEFT: "ipm").
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + s (A B - A0 B0). pefts.to_lora makes a LoRA of rank 2r of it.

    Raises:
      ValueError: rank out of range, alpha not positive, unknown mode, no kernel matches; at init,
        no statistics, or moments that no damping makes invertible.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.eye(6, 4)}}
      >>> stats = {"query/kernel": {"sample_moment": jax.numpy.eye(6), "samples": 8.0}}
      >>> pefts.count(pefts.corda(rank=2).init(jax.random.key(0), params, stats).trainable)
      20

    Source: CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for
      Task-Aware Parameter-Efficient Fine-tuning, arXiv 2406.05223.
    """
    check_rank(rank)
    check_alpha(alpha, select)
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; choose one of {MODES}.")

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key
        W = linalg.precise(W)
        _, S, V = linalg.svd(damped(stats["sample_moment"].astype(W.dtype)) @ W)
        chosen = slice(site.rank) if mode == "ipm" else slice(-site.rank, None)
        eps, tiny = jnp.finfo(S.dtype).eps, jnp.finfo(S.dtype).tiny
        S, V = jnp.maximum(S, eps * S[0] + tiny / eps)[chosen], V[:, chosen]
        s = jnp.asarray(scaling(site), S.dtype)
        return taken_over(W @ V / jnp.sqrt(s * S)[None], jnp.sqrt(S / s)[:, None] * V.T, s)

    return Declaration(
        rule=additive(start, factors),
        selection=selection(**select),
        traits=Traits(needs=("sample_moment",)),
        rank=rank,
        alpha=alpha,
        failure=(
            f"the moment of its inputs stays singular with {LARGEST:.0e} times its mean diagonal "
            "added: it holds NaN, or every calibration input there is zero"
        ),
    )


def damped(C: jax.Array) -> jax.Array:
    """C_d = C + delta mean(diag C) I with the first delta that makes it invertible, or NaN.

    delta is 0.01 times a power of 2, and invertible means ||C_d C_d^-1 - I||_F < 0.05.
    """
    eye = jnp.eye(len(C), dtype=C.dtype)
    ridge = jnp.mean(jnp.diagonal(C)) * eye

    def error(delta: jax.Array) -> jax.Array:
        C_d = C + delta * ridge
        # NaN where C_d is not positive definite, which compares as too large.
        return jnp.linalg.norm(C_d @ scipy_linalg.solve(C_d, eye, assume_a="pos") - eye)

    def singular(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return ~(state[1] < INVERTIBLE) & (state[0] < LARGEST)

    def double(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return 2 * state[0], error(2 * state[0])

    first = jnp.asarray(DAMPING, C.dtype)
    delta, final = jax.lax.while_loop(singular, double, (first, error(first)))
    return jnp.where(final < INVERTIBLE, C + delta * ridge, jnp.nan)
