"""SVFit: W's singular vectors stay, its r largest singular values are trained.

    W = U diag(S) V^T + W_e          U (d_in, r), S (r,), V (d_out, r), W_e the rest of the spectrum
    y = x W_e + ((x U) * sigma) V^T
      = x W + ((x U) * (sigma - S)) V^T

sigma starts at S, so the model is unchanged at step 0; the second form is computed, and needs no
W_e. sigma may cross zero, which turns a direction around. Trainable: r per kernel. sigma holds
absolute values, so weight decay would shrink the pretrained model itself: set it to 0.
"""

from typing import Any, Unpack

import jax
import numpy as np

from pefts import linalg, paths, views
from pefts.bound import Call, State
from pefts.core import Declaration, Params, factory
from pefts.low_rank import diagonal
from pefts.methods.lora import check_rank
from pefts.spectra import spectra
from pefts.targets import Select, Site, exactly, selection

POWERS = (1, 2)


@factory
def svfit(rank: int = 768, **select: Unpack[Select]) -> Declaration:
    """Training of the largest singular values: y = x W + ((x U) * (sigma - S)) V^T.

    U (d_in, r), S (r,) and V (d_out, r) are the r largest singular triplets of W and stay frozen;
    sigma (r,) trains. Set weight decay to 0.

    Args:
      rank: r, from 1 to the kernel's smaller side. The paper's count for RoBERTa-base, a sixteenth
        of a LoRA of rank 8, is that of r = 768, all of the spectrum (unchecked); `rank_for` finds
        the ranks that hold a share of it.
      **select: targets, exclude, rank_pattern, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W + U diag(sigma - S) V^T.

    Raises:
      ValueError: rank out of range, an alpha_pattern, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.eye(6, 4)}}
      >>> pefts.count(pefts.svfit(rank=3).init(jax.random.key(0), params).trainable)
      3

    Source: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values, arXiv
      2409.05926.
    """
    check_rank(rank)
    return Declaration(rule=diagonal(_start, _parts), selection=selection(**select), rank=rank)


def rank_for(
    params: Params, share: float = 0.99, *, power: int = 2, **select: Unpack[Select]
) -> dict[str, int]:
    """The smallest rank of each kernel with sum(S[:r]^p) >= share * sum(S^p), as a rank_pattern.

    Layers that are stacked in one leaf get the largest of their ranks.

    Args:
      params: the model's parameters.
      share: of the spectrum, in (0, 1] (the paper: 0.99).
      power: p, 2 for the share of the squared Frobenius norm, 1 for that of the nuclear norm; which
        of them the paper's "information" is could not be checked.
      **select: targets, exclude, axes, as the method will get them.

    Returns:
      {pattern of one path: r}.

    Raises:
      ValueError: share or power out of range, a kernel with NaN or infinite values, no kernel that
        matches, or a call inside jit.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"query": {"kernel": jnp.diag(jnp.array([9.0, 3.0, 1.0, 0.1]))}}
      >>> rank_for(params)
      {'^query/kernel$': 3}
      >>> rank_for(params, 0.9)
      {'^query/kernel$': 2}
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share!r}: give a number in (0, 1], such as 0.99.")
    if power not in POWERS:
        raise ValueError(f"power={power!r} is unknown; choose one of {POWERS}.")
    flat, sites = paths.flatten(params), selection(**select).resolve(params)
    found = spectra("svfit", sites, lambda site: views.to_matrix(flat[site.path], site.axes))
    return {
        exactly(path): max(_smallest(S, share, power) for S in layers)
        for path, layers in found.items()
    }


def _start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
    del key, stats
    U, S, V = linalg.svd(W, site.rank)
    return {"sigma": S}, {"U": U, "S": S, "V": V}


def _parts(p: State, call: Call) -> tuple[jax.Array, jax.Array, jax.Array]:
    del call
    return p["U"], p["sigma"] - p["S"], p["V"].T


def _smallest(S: np.ndarray, share: float, power: int) -> int:
    """The rank at which the powers of S reach the share of their sum."""
    held = np.cumsum(S.astype(np.float64) ** power)
    return int(np.searchsorted(held, share * held[-1])) + 1
