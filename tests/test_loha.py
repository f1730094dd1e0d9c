"""LoHa beyond the table: its thin factors, when they are used, where it starts."""

import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.bound import Call
from pefts.methods.loha import factors, is_thin

D_IN, D_OUT = 24, 40


def problem(key: jax.Array, **kwargs: Any) -> tuple:
    model = nn.Dense(D_OUT)
    x = jax.random.normal(jax.random.fold_in(key, 1), (5, D_IN))
    params = model.init(key, x)["params"]
    peft = pefts.loha(targets="kernel", **kwargs)
    return model, x, params, peft, pefts.randomize(key, peft.init(key, params), scale=0.3)


def leaves(state: pefts.PeftState) -> dict[str, jax.Array]:
    return {**state.trainable["kernel"], **state.frozen["kernel"]}


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_update_is_a_product_of_rank_r_squared(key, rank):
    """From as many parameters as a LoRA of rank 2 r."""
    _, _, params, peft, state = problem(key, rank=rank)
    A, B = factors(leaves(state))
    assert A.shape == (D_IN, rank**2) and B.shape == (rank**2, D_OUT)
    delta = np.asarray(peft.merge(params, state)["kernel"] - params["kernel"], np.float64)
    np.testing.assert_allclose(A @ B, delta, rtol=1e-4, atol=1e-6)
    assert np.linalg.matrix_rank(delta, tol=1e-5 * np.linalg.norm(delta)) == rank**2
    lora = pefts.lora(rank=2 * rank, targets="kernel").init(key, params)
    assert pefts.count(state.trainable) == pefts.count(lora.trainable)


def gradient(peft: pefts.Peft, params: Any, state: Any, x: jax.Array) -> Any:
    bound = peft.bind(params, state)["kernel"]

    def loss(p: Any) -> jax.Array:
        return jnp.sum(bound.rule.linear(x, bound.base, p, Call()) ** 2)

    return jax.grad(loss), dict(bound.state)


def test_nothing_of_the_kernels_size_is_built_from_thin_factors(key):
    _, x, params, peft, state = problem(key, rank=2)
    run, p = gradient(peft, params, state, x)
    program = jax.make_jaxpr(run)(p)
    sizes = [v.aval.size for equation in program.jaxpr.eqns for v in equation.outvars]
    assert max(sizes) < params["kernel"].size


@pytest.mark.parametrize("rank", [3, 6])
def test_the_way_with_fewer_operations_is_taken(key, rank, monkeypatch):
    """Thin factors up to r^2 = 15 here; beyond that the dense update."""
    _, _, params, peft, state = problem(key, rank=rank)
    x, thin = jnp.ones((400, D_IN)), is_thin(D_IN, rank, D_OUT)
    assert thin == (rank == 3)

    def operations() -> float:
        run, p = gradient(peft, params, state, x)
        return jax.jit(run).lower(p).compile().cost_analysis()["flops"]

    chosen = operations()
    monkeypatch.setattr(sys.modules["pefts.methods.loha"], "is_thin", lambda *sides: not thin)
    assert chosen < operations()


@pytest.mark.parametrize("rank", [2, 6])
@pytest.mark.parametrize("kind", ["conv", "embed"])
def test_factored_equals_merged_in_convolutions_and_embeddings(key, kind, rank):
    if kind == "conv":
        model, x = nn.Conv(8, (3,)), jax.random.normal(key, (2, 9, 4))
    else:
        model, x = nn.Embed(12, 8), jnp.arange(8).reshape(2, 4)
    params = model.init(key, x)["params"]
    axes = pefts.infer_axes(model.apply, params, x)
    peft = pefts.loha(rank, targets="kernel|embedding", axes=axes)
    state = pefts.randomize(key, peft.init(key, params), scale=0.5)
    factored = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    merged = model.apply({"params": peft.merge(params, state)}, x)
    np.testing.assert_allclose(factored, merged, rtol=2e-5, atol=2e-6)
    assert not np.allclose(merged, model.apply({"params": params}, x), atol=1e-2)


def test_starts_where_peft_starts(key):
    """A1 uniform over the inputs, B1 and B2 over the rank, A2 at zero; s = alpha / r."""
    params = {"kernel": jnp.ones((64, 256))}
    peft = pefts.loha(16, alpha=4.0, targets="kernel")
    p = leaves(peft.init(key, params))
    for name, bound in (("A1", 1 / 8), ("B1", 1 / 4), ("B2", 1 / 4)):
        values = np.asarray(p[name])
        assert 0.95 * bound < np.abs(values).max() <= bound
        np.testing.assert_allclose(values.std(), bound / np.sqrt(3), rtol=0.1)
    assert not np.asarray(p["A2"]).any()
    assert np.abs(np.corrcoef(p["B1"].ravel(), p["B2"].ravel())[0, 1]) < 0.1
    assert float(p["scale"]) == 0.25


def test_kernels_may_have_ranks_and_scales_of_their_own(key):
    params = {name: {"kernel": jnp.ones((8, 6))} for name in ("down", "up")}
    peft = pefts.loha(2, alpha=6.0, rank_pattern={"up": 3}, alpha_pattern={"up": 1.5})
    state = peft.init(key, params)
    shapes = {path: group["A1"].shape for path, group in state.trainable.items()}
    assert shapes == {"down/kernel": (8, 2), "up/kernel": (8, 3)}
    scales = {path: float(group["scale"]) for path, group in state.frozen.items()}
    assert scales == {"down/kernel": 3.0, "up/kernel": 0.5}
