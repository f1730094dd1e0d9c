"""SensZOQ: train the few entries of each kernel that the loss is most sensitive to.

    F = mean over batches of (dL/dW)^2, at the pretrained W (d_in, d_out)
    I = the k entries with the largest F        k = ceil(ratio d_in d_out)
    W' = W with W'[I] = v                       v = W[I] at first

I is chosen once and never changes, so gradients, moments and the noise of zeroth-order training
(pefts.zeroth_order.mezo) have the size of v. An adapter is k numbers and their places.

NOTE(paper): the paper keeps v in 16 or 32 bits beside 4-bit kernels. Here W is the base as it is,
dense; whatever it holds at I is never read after the start, so it may be quantised without I.
"""

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pefts.bound import Call, Rule, State
from pefts.core import Declaration, Sites, Traits, factory
from pefts.linalg import precise
from pefts.targets import Select, Site, selection

LARGEST_INDEX = np.iinfo(np.int32).max


@factory
def senszoq(ratio: float = 1e-3, **select: Unpack[Select]) -> Declaration:
    """Static sparse tuning: W' = W, with v in the entries where the mean of (dL/dW)^2 is largest.

    v (k,) takes the place of k = ceil(ratio d_in d_out) entries of W (d_in, d_out), those with the
    largest mean of squared gradients F (d_in, d_out) over calibration batches (paper: of C4, with
    the language-modelling loss, once for all tasks): pefts.calibrate(..., peft, loss=loss). Equal
    values of F go to the entry that comes first, row by row. A batch's gradient is squared as a
    whole; batches of one example give the diagonal of the empirical Fisher matrix.

    W' is built one kernel at a time: from 1 / ratio tokens on, the columns of x that I reads would
    be larger than W'.

    The authors' code was not available: that each kernel, and each layer of a stack, has its own
    largest entries, rather than all of them together, is this library's choice.

    Args:
      ratio: the share of a kernel's entries that is trained, in (0, 1] (paper: 1e-3), read as the
        decimal number it prints as.
      **select: targets, exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, W with v written into it.

    Raises:
      ValueError: ratio out of range, no squared gradients in stats or some that are not finite, or
        a kernel too large for 32-bit indices; at the call: a state made for a kernel of another
        size or with another ratio.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.asarray([[0.5, -1.0], [2.0, 0.25]])}}
      >>> F = jax.numpy.asarray([[1.0, 3.0], [0.0, 2.0]])
      >>> stats = {"query/kernel": {"squared_gradient": F}}
      >>> state = pefts.senszoq(ratio=0.5).init(jax.random.key(0), params, stats)
      >>> state.trainable["query/kernel"]["values"].tolist()
      [-1.0, 0.25]

    Source: Zeroth-Order Fine-Tuning of LLMs with Extreme Sparsity, arXiv 2406.02913.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio!r}: give a share of a kernel's entries, in (0, 1].")
    return Declaration(
        rule=Rule(
            functools.partial(_start, ratio=ratio), functools.partial(effective, ratio=ratio)
        ),
        selection=selection(**select),
        traits=Traits(needs=("squared_gradient",)),
        prepare=_check_sites,
    )


def entries(ratio: float, size: int) -> int:
    """k = ceil(ratio size), with no rounding: 0.07 of 100 entries are 7, and in floats 8."""
    return math.ceil(Fraction(str(float(ratio))) * size)


def _check_sites(
    sites: Sites, matrix_of: Callable[[Site], jax.Array], stats: Any
) -> tuple[Sites, Any]:
    del matrix_of
    for site in sites:
        if site.d_in * site.d_out > LARGEST_INDEX:
            raise ValueError(
                f"senszoq: {site.path!r} has {site.d_in} x {site.d_out} entries, too many for "
                "32-bit indices; exclude it."
            )
        if not _is_finite(stats[site.path]["squared_gradient"]):
            raise ValueError(
                f"senszoq: 'squared_gradient' of {site.path!r} holds NaN or infinite values, which "
                "order no entries: calibrate again, or exclude it."
            )
    return sites, stats


def _is_finite(F: jax.Array) -> bool:
    try:
        return bool(jnp.all(jnp.isfinite(F)))
    except jax.errors.ConcretizationTypeError:  # inside jit
        return True


def _start(
    key: jax.Array, W: jax.Array, *, site: Site, stats: Any, ratio: float
) -> tuple[dict, dict]:
    del key, site
    F = stats["squared_gradient"].reshape(-1)
    # Of equal values top_k takes those with the lower index.
    indices = jnp.sort(jax.lax.top_k(F, entries(ratio, W.size))[1])
    return {"values": precise(W).reshape(-1)[indices]}, {"indices": indices.astype(jnp.int32)}


def effective(W: jax.Array, p: State, call: Call, *, ratio: float) -> jax.Array:
    """W with v written over its sensitive entries."""
    del call
    found, expected = p["values"].shape[-1], entries(ratio, W.size)
    if found != expected:
        raise ValueError(
            f"senszoq: this state holds {found} entries, and a kernel of shape {W.shape} has "
            f"{expected} at ratio={ratio}; it was made for another model or another ratio."
        )
    # The indices are sorted, and told apart: the gradient of v is then a plain lookup.
    flat = W.reshape(-1).at[p["indices"]]
    flat = flat.set(p["values"].astype(W.dtype), indices_are_sorted=True, unique_indices=True)
    return flat.reshape(W.shape)
