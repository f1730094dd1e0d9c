"""LoRA-GA beyond the table: real peft's factors, the released code's formulas, the first step."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.methods.lora_ga import SCALES

D_IN, D_OUT, RANK, ALPHA = 12, 16, 2, 6.0
S = ALPHA / RANK


def matrix_with_a_gap(seed: int) -> np.ndarray:
    """(D_IN, D_OUT) whose singular values halve, so that a randomised SVD finds them."""
    rng = np.random.default_rng(seed)
    U, _ = np.linalg.qr(rng.normal(size=(D_IN, D_IN)))
    V, _ = np.linalg.qr(rng.normal(size=(D_OUT, D_IN)))
    return (U * 0.5 ** np.arange(D_IN)) @ V.T


G, W = matrix_with_a_gap(0), matrix_with_a_gap(1)
U, SIGMA, VT = np.linalg.svd(G, full_matrices=False)


def build(**kwargs: Any) -> pefts.Peft:
    return pefts.lora_ga(**{"rank": RANK, "alpha": ALPHA, **kwargs})


def started(gradient: np.ndarray = G, **kwargs: Any) -> dict[str, np.ndarray]:
    params = {"kernel": jnp.asarray(W, jnp.float32)}
    stats = {"kernel": {"gradient": jnp.asarray(gradient, jnp.float32)}}
    state = build(**kwargs).init(jax.random.key(0), params, stats)
    return {n: np.asarray(leaf, np.float64) for g in state for n, leaf in g["kernel"].items()}


def same_pairs(p: Any, A: np.ndarray, B: np.ndarray) -> None:
    """Column i of A and row i of B, whose signs are free."""
    np.testing.assert_allclose(np.abs(np.sum(p["A"] * A, 0)), np.sum(A * A, 0), rtol=1e-4)
    np.testing.assert_allclose(p["A"] @ p["A"].T, A @ A.T, atol=1e-5 * np.abs(A @ A.T).max())
    np.testing.assert_allclose(p["B"].T @ p["B"], B.T @ B, atol=1e-5 * np.abs(B.T @ B).max())
    products = np.einsum("ir,ro->rio", p["A"], p["B"]), np.einsum("ir,ro->rio", A, B)
    np.testing.assert_allclose(*map(np.abs, products), atol=1e-4 * np.abs(products[1]).max())


# --- Hugging Face PEFT ---


def real_peft(direction: str, scale: str, gamma: float = 16.0) -> Any:
    """(the peft model of one Linear layer, its lora layer)."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.dense = torch.nn.Linear(D_IN, D_OUT, bias=False)
    net.dense.weight.data = torch.tensor(W.T, dtype=torch.float32)
    net.dense._peft_loraga_grad = torch.tensor(G.T, dtype=torch.float32)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["dense"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction=direction, scale=scale, stable_gamma=gamma),
    )
    model = peft.get_peft_model(net, config)
    return model, model.base_model.model.dense


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", SCALES)
def test_factors_are_those_of_real_peft(direction: str, scale: str) -> None:
    _, layer = real_peft(direction, scale)
    theirs_A = layer.lora_A["default"].weight.detach().numpy().T
    theirs_B = layer.lora_B["default"].weight.detach().numpy().T
    p = started(direction=direction, scale=scale)
    assert p["scale"] == layer.scaling["default"] == S
    same_pairs(p, theirs_A, theirs_B)


