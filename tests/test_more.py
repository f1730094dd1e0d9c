"""MoRe beyond the table: rank of the update, dropout on the output, official golden vectors."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.bound import Call
from pefts.methods.monarch import product
from pefts.methods.more import factors

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "official" / "more" / "golden.npz"
D_IN, D_OUT = 24, 40


def problem(key: jax.Array, **kwargs: Any) -> tuple:
    model = nn.Dense(D_OUT)
    x = jax.random.normal(jax.random.fold_in(key, 1), (5, D_IN))
    params = model.init(key, x)["params"]
    peft = pefts.more(targets="kernel", **kwargs)
    state = pefts.randomize(jax.random.fold_in(key, 2), peft.init(key, params))
    return model, x, params, peft, state


@pytest.mark.parametrize(("blocks", "rank"), [(4, 4), (8, 2), (2, 7), (1, 3)])
def test_the_update_has_rank_blocks_times_rank(key, blocks, rank):
    """Times N what a LoRA of as many parameters has, and never more."""
    _, _, params, peft, state = problem(key, blocks=blocks, rank=rank)
    delta = peft.merge(params, state)["kernel"] - params["kernel"]
    assert np.linalg.matrix_rank(np.asarray(delta, np.float64), tol=1e-5) == blocks * rank
    lora = pefts.lora(rank=rank, targets="kernel").init(key, params)
    assert pefts.count(state.trainable) == pefts.count(lora.trainable)


def test_one_block_is_a_lora(key):
    _, x, params, peft, state = problem(key, blocks=1, rank=3)
    group = state.trainable["kernel"]
    A, B = factors(group, Call())
    np.testing.assert_array_equal(A, group["w1"][0])
    np.testing.assert_array_equal(B, group["w2"][0])


@pytest.mark.parametrize(("blocks", "rank"), [(4, 4), (4, 3), (2, 5)])
def test_the_factors_are_the_monarch_product(key, blocks, rank):
    """Also where the rank is no multiple of the blocks."""
    _, x, _, _, state = problem(key, blocks=blocks, rank=rank)
    group = state.trainable["kernel"]
    A, B = factors(group, Call())
    assert A.shape == (D_IN, blocks * rank) and B.shape == (blocks * rank, D_OUT)
    by_blocks = product(x, group["w1"], group["w2"])
    np.testing.assert_allclose(x @ A @ B, by_blocks, rtol=1e-5, atol=1e-6)


def test_dropout_takes_outputs_of_the_adapter_alone(key):
    model, x, params, peft, state = problem(key, dropout=0.4)
    variables = {"params": peft.bind(params, state)}
    base = model.apply({"params": params}, x)
    whole = pefts.apply(model.apply)(variables, x) - base
    part = pefts.apply(model.apply)(variables, x, rngs={"dropout": key}) - base
    is_kept = np.abs(part) > 1e-6
    assert 0.4 < is_kept.mean() < 0.8
    np.testing.assert_allclose(part, np.where(is_kept, whole / 0.6, 0), rtol=1e-4, atol=1e-5)


def test_starts_uniform_over_the_inputs_of_a_block_and_at_zero(key):
    _, _, params, peft, _ = problem(key)
    group = peft.init(key, params).trainable["kernel"]
    w1, bound = np.asarray(group["w1"]), 1 / np.sqrt(D_IN / 4)
    assert 0.9 * bound < np.abs(w1).max() <= bound
    np.testing.assert_allclose(w1.std(), bound / np.sqrt(3), rtol=0.15)
    assert not np.asarray(group["w2"]).any()


def test_as_a_lora_of_rank_blocks_times_rank(key):
    model, x, params, peft, state = problem(key, blocks=4, rank=3)
    lora, converted = pefts.to_lora(peft, state, params)
    assert lora.config["rank"] == 12
    runs = [
        pefts.apply(model.apply)({"params": one.bind(params, s)}, x)
        for one, s in ((peft, state), (lora, converted))
    ]
    np.testing.assert_allclose(*runs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["conv", "embed"])
def test_factored_equals_merged_in_convolutions_and_embeddings(key, kind):
    if kind == "conv":
        model, x = nn.Conv(8, (3,)), jax.random.normal(key, (2, 9, 4))
    else:
        model, x = nn.Embed(12, 8), jnp.arange(8).reshape(2, 4)
    params = model.init(key, x)["params"]
    axes = pefts.infer_axes(model.apply, params, x)
    peft = pefts.more(rank=2, targets="kernel|embedding", axes=axes)
    state = pefts.randomize(key, peft.init(key, params))
    factored = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    merged = model.apply({"params": peft.merge(params, state)}, x)
    np.testing.assert_allclose(factored, merged, rtol=2e-5, atol=2e-6)
    assert not np.allclose(merged, model.apply({"params": params}, x), atol=1e-2)


def test_nothing_of_the_kernels_size_is_built(key):
    _, x, params, peft, state = problem(key)
    bound = peft.bind(params, state)["kernel"]

    def loss(p: Any) -> jax.Array:
        return jnp.sum(bound.rule.linear(x, bound.base, p, Call()) ** 2)

    program = jax.make_jaxpr(jax.grad(loss))(dict(bound.state))
    sizes = [v.aval.size for equation in program.jaxpr.eqns for v in equation.outvars]
    assert max(sizes) < bound.base.size


# --- official golden vectors: torch kernels are ours transposed, and so is every block ---


@pytest.fixture
def golden() -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("../shared/golden/official/more is not on this machine")
    return dict(np.load(GOLDEN))


def golden_case(golden: dict) -> tuple[pefts.Peft, dict, pefts.PeftState]:
    params = {"kernel": jnp.asarray(golden["W"].T), "bias": jnp.asarray(golden["bias"])}
    peft = pefts.more(int(golden["nblocks"]), int(golden["blk_r"]), targets="kernel")
    w1, w2 = (jnp.asarray(golden[name].swapaxes(1, 2)) for name in ("w1", "w2"))
    state = peft.init(jax.random.key(0), params)
    assert [state.trainable["kernel"][n].shape for n in ("w1", "w2")] == [w1.shape, w2.shape]
    return peft, params, state._replace(trainable={"kernel": {"w1": w1, "w2": w2}})


def test_golden_output_and_gradients(golden):
    with jax.enable_x64(True):
        peft, params, state = golden_case(golden)
        model = nn.Dense(len(golden["bias"]), param_dtype=jnp.float64)

        def run(trainable: Any) -> jax.Array:
            bound = peft.bind(params, state._replace(trainable=trainable))
            return pefts.apply(model.apply)({"params": bound}, jnp.asarray(golden["x"]))

        y, pull = jax.vjp(run, state.trainable)
        np.testing.assert_allclose(y, golden["y"], rtol=0, atol=1e-9)
        group = pull(jnp.asarray(golden["cot"]))[0]["kernel"]
        for name in ("w1", "w2"):
            expected = golden[f"grad_{name}"].swapaxes(1, 2)
            np.testing.assert_allclose(group[name], expected, rtol=0, atol=1e-9)


def test_golden_merge_and_its_rank(golden):
    """The released merge pushes a float32 identity through the factors."""
    with jax.enable_x64(True):
        peft, params, state = golden_case(golden)
        merged = peft.merge(params, state)["kernel"]
        np.testing.assert_allclose(merged, golden["W_merged"].T, rtol=0, atol=1e-6)
        y = golden["x"] @ merged + params["bias"][None, None]
        np.testing.assert_allclose(y, golden["y_merged"], rtol=0, atol=1e-6)
        assert np.linalg.matrix_rank(merged - params["kernel"]) == golden["delta_rank"]
