"""SVFT: a sparse matrix of trained coefficients between W's singular vectors.

    y = x W + g ((x U) M) V^T        U (d_in, n), M (n, n), V (d_out, n), g = sigmoid(gate)

U and V are W's singular vectors, n = min(d_in, d_out) or `rank`, and M is zero but at a fixed list
of places, whose values are m. The adapted kernel is U (diag(S) + g M) V^T, and since the change
stands beside W, no part of its spectrum is lost where n is smaller than its sides.

Places: "plain" the diagonal; "banded" the diagonal and d diagonals on either side of it; "random"
as many places, drawn with replacement (values at one place add up); "top_k" as many, where
    U^T V^T (d_in = d_out),  U (d_in < d_out),  V^T (d_in > d_out)
is largest, signs included. M = 0 at step 0, so the model is unchanged; gate = 0. Trainable:
n (2 d + 1) - d (d + 1) values and the gate per kernel.
"""

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pefts import linalg
from pefts.bound import Call, State
from pefts.core import Declaration, Traits, factory
from pefts.low_rank import additive, diagonal
from pefts.methods.lora import check_rank
from pefts.targets import Select, Site, selection

PATTERNS = ("banded", "plain", "random", "top_k")
INITS = ("kaiming", "zeros")
BAND = 16


@factory
def svft(
    pattern: str = "plain",
    off_diagonals: int | None = None,
    *,
    rank: int | None = None,
    init: str = "zeros",
    **select: Unpack[Select],
) -> Declaration:
    """Sparse coefficients in W's singular basis: y = x W + g ((x U) M) V^T, g = sigmoid(gate).

    U (d_in, n) and V (d_out, n) stay frozen; m, the values of the sparse M (n, n), and gate train.

    Args:
      pattern: of M, "plain", "banded", "random" or "top_k".
      off_diagonals: d, from 0 to n - 1; the number of M's values is that of the band for every
        pattern. None is 0 for "plain", which takes no other, and else 16 (the paper's setting).
      rank: n, the number of singular directions, largest first; all of them if None (the paper).
      init: of m, "zeros", or "kaiming" (normal, variance 2 / len(m)) as in the released code, which
        changes the model at step 0.
      **select: targets, exclude, rank_pattern (with a rank), axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, U (diag(S) + g M) V^T. The paper's learning rates are high: 5e-2 for
      "plain" and "random", 5e-3 for the others, without weight decay.

    Raises:
      ValueError: an unknown pattern or init, off_diagonals or rank out of range, an alpha_pattern,
        or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.eye(6, 4)}}
      >>> pefts.count(pefts.svft().init(jax.random.key(0), params).trainable)
      5
      >>> banded = pefts.svft("banded", off_diagonals=1)
      >>> pefts.count(banded.init(jax.random.key(0), params).trainable)
      11

    Source: SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors, arXiv 2405.19597.
    """
    # NOTE(paper): the released code draws m as "kaiming" does after it has set m to zero; zero is
    # the default here, from which g = 0.5 still lets m have a gradient. Its docstring calls
    # off_diag = 1 plain; its scripts, and this, 0.
    _check(pattern, init)
    if rank is not None:
        check_rank(rank)
    d = _width(pattern, off_diagonals)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del stats
        n = site.rank or min(site.d_in, site.d_out)
        _check_band(d, n, site)
        key_m, key_places = jax.random.split(key)
        U, _, V = linalg.svd(W)
        places = _places(key_places, pattern, d, U, V, n)
        size = n * (2 * d + 1) - d * (d + 1)
        m = jnp.zeros((size,), U.dtype)
        if init == "kaiming":
            m = math.sqrt(2 / size) * jax.random.normal(key_m, m.shape, m.dtype)
        frozen = {"U": U[:, :n], "V": V[:, :n], **places}
        return {"gate": jnp.zeros((), U.dtype), "m": m}, frozen

    rule = diagonal(start, _plain) if pattern == "plain" else additive(start, _sparse)
    return Declaration(
        rule=rule,
        selection=selection(**select),
        traits=Traits(identity_at_init=init == "zeros"),
        rank=rank or 0,
    )


def _plain(p: State, call: Call) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, the diagonal g m, V^T."""
    del call
    return p["U"], jax.nn.sigmoid(p["gate"]) * p["m"], p["V"].T


def _sparse(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
    """g U M and V^T, or U and g M V^T: M goes into the smaller of the two."""
    del call
    U, V = p["U"], p["V"]
    n = U.shape[-1]
    values = jax.nn.sigmoid(p["gate"]) * p["m"]
    # Once a step, for all tokens; a product with M for each token would cost more, and a gather of
    # (tokens, values) far more.
    M = jnp.zeros((n, n), values.dtype).at[p["rows"], p["columns"]].add(values)
    return (U @ M, V.T) if len(U) <= len(V) else (U, M @ V.T)


def _places(
    key: jax.Array, pattern: str, d: int, U: jax.Array, V: jax.Array, n: int
) -> dict[str, jax.Array]:
    """Rows and columns of M's values; none for the diagonal."""
    if pattern == "plain":
        return {}
    index = np.arange(n)
    # Row by row of M^T, the released code's order, so that its m fits.
    columns, rows = np.nonzero(np.abs(index[:, None] - index[None, :]) <= d)
    if pattern == "banded":
        rows, columns = jnp.asarray(rows, jnp.int32), jnp.asarray(columns, jnp.int32)
    elif pattern == "random":
        rows, columns = jax.random.randint(key, (2, len(rows)), 0, n, jnp.int32)
    else:
        _, flat = jax.lax.top_k(_scores(U, V)[:n, :n].ravel(), len(rows))
        rows, columns = jnp.divmod(flat.astype(jnp.int32), n)
    return {"rows": rows, "columns": columns}


def _scores(U: jax.Array, V: jax.Array) -> jax.Array:
    """What "top_k" compares, (k, k), from all k singular vectors of either side."""
    # NOTE(paper): the released code takes the largest entries, not the largest in magnitude, and
    # of a square W those of the product of the bases that stands here, not of U^T V.
    d_in, d_out = len(U), len(V)
    if d_in == d_out:
        return U.T @ V.T
    return U if d_in < d_out else V.T


def _check(pattern: str, init: str) -> None:
    for argument, value, known in (("pattern", pattern, PATTERNS), ("init", init, INITS)):
        if value not in known:
            raise ValueError(f"{argument}={value!r} is unknown; choose one of {known}.")


def _width(pattern: str, off_diagonals: int | None) -> int:
    """d."""
    if off_diagonals is None:
        return 0 if pattern == "plain" else BAND
    if not isinstance(off_diagonals, int) or isinstance(off_diagonals, bool) or off_diagonals < 0:
        raise ValueError(
            f"off_diagonals={off_diagonals!r}: give an integer of at least 0, such as {BAND}."
        )
    if pattern == "plain" and off_diagonals:
        raise ValueError(
            f"off_diagonals={off_diagonals} has no meaning for pattern='plain', which is the "
            "diagonal; leave it out, or choose pattern='banded'."
        )
    return off_diagonals


def _check_band(d: int, n: int, site: Site) -> None:
    if d >= n:
        raise ValueError(
            f"off_diagonals={d} is out of range for {site.path!r}, of which {n} singular "
            f"directions are used: choose 0 to {n - 1}."
        )
