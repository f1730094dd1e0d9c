"""SNNK adapters: a layer on random features of a linear module's output, added to it.

    phi(y) = max(y G^T, c) / sqrt(m)        G (m, d) frozen, m random features
    gate:        y' = y + v * (phi(y) P)                 P (m, d), v (d,)
    bottleneck:  y' = y + (phi(y) P) U + b_U             P (m, n), U (n, d), b_U (d,)

With c = 0 the product of features approximates the first arc-cosine kernel, so phi(y) P with
P[:, j] = phi(w_j) approximates a layer of weights w_j that the kernel's nonlinearity follows, and
P is trained instead of w: m numbers for each output, where w has d. P starts from ordinary weights
of deviation `std`; v, U and b_U at zero, so the model is unchanged at step 0. It is not linear in y
and cannot be merged. Trainable: d m + d per site, or m n + n d + d. G is part of the state.
"""

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import views
from pefts.bound import Call, Rule, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.linalg import precise
from pefts.methods.bottleneck import PLACEMENTS
from pefts.targets import ALL_LINEAR, Select, Site, selection


@factory
def snnk(
    features: int = 8,
    *,
    width: int | None = None,
    clip: float = 0.0,
    orthogonal: bool = True,
    std: float = 0.02,
    placement: str | None = "houlsby",
    **select: Unpack[Select],
) -> Declaration:
    """Scalable neural network kernel: y' = y + v * (phi(y) P), phi(y) = max(y G^T, c) / sqrt(m).

    G (m, d) is frozen, P (m, d) and v (d,) train. The output axes of a DenseGeneral (heads, head
    size) are taken together as d.

    Args:
      features: m (the paper's adapters: 8).
      width: n of the bottleneck y' = y + (phi(y) P) U + b_U, with P (m, n); None: the gate.
      clip: c, the smallest feature before scaling (the paper's adapters: 0).
      orthogonal: rows of G orthogonal in blocks of d, with the lengths of Gaussian ones (the paper
        on GLUE); False: Gaussian.
      std: standard deviation of the weights that P starts from (the code: 0.02).
      placement: default targets, "houlsby" or "pfeiffer" (see pefts.bottleneck); None is
        "all-linear". `targets` overrules it.
      **select: targets, exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft; it cannot be merged.

    Raises:
      ValueError: features or width not positive, clip not finite, std not positive, unknown
        placement, or no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"mlp": {"output": {"kernel": jax.numpy.ones((6, 4))}}}
      >>> pefts.count(pefts.snnk(features=8).init(jax.random.key(0), params).trainable)
      36

    Source: Scalable Neural Network Kernels, arXiv 2310.13225; details checked against its code.
    """
    _check(features, width, clip, std, placement)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del W, stats
        d, keys = site.d_out, jax.random.split(key)
        G = projection(keys[0], features, d, orthogonal)
        w = std * jax.random.normal(keys[1], (d if width is None else width, d), jnp.float32)
        trainable = {"P": relu_features(w, G, clip).T}
        if width is None:
            trainable["v"] = jnp.zeros(d, jnp.float32)
        else:
            trainable["U"] = jnp.zeros((width, d), jnp.float32)
            trainable["b_U"] = jnp.zeros(d, jnp.float32)
        return trainable, {"G": G}

    def output(y: jax.Array, p: State, call: Call) -> jax.Array:
        del call
        p = {name: leaf.astype(y.dtype) for name, leaf in p.items()}
        x = views.outputs(y, p["G"].shape[1])
        h = matmul(relu_features(x, p["G"], clip), p["P"])
        if width is None:
            h = h * _row(p["v"], h)
        else:
            h = matmul(h, p["U"]) + _row(p["b_U"], h)
        return y + h.reshape(y.shape)

    default = ALL_LINEAR if placement is None else PLACEMENTS[placement]
    return Declaration(
        rule=Rule(start, output=output),
        selection=selection(default=default, **select),
        traits=Traits(mergeable=False),
    )


def relu_features(x: jax.Array, G: jax.Array, clip: float = 0.0) -> jax.Array:
    """phi(x) = max(x G^T, c) / sqrt(m), x (..., d) and G (m, d) -> (..., m)."""
    return jnp.maximum(matmul(x, G.T), clip) / math.sqrt(len(G))


def exponential_features(x: jax.Array, G: jax.Array, a: jax.Array, A: jax.Array) -> jax.Array:
    """phi(x) = A exp(a x G^T - a^2 |x|^2 / 2) / sqrt(m): the method's features of other kernels.

    With A = a = 1 products of features approximate exp(x . w).

    Args:
      x: (..., d).
      G: (m, d), Gaussian.
      a: (m,), one for each feature; imaginary for sines and cosines.
      A: (m,), likewise.
    """
    # NOTE(paper): the code drops the half for inputs of three axes.
    rows = (1,) * (x.ndim - 1)
    a, A = a.reshape(*rows, -1), A.astype(a.dtype).reshape(*rows, -1)
    square = jnp.sum(x * x, axis=-1, keepdims=True).astype(a.dtype)
    projected = matmul(x, G.T).astype(a.dtype)
    return A * jnp.exp(a * projected - a * a * square / 2) / math.sqrt(len(G))


def projection(key: jax.Array, features: int, d: int, orthogonal: bool) -> jax.Array:
    """G (m, d) with rows of the lengths of Gaussian ones."""
    lengths_key, key = jax.random.split(key)
    if not orthogonal:
        return jax.random.normal(key, (features, d), jnp.float32)
    blocks = -(-features // d)
    gaussian = jax.random.normal(key, (blocks, d, d), jnp.float32)
    Q, R = jnp.linalg.qr(precise(gaussian))
    # Without the signs of R the decomposition's choice of them would show.
    Q = Q * jnp.sign(jnp.diagonal(R, axis1=1, axis2=2))[:, None]
    rows = jnp.swapaxes(Q, 1, 2).reshape(-1, d)[:features]
    lengths = jnp.linalg.norm(jax.random.normal(lengths_key, (features, d), jnp.float32), axis=1)
    return rows * lengths[:, None]


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def _check(
    features: int, width: int | None, clip: float, std: float, placement: str | None
) -> None:
    for name, value in (("features", features), ("width", 1 if width is None else width)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: give a positive integer, such as 8.")
    if not math.isfinite(clip):
        raise ValueError(f"clip={clip!r}: give a finite number, such as 0.0.")
    if not std > 0:
        raise ValueError(f"std={std!r} must be positive, such as 0.02.")
    if placement is not None and placement not in PLACEMENTS:
        raise ValueError(
            f"placement={placement!r} is unknown; choose one of {sorted(PLACEMENTS)}, or None with "
            "targets of your own."
        )
