"""LoRA-XS: a small square matrix trained between frozen factors of the kernel's own SVD.

    y = x W + s ((x A) R) B          A (d_in, r), R (r, r), B (r, d_out), s = alpha / r

W ~ U diag(S) V^T at rank r gives A = U diag(S) and B = V^T (`sigma_on` moves S), both frozen; W
stays whole. R starts at N(0, 1e-5^2), so the model is nearly unchanged at step 0, and exactly with
init_std = 0: A and B are not zero, so R receives a gradient all the same. Because S makes A large,
the learning rate follows s closely. Trainable: r^2 per kernel, whatever its sides.
"""

import math
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import linalg
from pefts.bound import Call, Rule, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.low_rank import additive
from pefts.methods.lora import check_rank, scaling
from pefts.targets import Select, Site, selection

BASES = ("svd", "random")
SIGMA_ON = ("input", "output", "both")


@factory
def lora_xs(
    rank: int = 16,
    alpha: float = 16.0,
    *,
    init_std: float = 1e-5,
    sigma_on: str = "input",
    basis: str = "svd",
    svd: str = "exact",
    **select: Unpack[Select],
) -> Declaration:
    """LoRA with an r x r core: y = x W + s ((x A) R) B, with A (d_in, r), R (r, r), B (r, d_out).

    A and B are frozen, from the r largest singular triplets of W; R alone is trained.

    NOTE(paper): the paper gives the pair (U_r Sigma_r, V_r^T), and which of its sides is the input
      depends on whether inputs are rows or columns (unchecked); the released code puts Sigma on the
      input. The model computes the same either way, but Adam does not train it the same.

    Args:
      rank: r, from 1 to the kernel's smaller side (paper: 4 to 25 on GLUE, 64 for mathematics).
      alpha: s = alpha / r (paper: 16 on GLUE, r for mathematics).
      init_std: standard deviation of R at first (released code: 1e-5); 0 leaves the model exactly
        unchanged at step 0.
      sigma_on: where the singular values stand: "input" (A = U S), "output" (B = S V^T) or "both"
        (their square root in each).
      basis: "svd", or "random" for the paper's ablation: A uniform on +-1/sqrt(r) and B on
        +-1/sqrt(d_out), which is Kaiming's rule with a = sqrt(5) as the released code applies it.
      svd: "exact", or "randomized" (as in the released code), which is faster for a small rank of a
        large kernel.
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + s A R B.

    Raises:
      ValueError: rank out of range, init_std negative or not finite, unknown sigma_on, basis or
        svd, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.eye(6, 4)}}
      >>> pefts.count(pefts.lora_xs(rank=3).init(jax.random.key(0), params).trainable)
      9

    Source: LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters,
      arXiv 2405.17604.
    """
    check_rank(rank)
    for argument, value, known in (
        ("sigma_on", sigma_on, SIGMA_ON),
        ("basis", basis, BASES),
        ("svd", svd, linalg.METHODS),
    ):
        if value not in known:
            raise ValueError(f"{argument}={value!r} is unknown; choose one of {known}.")
    if not 0 <= init_std < math.inf:
        raise ValueError(f"init_std={init_std!r}: give 0 or a small positive number, such as 1e-5.")

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del stats
        core_key, basis_key = jax.random.split(key)
        if basis == "random":
            A, B = _random_basis(basis_key, site)
        else:
            A, B = _own_basis(W, site.rank, sigma_on, svd)
        R = init_std * jax.random.normal(core_key, (site.rank, site.rank), A.dtype)
        return {"R": R}, {"A": A, "B": B, "scale": jnp.asarray(scaling(site), A.dtype)}

    return Declaration(
        rule=between(start),
        selection=selection(**select),
        traits=Traits(identity_at_init=init_std == 0),
        rank=rank,
        alpha=alpha,
    )


def between(start: Callable[..., tuple[dict, dict]]) -> Rule:
    """The rule of W' = W + s A R B, in which R alone is trained."""

    def factors(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
        del call
        return p["A"], p["scale"] * (p["R"] @ p["B"])

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        h = call.dot(x, p["A"])
        h = matmul(h * p["scale"].astype(h.dtype), p["R"])
        return call.dot(x, W) + matmul(h, p["B"])

    return additive(start, factors)._replace(linear=linear)


def _own_basis(W: jax.Array, rank: int, sigma_on: str, svd: str) -> tuple[jax.Array, jax.Array]:
    U, S, V = linalg.svd(W, rank, method=svd)
    left = {"input": S, "output": jnp.ones_like(S), "both": jnp.sqrt(S)}[sigma_on]
    right = {"input": jnp.ones_like(S), "output": S, "both": jnp.sqrt(S)}[sigma_on]
    return U * left[None, :], right[:, None] * V.T


def _random_basis(key: jax.Array, site: Site) -> tuple[jax.Array, jax.Array]:
    key_A, key_B = jax.random.split(key)
    shape_A, shape_B = (site.d_in, site.rank), (site.rank, site.d_out)
    bound_A, bound_B = 1 / math.sqrt(site.rank), 1 / math.sqrt(site.d_out)
    A = jax.random.uniform(key_A, shape_A, jnp.float32, -bound_A, bound_A)
    return A, jax.random.uniform(key_B, shape_B, jnp.float32, -bound_B, bound_B)
