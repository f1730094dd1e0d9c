"""SORSA beyond the table: vectors of the official code, the penalty and its decoupled form."""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts

GOLDEN = Path(__file__).parents[2] / "shared/golden/official/sorsa/golden.npz"
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}
KERNELS = {"first/kernel": "l1", "second/kernel": "l2"}
# ours -> theirs, and whether theirs is the transpose
NAMES = {"P": ("sorsa_A", True), "sigma": ("sorsa_S", False), "Q": ("sorsa_B", True)}


class Net(nn.Module):
    """12 -> 16 -> 20 with tanh between."""

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, param_dtype=jnp.float64, dtype=jnp.float64)
        hidden = jnp.tanh(dense(16, use_bias=False, name="first")(x))
        return dense(20, use_bias=False, name="second")(hidden)


@pytest.fixture(params=["a_none", "a_set"])
def golden(request):
    """(values of one setting, common values)"""
    if not GOLDEN.exists():
        pytest.skip("the official SORSA vectors (../shared/golden/official/sorsa) are absent")
    stored = dict(np.load(GOLDEN))
    prefix = f"{request.param}_"
    own = {name.removeprefix(prefix): v for name, v in stored.items() if name.startswith(prefix)}
    return {**stored, **own}


def official(golden: dict, **kwargs) -> tuple:
    """The parameters, the method with the golden settings, its state at the start."""
    kernels = {"first": golden["W1"], "second": golden["W2"]}
    params = {name: {"kernel": jnp.asarray(W.T)} for name, W in kernels.items()}
    rank, s = int(golden["rank"]), float(golden["s"])
    alpha = None if s == 1 else s * rank
    settings = {
        "gamma": float(golden["gamma"]),
        "peak_learning_rate": float(golden["peak_lr"]),
        **kwargs,
    }
    peft = pefts.sorsa(rank, alpha, **settings)
    return params, peft, peft.init(jax.random.key(0), params)


def theirs(golden: dict, kind: str, names: tuple[str, ...] = tuple(NAMES)) -> dict:
    """{path: {P, sigma, Q}} of one kind of value, in the orientation of kernels."""
    found = {}
    for path, layer in KERNELS.items():
        group = {}
        for name in names:
            key, transposed = NAMES[name]
            value = golden[kind.format(layer=layer, name=key)]
            group[name] = jnp.asarray(value.T if transposed else value)
        found[path] = group
    return found


def perturbed(golden: dict, state: pefts.PeftState) -> pefts.PeftState:
    """Their later values, beside their start values, whose signs differ from ours."""
    start = theirs(golden, "{layer}_{name}_init")
    frozen = {
        path: {**group, **{f"{name}0": value for name, value in start[path].items()}}
        for path, group in state.frozen.items()
    }
    return pefts.PeftState(theirs(golden, "{layer}_{name}"), frozen)


def product(group: dict, suffix: str = "") -> np.ndarray:
    P, sigma, Q = (np.asarray(group[f"{name}{suffix}"]) for name in ("P", "sigma", "Q"))
    return (P * sigma) @ Q


def test_the_start_is_that_of_the_released_code(golden, x64):
    params, peft, state = official(golden)
    start = theirs(golden, "{layer}_{name}_init")
    for path, layer in KERNELS.items():
        trained, held = state.trainable[path], state.frozen[path]
        np.testing.assert_allclose(trained["sigma"], start[path]["sigma"], **TOLERANCE)
        np.testing.assert_allclose(product(trained), product(start[path]), **TOLERANCE)
        np.testing.assert_array_equal(product(trained), product(held, "0"))
        W = np.asarray(params[path.partition("/")[0]]["kernel"])
        residual = W - float(held["scale"]) * product(held, "0")
        np.testing.assert_allclose(residual, golden[f"{layer}_W_res"].T, **TOLERANCE)
    bound = {"params": peft.bind(params, state)}
    y = pefts.apply(Net().apply)(bound, jnp.asarray(golden["x"]))
    np.testing.assert_allclose(y, golden["y_init"], **TOLERANCE)
    assert float(peft.penalty(state)) == 0 and float(golden["reg_init"]) < 1e-14


def test_outputs_penalty_and_gradients_are_those_of_the_released_code(golden, x64):
    params, peft, state = official(golden)
    state = perturbed(golden, state)
    weight = float(golden["gamma"] / golden["peak_lr"])

    def task(trainable):
        bound = peft.bind(params, state._replace(trainable=trainable))
        y = pefts.apply(Net().apply)({"params": bound}, jnp.asarray(golden["x"]))
        return jnp.sum(y * jnp.asarray(golden["cot"])), y

    def penalty(trainable):
        return peft.penalty(state._replace(trainable=trainable))

    grads, y = jax.grad(task, has_aux=True)(state.trainable)
    np.testing.assert_allclose(y, golden["y"], **TOLERANCE)
    np.testing.assert_allclose(penalty(state.trainable), weight * golden["reg"], **TOLERANCE)
    pull = jax.grad(penalty)(state.trainable)
    total = jax.tree.map(jnp.add, grads, pull)
    alone = jax.tree.map(lambda g: g / weight, pull)
    factors = ("P", "Q")
    for found, kind, names in (
        (grads, "{layer}_gtask_{name}", tuple(NAMES)),
        (alone, "{layer}_greg_{name}", factors),
        (total, "{layer}_gtotal_{name}", factors),
    ):
        for path, group in theirs(golden, kind, names).items():
            for name, value in group.items():
                where = f"{kind} {path} {name}"
                np.testing.assert_allclose(found[path][name], value, **TOLERANCE, err_msg=where)


