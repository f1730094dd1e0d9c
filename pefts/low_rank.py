"""Rules that add a low-rank product to a kernel: W' = W + A B with A (d_in, m) and B (m, d_out).

    y = x W + (x A) B

A method gives (A, B) as a function of its state; the factored product, the dense kernel and the
conversion to a plain LoRA of rank m follow from them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pefts.bound import Call, Rule, State, matmul

Factors = Callable[[State, Call], tuple[jax.Array, jax.Array]]
Parts = Callable[[State, Call], tuple[jax.Array, jax.Array, jax.Array]]
Init = Callable[..., tuple[dict, dict]]


def additive(init: Init, factors: Factors) -> Rule:
    """The rule of W' = W + A B, (A, B) = factors(p, call)."""

    def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
        A, B = (factor.astype(W.dtype) for factor in factors(p, call))
        return W + A @ B

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        A, B = factors(p, call)
        return call.dot(x, W) + matmul(call.dot(x, A), B)

    return Rule(init, effective, linear, factors=factors, through_dot=True)


def replacing(init: Init, factors: Factors) -> Rule:
    """The rule of W' = A B, (A, B) = factors(p, call), which no longer touches W."""

    def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
        A, B = factors(p, call)
        return A.astype(W.dtype) @ B.astype(W.dtype)

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        del W
        A, B = factors(p, call)
        return matmul(call.dot(x, A), B)

    return Rule(init, effective, linear, through_dot=True)


def moved(
    A: jax.Array, B: jax.Array, A0: jax.Array, B0: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Factors of s (A B - A0 B0), of rank 2r: what a part s A0 B0 taken out of W has become.

        A B - A0 B0 = [A - A0, A0] [B; B - B0]

    In this form the change is exactly zero at A = A0, B = B0, in any precision; the difference of
    the two products would leave their rounding.
    """
    left = jnp.concatenate([A - A0, A0], axis=-1)
    right = jnp.concatenate([B, B - B0], axis=-2)
    return left, right * scale


def diagonal(init: Init, parts: Parts) -> Rule:
    """The rule of W' = W + A diag(d) B, (A, d, B) = parts(p, call), where d alone is trained.

    y = x W + ((x A) * d) B: the gradient of d needs no product beyond those that x's needs.
    """

    def factors(p: State, call: Call) -> tuple[jax.Array, jax.Array]:
        A, d, B = parts(p, call)
        return A * d[None], B

    def linear(x: Any, W: Any, p: State, call: Call) -> jax.Array:
        A, d, B = parts(p, call)
        h = call.dot(x, A)
        h = h * d.astype(h.dtype).reshape((1,) * (h.ndim - 1) + d.shape)
        return call.dot(x, W) + matmul(h, B)

    return additive(init, factors)._replace(linear=linear)
