"""PiSSA: a low-rank adapter that takes the principal part of a kernel over from it.

    W = U diag(S) V^T                                   U (d_in, k), V (d_out, k), S descending
    y = x W + s (x A B - x A0 B0)                       A (d_in, r), B (r, d_out), s = alpha / r
    A0 = U[:, :r] sqrt(S[:r] / s),  B0 = sqrt(S[:r] / s) V[:, :r]^T

s A0 B0 is the best approximation of W of rank r, and W - s A0 B0 is what stays frozen. W itself is
never rewritten: A and B start at A0 and B0, which are kept, and the change s (A B - A0 B0) runs as
one product of rank 2r that is exactly zero at step 0. A singular value of zero leaves a pair of
zeros in A and B that no gradient moves. Trainable: r (d_in + d_out) per kernel.

Every method that takes a part of W over this way differs in A0 and B0 alone: see `taken_over`.
"""

from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import linalg
from pefts.bound import Call, State
from pefts.core import Declaration, factory
from pefts.low_rank import additive, moved
from pefts.methods.lora import check_rank, scaling
from pefts.targets import Select, Site, selection


@factory
def pissa(
    rank: int = 8,
    alpha: float = 8.0,
    *,
    svd: str = "exact",
    iterations: int = 16,
    **select: Unpack[Select],
) -> Declaration:
    """Principal singular values and vectors adaptation: y = x W + s (x A B - x A0 B0).

    A, A0 (d_in, r), B, B0 (r, d_out); s A0 B0 is the truncation of W to its r largest singular
    values, each of whose roots goes into A0 and B0. Train without weight decay: A and B are a part
    of the pretrained kernel.

    Args:
      rank: r, from 1 to the kernel's smaller side (the paper's Llama-2-7B: 128; Hugging Face PEFT:
        8).
      alpha: s = alpha / r (the paper: alpha = r, so s = 1).
      svd: "exact", or "randomized", which is faster for a small rank of a large kernel.
      iterations: of the randomised decomposition (the paper's scripts: 16).
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + s (A B - A0 B0). pefts.to_lora makes a LoRA of rank 2r of it.

    Raises:
      ValueError: rank or iterations out of range, alpha not positive, unknown svd, or no kernel
        matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.eye(6, 4)}}
      >>> pefts.count(pefts.pissa(rank=2).init(jax.random.key(0), params).trainable)
      20

    Source: PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
      Models, arXiv 2404.02948.
    """
    check_rank(rank)
    check_alpha(alpha, select)
    if svd not in linalg.METHODS:
        raise ValueError(f"svd={svd!r} is unknown; choose one of {linalg.METHODS}.")
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 0:
        raise ValueError(f"iterations={iterations!r}: give an integer of at least 0, such as 16.")

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, stats
        U, S, V = linalg.svd(W, site.rank, method=svd, iterations=iterations)
        s = jnp.asarray(scaling(site), S.dtype)
        root = jnp.sqrt(S / s)
        return taken_over(U * root[None], root[:, None] * V.T, s)

    return Declaration(
        rule=additive(start, factors), selection=selection(**select), rank=rank, alpha=alpha
    )


def taken_over(A0: jax.Array, B0: jax.Array, s: jax.Array) -> tuple[dict, dict]:
    """The state of an adapter that takes s A0 B0 over from W: (trainable, frozen)."""
    return {"A": A0, "B": B0}, {"A0": A0, "B0": B0, "scale": s}


def factors(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
    """s (A B - A0 B0) as one product of rank 2r."""
    del call
    return moved(p["A"], p["B"], p["A0"], p["B0"], p["scale"])


def check_alpha(alpha: float, select: Mapping[str, Any]) -> None:
    """Raise ValueError unless every alpha, of alpha_pattern too, is positive."""
    patterns = select.get("alpha_pattern") or {}
    named = {f"alpha_pattern[{pattern!r}]": value for pattern, value in patterns.items()}
    for name, value in {"alpha": alpha, **named}.items():
        if not value > 0:
            raise ValueError(
                f"{name}={value!r}: the adapter starts as a part of the kernel in units of s = "
                "alpha / r, so give a positive number, such as 8.0."
            )