def test_the_decoupled_form_moves_by_gamma_times_the_gradient(golden, x64):
    """And not by the penalty: the paper's W <- W - gamma grad L, after the optimizer's step."""
    params, peft, state = official(golden, decoupled=True, gamma=0.25)
    state = perturbed(golden, state)
    assert float(peft.penalty(state)) == 0
    moved = peft.update(state, state.trainable, jnp.asarray(0))
    greg = theirs(golden, "{layer}_greg_{name}", ("P", "Q"))
    for path, group in state.trainable.items():
        np.testing.assert_array_equal(moved.trainable[path]["sigma"], group["sigma"])
        for name in "PQ":
            wanted = group[name] - 0.25 * greg[path][name]
            np.testing.assert_allclose(moved.trainable[path][name], wanted, **TOLERANCE)
    coupled = official(golden)[1]
    assert coupled.update(state, state.trainable, jnp.asarray(0)) is state
    assert jax.tree.all(jax.tree.map(np.array_equal, moved.frozen, state.frozen))


def layers(key: jax.Array, stack: int = 3) -> dict:
    return {
        "up": {"kernel": jax.random.normal(key, (stack, 24, 40))},
        "down": {"kernel": jax.random.normal(jax.random.fold_in(key, 1), (40, 24))},
    }


def distances(state: pefts.PeftState, path: str, layer: tuple[int, ...] = ()) -> list[float]:
    """||P^T P - I||_F and ||Q Q^T - I||_F of one kernel, in float64."""
    group = {name: np.asarray(v, np.float64)[layer] for name, v in state.trainable[path].items()}
    eye = np.eye(len(group["sigma"]))
    grams = (group["P"].T @ group["P"], group["Q"] @ group["Q"].T)
    return [float(np.linalg.norm(gram - eye)) for gram in grams]


def test_the_penalty_is_a_mean_over_two_matrices_of_every_layer(key):
    peft = pefts.sorsa(rank=4, gamma=3e-3, peak_learning_rate=1e-3, axes={"up": "lio"})
    state = pefts.randomize(key, peft.init(key, layers(key)), 0.1)
    every = [d for n in range(3) for d in distances(state, "up/kernel", (n,))]
    every += distances(state, "down/kernel")
    assert len(every) == 8
    np.testing.assert_allclose(peft.penalty(state), 3.0 * np.mean(every), rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 24])
def test_a_fresh_state_has_no_penalty_and_no_noise_as_its_gradient(key, rank):
    """The released code's root has a gradient of unit size in the direction of the rounding."""
    peft = pefts.sorsa(rank=rank, axes={"up": "lio"})
    state = peft.init(key, layers(key))
    loss, grads = jax.value_and_grad(lambda t: peft.penalty(state._replace(trainable=t)))(
        state.trainable
    )
    assert float(loss) == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))
    raw = [d for n in range(3) for d in distances(state, "up/kernel", (n,))]
    assert np.mean([*raw, *distances(state, "down/kernel")]) < 1e-4


def test_small_departures_count(key):
    """Far above the rounding and far below anything that training does."""
    peft = pefts.sorsa(rank=4, gamma=1.0, peak_learning_rate=1.0, axes={"up": "lio"})
    state = pefts.randomize(key, peft.init(key, layers(key)), 1e-5)
    every = [d for n in range(3) for d in distances(state, "up/kernel", (n,))]
    every += distances(state, "down/kernel")
    np.testing.assert_allclose(peft.penalty(state), np.mean(every), rtol=2e-2)


@pytest.mark.parametrize("decoupled", [False, True])
def test_steps_on_the_penalty_alone_restore_orthonormal_factors(key, decoupled):
    peft = pefts.sorsa(
        rank=4, gamma=0.02, peak_learning_rate=1.0, decoupled=decoupled, axes={"up": "lio"}
    )
    state = pefts.randomize(key, peft.init(key, layers(key)), 0.05)
    before = distances(state, "down/kernel")

    def step(state, index):
        if decoupled:
            return peft.update(state, state.trainable, index), None
        pull = jax.grad(lambda t: peft.penalty(state._replace(trainable=t)))(state.trainable)
        moved = jax.tree.map(lambda leaf, g: leaf - g, state.trainable, pull)
        return state._replace(trainable=moved), None

    state, _ = jax.lax.scan(step, state, jnp.arange(300))
    after = distances(state, "down/kernel")
    assert min(before) > 0.2 and max(after) < 0.02


def test_no_strength_is_no_penalty(key):
    peft = pefts.sorsa(rank=4, gamma=0.0, axes={"up": "lio"})
    state = pefts.randomize(key, peft.init(key, layers(key)))
    assert float(peft.penalty(state)) == 0


@pytest.mark.parametrize("alpha", [None, 1.0, 12.0])
def test_every_scale_starts_at_the_identity_and_converts_to_a_lora(key, alpha):
    params = layers(key)
    peft = pefts.sorsa(rank=4, alpha=alpha, axes={"up": "lio"})
    state = peft.init(key, params)
    jax.tree.map(np.testing.assert_array_equal, peft.merge(params, state), params)
    moved = pefts.randomize(key, state)
    lora, plain = pefts.to_lora(peft, moved, params)
    assert lora.config["rank"] == 8
    for one, other in zip(
        jax.tree.leaves(peft.merge(params, moved)),
        jax.tree.leaves(lora.merge(params, plain)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_an_alpha_pattern_scales_its_kernel_alone(key):
    params = layers(key)
    peft = pefts.sorsa(rank=4, alpha=4.0, alpha_pattern={"up": 8.0}, axes={"up": "lio"})
    frozen = peft.init(key, params).frozen
    assert frozen["down/kernel"]["scale"] == 1 and np.all(frozen["up/kernel"]["scale"] == 2)
