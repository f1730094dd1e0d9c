"""Weight Compander: every weight through one odd, bounded nonlinearity, of which two numbers train.

    W' = Psi(v) = a arctan(v / b)        v = b_0 tan(W / a_0), so that W' = W at the start

a_0 = (2 / pi) kappa max|W| and b_0 = 1. Trained are log(a / a_0) and log b alone, two numbers per
kernel that start at zero; v is the frozen kernel. a stretches all weights alike; a smaller b pushes
the small ones away from zero and the large ones together, never beyond a pi / 2. It is computed as
    Psi(v) = a (W / a_0 + arctan((1 / b - 1) t / (1 + t^2 / b)))        t = tan(W / a_0)
which is the same, and exactly W at the start. It is nonlinear in W, so the product has to build the
kernel, for one layer at a time.

NOTE(paper): the paper trains all weights v, as a regulariser; training a and b alone is ours.
"""

import functools
import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts.bound import Call, Rule, State
from pefts.core import Declaration, Traits, factory
from pefts.linalg import precise
from pefts.targets import Select, Site, selection


@factory
def weight_compander(
    kappa: float = 1.5,
    **select: Unpack[Select],
) -> Declaration:
    """Companded weights: W' = a arctan(tan(W / a_0) / b), with a () and b () trained by logarithm.

    Unchecked: written from the paper's abstract and a recollection of its formula, without its
    code; kappa and the training of a and b alone are this library's.

    Args:
      kappa: above 1, how far the bound a_0 pi / 2 lies above the largest |W| of a kernel. Near 1
        large weights are bent most, and far above it a and b do the same, a scaling (ours: 1.5).
      **select: targets, exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft; merging is exact, Psi(v).

    Raises:
      ValueError: kappa not above 1 or not finite, a kernel that is all zeros, a rank_pattern or
        alpha_pattern, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"query": {"kernel": jax.numpy.eye(6, 4)}}
      >>> pefts.count(pefts.weight_compander().init(jax.random.key(0), params).trainable)
      2

    Source: Weight Compander: A Simple Weight Reparameterization for Regularization,
      arXiv 2306.16993.
    """
    if not math.isfinite(kappa) or kappa <= 1:
        raise ValueError(
            f"kappa={kappa!r}: the bound a pi / 2 lies kappa times above the largest weight, which "
            "it must exceed; give a number above 1, such as 1.5."
        )
    return Declaration(
        rule=Rule(functools.partial(_start, kappa=kappa), effective),
        selection=selection(**select),
        traits=Traits(),
        failure="the kernel is all zeros, and its largest weight gives the bound",
    )


def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
    """Psi(v) of the v that W stands for."""
    del call
    log_a, log_b, a_0 = (p[name].astype(W.dtype) for name in ("log_a", "log_b", "a_0"))
    t, stretch = jnp.tan(W / a_0), jnp.exp(log_a)
    # arctan(t / b) - arctan(t), as one arctan: the difference of two would leave their rounding.
    bent = jnp.arctan(jnp.expm1(-log_b) * t / (1 + jnp.exp(-log_b) * t**2))
    return stretch * W + stretch * a_0 * bent


def _start(
    key: jax.Array, W: jax.Array, *, site: Site, stats: Any, kappa: float
) -> tuple[dict, dict]:
    del key, site, stats
    a_0 = 2 * kappa / math.pi * jnp.max(jnp.abs(precise(W))).astype(jnp.float32)
    # A kernel of zeros has no bound, which core then reports.
    a_0 = jnp.where(a_0 > 0, a_0, jnp.full_like(a_0, jnp.nan))
    zero = jnp.zeros((), jnp.float32)
    return {"log_a": zero, "log_b": zero}, {"a_0": a_0}
