"""Adam in two halves: its direction, and the correction of the bias, for what stands between."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def raw_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam's M / (sqrt(V) + eps) without correction of the bias, which `correct_bias` does."""

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        steps = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return steps, optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu)

    return optax.GradientTransformation(init, update)


def correct_bias(b1: float = 0.9, b2: float = 0.999) -> optax.GradientTransformation:
    """Multiply by k_t = sqrt(1 - b2^t) / (1 - b1^t), t the number of this update from 1."""

    def factor(count: Any) -> jax.Array:
        t = (count + 1).astype(jnp.result_type(float))
        return jnp.sqrt(1 - b2**t) / (1 - b1**t)

    return optax.scale_by_schedule(factor)
