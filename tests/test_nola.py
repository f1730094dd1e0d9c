"""NOLA beyond the table: its official code, its chunks, its memory, its generator."""

import importlib
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts

nola = importlib.import_module("pefts.methods.nola")  # the package has the factory by this name
GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/nola/golden.npz"


@pytest.mark.skipif(not GOLDEN.is_file(), reason="../shared/golden/official/nola is not here")
@pytest.mark.usefixtures("x64")
def test_it_is_the_official_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and the gradients of both coefficients, with the bases that torch drew."""
    g = np.load(GOLDEN)
    k, rank, alpha = int(g["num_basis"]), int(g["rank"]), float(g["alpha"])
    drawn = {(12, rank): g["basis_A"].swapaxes(1, 2), (rank, 20): g["basis_B"].swapaxes(1, 2)}
    monkeypatch.setattr(nola, "basis", lambda key, n, shape: jnp.asarray(drawn[shape])[n])
    monkeypatch.setattr(nola, "initial", lambda key, shape, dtype: jnp.asarray(g["A0"].T))
    params, x = {"kernel": jnp.asarray(g["W"].T)}, jnp.asarray(g["x"])
    peft = pefts.nola(rank=rank, alpha=alpha, bases=k, chunk=3, targets="kernel")
    state = peft.init(jax.random.key(0), params)
    frozen = {"kernel": {**state.frozen["kernel"], "scale": jnp.asarray(alpha / rank)}}
    model = nn.Dense(20, use_bias=False, param_dtype=jnp.float64)

    def run(trainable: Any) -> jax.Array:
        bound = peft.bind(params, pefts.PeftState(trainable, frozen))
        return pefts.apply(model.apply)({"params": bound}, x)

    trained = {"alpha": jnp.asarray(g["coef_A"]), "beta": jnp.asarray(g["coef_B"])}
    y, pull = jax.vjp(run, {"kernel": trained})
    grads = pull(jnp.asarray(g["cot"]))[0]["kernel"]
    for actual, expected in (
        (y, g["y"]),
        (y - x @ params["kernel"], g["delta_y"]),
        (grads["alpha"], g["grad_coef_A"]),
        (grads["beta"], g["grad_coef_B"]),
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def problem(chunk: int, bases: int = 10, shape: tuple[int, int] = (9, 14)) -> tuple[Any, ...]:
    params = {"kernel": jax.random.normal(jax.random.key(3), shape)}
    peft = pefts.nola(rank=4, bases=bases, chunk=chunk, targets="kernel")
    return peft, params, pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), params))


def test_chunks_change_nothing() -> None:
    """One by one, in chunks that do not divide k, all at once, and larger than k."""
    results = []
    for chunk in (1, 4, 10, 99):
        peft, params, state = problem(chunk)

        def loss(trainable: Any, peft=peft, params=params, state=state) -> jax.Array:
            return jnp.sum(peft.merge(params, state._replace(trainable=trainable))["kernel"] ** 2)

        results.append((peft.merge(params, state), jax.grad(loss)(state.trainable)))
    for other in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), other, results[0]
        )


def temporary(chunk: int) -> int:
    """Bytes that a gradient of both coefficient vectors needs, beside its arguments and results."""
    peft, params, state = problem(chunk, bases=512, shape=(48, 64))
    model, x = nn.Dense(64, use_bias=False), jnp.ones((2, 48))

    def loss(trainable: Any) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=trainable))
        return jnp.sum(pefts.apply(model.apply)({"params": bound}, x) ** 2)

    lowered = jax.jit(jax.value_and_grad(loss)).lower(state.trainable)
    memory: Any = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes


def test_no_step_holds_the_bases() -> None:
    basis = 4 * 512 * 48 * 4
    assert temporary(4) < basis / 4
    assert temporary(512) > basis


def test_the_matrices_are_those_of_earlier_releases() -> None:
    """Values that stay: a state holds a key alone, and would mean another adapter."""
    key = jnp.asarray([1, 2], jnp.uint32)
    drawn = nola.basis(key, jnp.uint32(3), (2, 3))
    wanted = [[0.95540524, 0.5483792, -0.02720213], [0.37423396, 0.15648746, 0.06822348]]
    np.testing.assert_allclose(drawn, wanted, rtol=1e-6)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(nola.basis(key, jnp.uint32(3), (2, 3)), drawn)
        peft, params, _ = problem(4)
        other = peft.init(jax.random.key(0), params)
    assert other.frozen["kernel"]["key"].shape == (2,)


def test_kernels_and_layers_have_matrices_of_their_own() -> None:
    params = {name: {"kernel": jnp.ones((3, 6, 4))} for name in ("query", "key")}
    peft = pefts.nola(rank=2, bases=4, axes={"kernel": "lio"})
    state = peft.init(jax.random.key(0), params)
    keys = np.concatenate([np.asarray(group["key"]) for group in state.frozen.values()])
    assert len(np.unique(keys, axis=0)) == 6


def test_the_matrices_have_their_distributions() -> None:
    peft, params, state = problem(16, bases=400, shape=(30, 40))
    ones = {"kernel": {name: jnp.ones((400,)) for name in ("alpha", "beta")}}
    p = {**state.frozen["kernel"], **ones["kernel"]}
    A, B = nola.factors((30, 40), p, 4, 16)
    # Sums of 400 numbers uniform on +-1, over sqrt(400): normal with variance 1/3.
    assert abs(float(jnp.var(B)) - 1 / 3) < 0.08
    assert abs(float(jnp.var(A)) - 1 / 3) < 0.12
    start, _ = nola.factors((30, 40), {**p, "alpha": 0 * p["alpha"]}, 4, 16)
    assert 0.9 < float(jnp.abs(start).max()) * np.sqrt(30) <= 1
