"""LoLDU: W's LU decomposition stays, its first r pivots are trained.

    W^T = Pm L diag(D) U             Pm a permutation, L (d_out, k) and U (k, d_in) unit triangular
    y = x W + s ((x U_r^T) * (z - z0)) (Pm L_r)^T        z (r,), s = alpha / r

U_r holds the first r rows of U, L_r the first r columns of L, by partial pivoting; in the paper's
terms W - s (Pm L_r diag(z0) U_r)^T is frozen. z starts at z0, the pivots D_r, so the model is
unchanged at step 0. L and U are triangular, not orthogonal, and the first pivots are not the
largest: the product of the first r is no best approximation of W.
Trainable: r per kernel. Weight decay would shrink the pretrained model itself: set it to 0.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import linalg
from pefts.bound import Call, State
from pefts.core import Declaration, Traits, factory
from pefts.low_rank import diagonal
from pefts.methods.lora import check_rank, scaling
from pefts.methods.pissa import check_alpha
from pefts.targets import Select, Site, selection

INITS = ("constant", "lu", "normal", "ones", "s_normal", "s_uniform", "uniform", "zeros")
FORGOTTEN = ("ones", "s_normal", "s_uniform", "zeros")  # by the released code's residual


@factory
def loldu(
    rank: int = 768,
    alpha: float = 1.0,
    *,
    init: str = "lu",
    parity: bool = False,
    **select: Unpack[Select],
) -> Declaration:
    """Training of LU pivots: y = x W + s ((x U_r^T) * (z - z0)) (Pm L_r)^T, s = alpha / r.

    W^T = Pm L diag(D) U by partial pivoting. U_r (r, d_in), Pm L_r (d_out, r) and z0 (r,) stay
    frozen; z (r,) trains. Set weight decay to 0.

    Args:
      rank: r, from 1 to the kernel's smaller side (released code: 768, all of RoBERTa-base).
      alpha: s = alpha / r (released code: 1).
      init: of z, "lu" (the first r pivots D_r), "constant" (their mean), "normal" (their mean and
        standard deviation), "uniform" (on +-|mean| / 2), "s_normal" (0 and 1), "s_uniform" (on
        +-1), "ones" or "zeros".
      parity: z0 = D_r for the last four of these, as in the released code, which changes the model
        at step 0; otherwise z0 is where z starts.
      **select: targets, exclude, rank_pattern, alpha_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + s (Pm L_r diag(z - z0) U_r)^T. The paper's learning rates could
      not be checked; vectors of this kind want 1e-3 to 5e-2.

    Raises:
      ValueError: rank out of range, alpha not positive, an unknown init, a pivot that is nearly
        zero, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.eye(6, 4)}}
      >>> pefts.count(pefts.loldu(rank=3).init(jax.random.key(0), params).trainable)
      3

    Source: LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient
      Fine-Tuning, arXiv 2410.13618.
    """
    check_rank(rank)
    check_alpha(alpha, select)
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; choose one of {INITS}.")
    # NOTE(paper): the released code subtracts D_r from W whatever these four put into z.
    moves = parity and init in FORGOTTEN

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del stats
        r = site.rank
        permutation, L, D, U = linalg.lu(W.T)
        z = _checked(_initial(key, init, D[:r]), D)
        L = jnp.zeros((site.d_out, r), L.dtype).at[permutation].set(L[:, :r])
        z0 = D[:r] if moves else z
        scale = jnp.asarray(scaling(site), D.dtype)
        return {"z": z}, {"U": U[:r], "L": L, "z0": z0, "scale": scale}

    return Declaration(
        rule=diagonal(start, _parts),
        selection=selection(**select),
        traits=Traits(identity_at_init=not moves),
        rank=rank,
        alpha=alpha,
        failure=(
            "a pivot of its LU decomposition is nearly zero, and a row of U is divided by it; give "
            "this kernel a smaller rank by rank_pattern if a later pivot is meant"
        ),
    )


def _parts(p: State, call: Call) -> tuple[jax.Array, jax.Array, jax.Array]:
    del call
    return p["U"].T, p["scale"] * (p["z"] - p["z0"]), p["L"].T


def _initial(key: jax.Array, init: str, D: jax.Array) -> jax.Array:
    """z (r,) from the first r pivots."""
    shape, dtype, mean = D.shape, D.dtype, jnp.mean(D)
    if init in ("uniform", "s_uniform"):
        bound = 1.0 if init == "s_uniform" else jnp.abs(mean) / 2
        return bound * jax.random.uniform(key, shape, dtype, -1, 1)
    if init in ("normal", "s_normal"):
        noise = jax.random.normal(key, shape, dtype)
        # One pivot has no sample deviation.
        return noise if init == "s_normal" else mean + jnp.std(D, ddof=min(1, len(D) - 1)) * noise
    constant = {"constant": mean, "ones": jnp.ones_like(mean), "zeros": jnp.zeros_like(mean)}
    return D if init == "lu" else jnp.broadcast_to(constant[init], shape)


def _checked(z: jax.Array, D: jax.Array) -> jax.Array:
    """z, or NaN where the rows of U that belong to it come from a division by nearly zero."""
    size = jnp.abs(D)
    nearly_zero = jnp.min(size[: len(z)]) <= jnp.finfo(D.dtype).eps * jnp.max(size)
    return jnp.where(nearly_zero, jnp.full_like(z, jnp.nan), z)