def test_outputs_are_those_of_real_peft_after_a_change_of_its_factors() -> None:
    """peft takes s A0 B0 out of its weight; here it is taken out of the product."""
    model, layer = real_peft("ArB2r", "stable", gamma=4.0)
    torch = pytest.importorskip("torch")
    A0, B0 = (side["default"].weight for side in (layer.lora_A, layer.lora_B))
    start = {"A0": A0.detach().numpy().T.copy(), "B0": B0.detach().numpy().T.copy()}
    rng, x = np.random.default_rng(2), np.random.default_rng(3).normal(size=(5, D_IN))
    x = x.astype(np.float32)
    with torch.no_grad():
        for weight in (A0, B0):
            weight += torch.tensor(0.3 * rng.normal(size=weight.shape), dtype=torch.float32)
        wanted = model(torch.tensor(x)).numpy()
    frozen = {**start, "scale": np.float32(S)}
    trained = {"A": A0.detach().numpy().T, "B": B0.detach().numpy().T}
    state = pefts.PeftState(
        *({"kernel": jax.tree.map(jnp.asarray, group)} for group in (trained, frozen))
    )
    params = {"kernel": jnp.asarray(W, jnp.float32)}
    bound = build().bind(params, state)
    y = pefts.apply(nn.Dense(D_OUT, use_bias=False).apply)({"params": bound}, jnp.asarray(x))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


def test_at_random_both_factors_take_the_same_triplets_as_in_peft() -> None:
    p = started(direction="random", scale="unit")
    weights = np.diag(U.T @ p["A"] @ p["B"] @ VT.T)
    taken = np.flatnonzero(np.abs(weights) > 1e-4)
    assert len(taken) == RANK and taken.max() < 2 * RANK
    np.testing.assert_allclose(weights[taken], SIGMA[taken], rtol=1e-4)


# --- the paper's released code ---

HALVES = {
    "ArB2r": (range(0, RANK), range(RANK, 2 * RANK)),
    "A2rBr": (range(RANK, 2 * RANK), range(0, RANK)),
    "ArBr": (range(1, 2 * RANK, 2), range(0, 2 * RANK, 2)),
}


def released_scale(scale: str, gamma: float) -> float:
    singular = np.linalg.svd(W, compute_uv=False)[:RANK]
    return {
        "stable": D_OUT**0.25 / gamma**0.5,
        "unit": 1.0,
        "gd_scale": 1 / S,
        "weight_svd": float(np.mean(np.sqrt(singular / S))),
    }[scale]


@pytest.mark.parametrize("direction", list(HALVES))
@pytest.mark.parametrize("scale", SCALES)
def test_factors_of_the_paper(direction: str, scale: str) -> None:
    p = started(variant="paper", direction=direction, scale=scale, stable_gamma=5.0)
    c = released_scale(scale, 5.0)
    I_A, I_B = map(list, HALVES[direction])
    same_pairs(p, c * U[:, I_A], c * VT[I_B])


def test_at_random_the_factors_of_the_paper_share_no_triplet() -> None:
    taken = set()
    for seed in range(4):
        params = {"kernel": jnp.asarray(W, jnp.float32)}
        stats = {"kernel": {"gradient": jnp.asarray(G, jnp.float32)}}
        peft = build(variant="paper", direction="random", scale="unit")
        group = peft.init(jax.random.key(seed), params, stats).trainable["kernel"]
        I_A, I_B = np.argmax(np.abs(U.T @ group["A"]), 0), np.argmax(np.abs(VT @ group["B"].T), 0)
        assert set(I_A) | set(I_B) == set(range(2 * RANK))
        taken.add(tuple(sorted(I_A)))
    assert len(taken) > 1


@pytest.mark.parametrize("direction", [*HALVES, "random"])
def test_the_first_step_is_the_best_approximation_of_the_gradient(direction: str) -> None:
    """dW' = -lr s^2 c^2 G_2r to first order, and G_2r is G's truncation to rank 2r."""
    with jax.enable_x64(True):
        peft = build(variant="paper", direction=direction)
        params, stats = {"kernel": jnp.asarray(W)}, {"kernel": {"gradient": jnp.asarray(G)}}
        state = peft.init(jax.random.key(0), params, stats)

        def loss(trainable: Any) -> jax.Array:
            return jnp.sum(peft.merge(params, state._replace(trainable=trainable))["kernel"] * G)

        grads, lr = jax.grad(loss)(state.trainable), 1e-7
        step = jax.tree.map(lambda leaf, g: leaf - lr * g, state.trainable, grads)
        moved = peft.merge(params, state._replace(trainable=step))["kernel"]
        c = released_scale("stable", 16.0)
        best = (U[:, : 2 * RANK] * SIGMA[: 2 * RANK]) @ VT[: 2 * RANK]
        np.testing.assert_allclose((moved - W) / -(lr * S**2 * c**2), best, atol=1e-6)


