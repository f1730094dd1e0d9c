"""Singular values of every targeted kernel, for methods that divide ranks over a whole model."""

from collections.abc import Callable

import jax
import numpy as np

from pefts import linalg
from pefts.core import Sites
from pefts.targets import Site


def spectra(
    method: str, sites: Sites, matrix_of: Callable[[Site], jax.Array]
) -> dict[str, np.ndarray]:
    """{path: (slices, min(d_in, d_out))}, descending, in float32 or better, on the host.

    Values alone, one matrix after the other: singular vectors of all kernels at once would take
    twice the base's memory, and a method needs them of the kernels that it picks.

    Args:
      method: its name, for the messages.
      sites: the kernels.
      matrix_of: site -> (*stack, d_in, d_out), as `Declaration.prepare` is given it.

    Raises:
      ValueError: inside jit, where values are unknown; a kernel with NaN or infinite values.
    """
    found = {}
    for site in sites:
        try:
            values = np.asarray(_singular_values(matrix_of(site)))
        except jax.errors.TracerArrayConversionError:
            raise ValueError(
                f"{method}: the ranks depend on the singular values of {site.path!r}, which are "
                "unknown inside jit or eval_shape; call peft.init outside."
            ) from None
        if not np.isfinite(values).all():
            raise ValueError(
                f"{method}: {site.path!r} has no singular values: the kernel itself holds NaN or "
                "infinite values. Repair or exclude it."
            )
        found[site.path] = values
    return found


@jax.jit
def _singular_values(W: jax.Array) -> jax.Array:
    """(*stack, d_in, d_out) -> (slices, min(d_in, d_out))."""
    return jax.lax.map(linalg.singular_values, W.reshape(-1, *W.shape[-2:]))
