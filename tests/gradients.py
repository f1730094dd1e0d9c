"""Gradients with well separated singular values, and what tests of projected optimizers share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pefts
from pefts.optimizers.projection import Projector

Array = np.ndarray
jitted = functools.cache(jax.jit)  # one program for each transformation, however often it runs


def decaying(*shape: int, seed: int = 0, ratio: float = 0.6) -> Array:
    """Singular values 1, ratio, ratio^2, ...: every cut has a gap."""
    U, S, Vt = np.linalg.svd(np.random.default_rng(seed).normal(size=shape), full_matrices=False)
    return U * ratio ** np.arange(S.shape[-1]) @ Vt


def gradients(steps: int, *shape: int, seed: int = 0) -> Array:
    return np.stack([decaying(*shape, seed=seed + t) for t in range(steps)])


def run(
    tx: optax.GradientTransformation, params: Any, grads: list, state: Any = None
) -> tuple[Any, Any, list]:
    """Parameters and state after the last step, and the state after each."""
    state = tx.init(params) if state is None else state
    step, states = jitted(tx.update), []
    for grad in grads:
        updates, state = step(grad, state, params)
        params = optax.apply_updates(params, updates)
        states.append(state)
    return params, state, states


def aligned(columns: Any, like: Any) -> Array:
    """The columns with the signs that make their products with those of `like` positive."""
    columns, like = np.asarray(columns, np.float64), np.asarray(like, np.float64)
    return columns * np.sign(np.sum(columns * like, axis=-2, keepdims=True))


def sides(projection: str, d_in: int, d_out: int) -> tuple[bool, bool]:
    """Whether d_in, and whether d_out, is compressed."""
    if projection in ("right", "left", "full"):
        return projection != "left", projection != "right"
    smaller = d_out >= d_in
    return (smaller, not smaller) if projection == "std" else (not smaller, smaller)


def near(actual: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def close(actual: Any, expected: Any, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected
    )


def tree_of(*shape: int, steps: int = 1) -> tuple[dict, list]:
    """Zero parameters, a stack of kernels and its biases, and gradients for some steps."""
    params = {"layers": {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[::2])}}
    grads = [
        {
            "layers": {
                "kernel": jnp.asarray(G, jnp.float32),
                "bias": jnp.sin(jnp.ones(shape[::2]) + t),
            }
        }
        for t, G in enumerate(gradients(steps, *shape))
    ]
    return params, grads


@functools.cache
def full_tree() -> dict:
    """What `pefts.full` trains of a model with scanned layers, heads, an embedding and a head."""
    shapes = {
        "embed": {"embedding": (9, 6)},
        "layers": {"query": {"kernel": (2, 6, 8), "bias": (2, 8)}, "norm": {"scale": (2, 6)}},
        "output": {"kernel": (2, 4, 6), "bias": (6,)},
        "classifier": {"kernel": (6, 5)},
    }
    params = jax.tree.map(
        lambda shape: jnp.asarray(np.cos(np.arange(np.prod(shape))).reshape(shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return pefts.full().init(jax.random.key(0), params).trainable


def stored(golden: Any, case: str, window: int) -> Projector:
    """The official projectors, as columns and by Flax's names."""

    def columns(name: str, side: int) -> Array | None:
        raw = golden.get(f"{case}__{name}")
        if raw is None:
            return None
        return raw[window] if raw.shape[1] == side else raw[window].T

    d_out, d_in = golden[f"{case}__W"].shape[1:]
    if f"{case}__ortho_left" in golden:
        return Projector(columns("ortho_right", d_in), columns("ortho_left", d_out))
    left, right = sides(case.split("_")[0].replace("reverse", "reverse_std"), d_in, d_out)
    return Projector(
        columns("ortho", d_in) if left else None, columns("ortho", d_out) if right else None
    )


def official_pairs(golden: Any, A: str, B: str, *at: Any) -> dict:
    """The two pairs of factors of Hugging Face PEFT's optimizers, in Flax's orientation."""
    return {
        f"module_{i}/kernel": {
            name: jnp.asarray(golden[f"{key}_{i}"][at].T) for name, key in (("A", A), ("B", B))
        }
        for i in range(2)
    }


def multi_steps_see_the_mean(tx: Any, params: Any, grads: list) -> None:
    """Inside optax.MultiSteps the transformation is given the mean of two gradients."""
    end, _, _ = run(optax.MultiSteps(tx, 2).gradient_transformation(), params, grads)
    means = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        for pair in zip(grads[::2], grads[1::2], strict=True)
    ]
    close(end, run(tx, params, means)[0], 1e-5, 1e-6)


def scan_is_the_loop(tx: Any, params: Any, grads: list, end: Any) -> None:
    """Updates inside lax.scan lead where they led one by one."""

    def body(carry: Any, grad: Any) -> tuple[Any, None]:
        updates, state = tx.update(grad, carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    (scanned, _), _ = jax.lax.scan(body, (params, tx.init(params)), stacked)
    close(scanned, end, 1e-5, 1e-6)