# --- both ---


@pytest.mark.parametrize("variant", ["peft", "paper"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_changes_at_step_0(variant: str, dtype: Any) -> None:
    """Not by a bit, though s A0 B0 is far from zero."""
    params = {"kernel": jnp.asarray(W, dtype)}
    peft = build(variant=variant, scale="weight_svd")
    state = peft.init(jax.random.key(0), params, {"kernel": {"gradient": jnp.asarray(G)}})
    p = state.frozen["kernel"]
    assert float(jnp.abs(p["scale"] * p["A0"] @ p["B0"]).max()) > 0.01
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"float32"}
    x = jax.random.normal(jax.random.key(1), (5, D_IN), dtype)
    model = nn.Dense(D_OUT, use_bias=False, dtype=dtype, param_dtype=dtype)
    y = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    np.testing.assert_array_equal(y, model.apply({"params": params}, x))
    np.testing.assert_array_equal(peft.merge(params, state)["kernel"], params["kernel"])


@pytest.mark.parametrize("scale", SCALES)
def test_a_kernel_without_a_gradient_starts_finite(scale: str) -> None:
    for variant in ("peft", "paper"):
        p = started(np.zeros_like(G), scale=scale, variant=variant)
        assert all(np.isfinite(leaf).all() for leaf in p.values())
        assert p["A"].any()


def test_the_scale_of_the_loss_reaches_the_factors_of_peft_alone() -> None:
    small = {variant: started(1e-3 * G, variant=variant) for variant in ("peft", "paper")}
    large = {variant: started(G, variant=variant) for variant in ("peft", "paper")}
    for variant, factor in (("peft", 1e-3), ("paper", 1.0)):
        ratio = np.linalg.norm(small[variant]["B"]) / np.linalg.norm(large[variant]["B"])
        np.testing.assert_allclose(ratio, factor, rtol=1e-4)


def test_a_randomised_decomposition_finds_the_same_factors() -> None:
    p, exact = started(svd="randomized"), started()
    same_pairs(p, exact["A"], exact["B"])


def test_rslora_divides_by_the_root() -> None:
    np.testing.assert_allclose(started(rslora=True)["scale"], ALPHA / np.sqrt(RANK), rtol=1e-6)


def test_embeddings_have_gradients_too(key: jax.Array) -> None:
    model, ids = nn.Embed(11, 8), jnp.asarray([[1, 4, 4], [0, 10, 2]])
    params = model.init(key, ids)["params"]

    def loss(y: jax.Array, batch: Any) -> jax.Array:
        del batch
        return jnp.sum(jnp.sin(y))

    stats = pefts.calibrate(model.apply, params, [ids], "embedding", collect="gradient", loss=loss)
    peft = build(targets="embedding")
    state = pefts.randomize(key, peft.init(key, params, stats))
    factored = pefts.apply(model.apply)({"params": peft.bind(params, state)}, ids)
    merged = model.apply({"params": peft.merge(params, state)}, ids)
    np.testing.assert_allclose(factored, merged, rtol=1e-5, atol=1e-5)
    assert not np.allclose(merged, model.apply({"params": params}, ids), atol=1e-2)


def test_a_lora_of_twice_the_rank_does_the_same(key: jax.Array) -> None:
    params = {"kernel": jnp.asarray(W, jnp.float32)}
    peft = build()
    state = peft.init(key, params, {"kernel": {"gradient": jnp.asarray(G, jnp.float32)}})
    state = pefts.randomize(key, state)
    lora, converted = pefts.to_lora(peft, state, params)
    assert lora.config["rank"] == 2 * RANK
    np.testing.assert_allclose(
        lora.merge(params, converted)["kernel"], peft.merge(params, state)["kernel"], atol=1e-5
    )
