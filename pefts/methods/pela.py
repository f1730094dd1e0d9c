"""PELA: replace each kernel by two factors of a fixed compression and train those.

    r = floor(d_in d_out / (c (d_in + d_out)))
    y = (x A) B      A = U_r sqrt(S_r) (d_in, r), B = sqrt(S_r) V_r^T (r, d_out)

A B is the best approximation of rank r at first, so the model differs from the base at step 0. The
paper then trains with the base as a teacher (config.distill of train.py) and with the penalty
    w_inf mean over kernels of (max_ij |A B - W|_ij - eps)^2
Kernels with fewer than 10 outputs stay as they are. Trainable: r (d_in + d_out) per kernel.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import linalg, paths, views
from pefts.core import Declaration, Params, PeftState, Sites, Traits, factory
from pefts.low_rank import replacing
from pefts.targets import Select, Selection, Site, selection

FEW_OUTPUTS = 10  # kernels with fewer are small heads


@factory
def pela(
    compression: float = 2.0,
    *,
    w_inf: float = 0.0,
    eps: float = 1e-3,
    **select: Unpack[Select],
) -> Declaration:
    """Low-rank model in place of the kernels: y = (x A) B, with A (d_in, r) and B (r, d_out).

    r = floor(d_in d_out / (c (d_in + d_out))). Kernels with fewer than 10 outputs are left as they
    are. In the paper's programs all that is not factored trains too: the biases by
    pefts.chain(pefts.bitfit(), pefts.pela()), norms and embeddings as well by
    pefts.chain(pefts.full(exclude="kernel"), pefts.pela()).

    Args:
      compression: c, at least 1: the parameters of a kernel over those of its factors (DeiT and
        Swin: 2; ALBEF: 3).
      w_inf: weight of the penalty (max |A B - W| - eps)^2; above 0 it multiplies A B out for each
        kernel in each step, and `penalty` needs the base (DeiT: 0; Swin and ALBEF: 1).
      eps: the penalty pulls the largest change of an entry to this value, from below too (ALBEF:
        1e-3; Swin: 0).
      **select: targets, exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft whose merge writes A B in place of the kernels. The model changes at step 0.

    Raises:
      ValueError: compression, w_inf or eps out of range; a kernel that is too small for a rank of
        at least 1; only kernels with few outputs; at the call of `penalty`: no base where w_inf is
        above 0.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.eye(12, 20)}}
      >>> state = pefts.pela(compression=1.5).init(jax.random.key(0), params)
      >>> jax.tree.map(jax.numpy.shape, state.trainable)
      {'query/kernel': {'A': (12, 5), 'B': (5, 20)}}

    Source: PELA: Learning Parameter-Efficient Models with Low-Rank Approximation, arXiv 2310.10700.
    """
    _check(compression, w_inf, eps)
    chosen = selection(**select)

    def prepare(
        sites: Sites, matrix_of: Callable[[Site], jax.Array], stats: Any
    ) -> tuple[Sites, Any]:
        del matrix_of
        return _with_ranks(sites, compression), stats

    def penalty(state: PeftState, params: Params | None = None) -> jax.Array:
        if params is None:
            raise ValueError(
                f"w_inf={w_inf}: pela's penalty compares the factors with the kernels that they "
                "replace, and params is None; call peft.penalty(state, params) with the base."
            )
        return w_inf * _mean_excess(state, params, chosen, eps)

    return Declaration(
        rule=replacing(_start, lambda p, call: (p["A"], p["B"])),
        selection=chosen,
        traits=Traits(identity_at_init=False),
        prepare=prepare,
        penalty=penalty if w_inf > 0 else None,
    )


def rank_of(d_in: int, d_out: int, compression: float) -> int:
    """floor(d_in d_out / (c (d_in + d_out))); 0 where the kernel is too small."""
    return int(d_in * d_out / (compression * (d_in + d_out)))


def largest_change(A: jax.Array, B: jax.Array, W: jax.Array) -> jax.Array:
    """max_ij |A B - W|_ij in float32 or better; its gradient is that of one entry.

    The entry is found first and computed again by itself, so nothing of the kernel's size is kept
    for the backward pass.
    """
    W = linalg.precise(W)
    A, B = A.astype(W.dtype), B.astype(W.dtype)
    product = jnp.matmul(*jax.lax.stop_gradient((A, B)), precision=jax.lax.Precision.HIGHEST)
    row, column = jnp.unravel_index(jnp.argmax(jnp.abs(product - W)), W.shape)
    # A sum of products, exact on devices whose matrix units round their operands.
    return jnp.abs(jnp.sum(A[row] * B[:, column]) - W[row, column])


def _mean_excess(state: PeftState, params: Params, chosen: Selection, eps: float) -> jax.Array:
    """The mean over all kernels, stacked ones one by one, of (max |A B - W| - eps)^2."""
    flat, excess = paths.flatten(params), []
    for path, group in sorted(state.trainable.items()):
        W = views.to_matrix(flat[path], chosen.axes_of(path, tuple(flat[path].shape)))
        each = [leaf.reshape(-1, *leaf.shape[-2:]) for leaf in (group["A"], group["B"], W)]
        changes = jax.lax.map(lambda one: largest_change(*one), tuple(each))
        excess.append((changes - eps) ** 2)
    return jnp.mean(jnp.concatenate(excess))


def _with_ranks(sites: Sites, compression: float) -> Sites:
    """The sites with their ranks, without those of few outputs."""
    kept = [site for site in sites if site.d_out >= FEW_OUTPUTS]
    if not kept:
        raise ValueError(
            f"all {len(sites)} targeted kernels have fewer than {FEW_OUTPUTS} outputs, for "
            f"instance {sites[0].path!r}, and pela leaves such kernels as they are: give others."
        )
    return tuple(dataclasses.replace(site, rank=_checked_rank(site, compression)) for site in kept)


def _checked_rank(site: Site, compression: float) -> int:
    rank = rank_of(site.d_in, site.d_out, compression)
    if rank < 1:
        raise ValueError(
            f"compression={compression} leaves no rank to {site.path!r}, a {site.d_in} x "
            f"{site.d_out} kernel: at most {site.d_in * site.d_out / (site.d_in + site.d_out):.3g} "
            "does; lower it, or exclude the kernel."
        )
    return rank


def _start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
    del key, stats
    U, S, V = linalg.svd(W, site.rank)
    root = jnp.sqrt(S)
    return {"A": U * root[None], "B": root[:, None] * V.T}, {}


def _check(compression: float, w_inf: float, eps: float) -> None:
    if not 1 <= compression < float("inf"):
        raise ValueError(
            f"compression={compression!r}: give a number of at least 1, such as 2 for factors with "
            "half of the kernel's parameters."
        )
    for name, value in (("w_inf", w_inf), ("eps", eps)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value!r}: give a finite number of at least 0.")
