"""SaRA: the card's checks, the penalty, the switch, and the official golden vectors."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import pefts
from pefts.bound import Call
from pefts.methods.sara import (
    effective,
    learning_rate,
    selected,
    threshold_for,
)
from pefts.optimizers import restart_at

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "official" / "sara" / "golden.npz"
THRESHOLD = 0.1


class Mlp(nn.Module):
    """y = tanh(x W1 + b1) W2 + b2."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(7, name="second")(jnp.tanh(nn.Dense(20, name="first")(x)))


@pytest.fixture
def x(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (5, 12))


@pytest.fixture
def params(key: jax.Array, x: jax.Array) -> dict:
    return tiny_bias(Mlp().init(key, x)["params"])


def tiny_bias(params: dict) -> dict:
    """Biases off zero, some of them over the threshold."""
    return jax.tree.map(
        lambda leaf: jnp.linspace(-0.3, 0.3, leaf.size) if leaf.ndim == 1 else leaf, params
    )


def flat(tree: dict) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in pefts.paths.flatten(tree).items()}


def outputs(peft: pefts.Peft, params: dict, state: pefts.PeftState, x: jax.Array) -> jax.Array:
    return pefts.apply(Mlp().apply)({"params": peft.bind(params, state)}, x)


def train(
    peft: pefts.Peft,
    params: dict,
    state: pefts.PeftState,
    x: jax.Array,
    target: jax.Array,
    tx: optax.GradientTransformation,
    steps: int,
) -> list[pefts.PeftState]:
    """The state before the first update and after each."""

    @jax.jit
    def step(state: pefts.PeftState, moments, index):
        def loss(trainable):
            full = state._replace(trainable=trainable)
            error = outputs(peft, params, full, x) - target
            return jnp.mean(error**2) + peft.penalty(full).astype(error.dtype)

        grads = jax.grad(loss)(state.trainable)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            updates, moments = tx.update(grads, moments, state.trainable)
        state = state._replace(trainable=optax.apply_updates(state.trainable, updates))
        return peft.update(state, grads, index), moments

    moments, states = tx.init(state.trainable), [state]
    for index in range(steps):
        state, moments = step(state, moments, jnp.asarray(index, jnp.int32))
        states.append(state)
    return states


def test_the_first_outputs_are_the_models(key, params, x) -> None:
    peft = pefts.sara(THRESHOLD, rank_penalty=0)
    state = peft.init(key, params)
    np.testing.assert_array_equal(
        jax.jit(lambda s: outputs(peft, params, s, x))(state),
        jax.jit(lambda p: Mlp().apply({"params": p}, x))(params),
    )
    for path, leaf in flat(peft.merge(params, state)).items():
        np.testing.assert_array_equal(leaf, flat(params)[path])
    low = tiny.cast(params, jnp.bfloat16)
    for path, leaf in flat(peft.merge(low, peft.init(key, low))).items():
        np.testing.assert_array_equal(leaf, flat(low)[path])


def test_entries_outside_the_mask_never_move(key, params, x) -> None:
    """Signed values, weight decay, momentum and the switch included."""
    peft = pefts.sara(THRESHOLD, reselect_step=3, min_side=5, rank_penalty=1e-2)
    state = peft.init(key, params)
    tx = restart_at(optax.adamw(0.03, weight_decay=0.5), peft.traits.restart_steps)
    states = train(peft, params, state, x, jnp.ones((5, 7)), tx, 6)
    base, last = flat(params), flat(peft.merge(params, states[-1]))
    assert set(base) == set(state.trainable)
    for path, leaf in last.items():
        mask = np.abs(base[path]) < np.float32(THRESHOLD)
        assert mask.any() and not mask.all()
        np.testing.assert_array_equal(leaf[~mask], base[path][~mask])
        assert (leaf[mask] != base[path][mask]).all(), path


def test_grown_entries_are_held_at_the_switch(key, params, x) -> None:
    peft = pefts.sara(THRESHOLD, reselect_step=3, rank_penalty=0)
    assert peft.traits.restart_steps == (3,)
    state = peft.init(key, params)
    tx = restart_at(optax.adamw(0.05, weight_decay=0.5), peft.traits.restart_steps)
    states = train(peft, params, state, x, jnp.ones((5, 7)), tx, 7)
    before, after = selected(states[2]), selected(states[3])
    assert before == selected(state) and sum(after.values()) < sum(before.values())
    for path in state.trainable:
        switch, end = states[3], states[-1]
        active = np.asarray(switch.frozen[path]["active"])
        values, last = (np.asarray(s.trainable[path]["values"]) for s in (switch, end))
        np.testing.assert_array_equal(active, np.abs(values) < np.float32(THRESHOLD))
        np.testing.assert_array_equal(last[~active], values[~active])
        assert (last[active] != values[active]).all()
        np.testing.assert_array_equal(end.frozen[path]["active"], active)
    assert any((~np.asarray(g["active"])).any() for g in states[3].frozen.values())


def test_held_entries_get_no_gradient_and_leave_the_penalty(key, params, x) -> None:
    peft = pefts.sara(THRESHOLD, reselect_step=1, rank_mode="all", min_side=5, rank_penalty=1.0)
    state = peft.init(key, params)
    grown = state._replace(trainable=jax.tree.map(lambda v: 2 * v, state.trainable))
    switched = peft.update(grown, state.trainable, jnp.asarray(0, jnp.int32))

    def loss(trainable):
        full = switched._replace(trainable=trainable)
        return jnp.sum(outputs(peft, params, full, x) ** 2) + peft.penalty(full)

    grads = jax.grad(loss)(switched.trainable)
    for path, group in grads.items():
        active = np.asarray(switched.frozen[path]["active"])
        assert (~active).any() and not np.any(np.asarray(group["values"])[~active])
        assert np.all(np.asarray(group["values"])[active])
    expected = 0.0
    for path in ("first/kernel", "second/kernel"):
        W, p = flat(params)[path], {**switched.frozen[path], **switched.trainable[path]}
        X = np.zeros(W.size)
        X[np.asarray(p["idx"])] = np.where(p["active"], p["values"], 0.0)
        expected += np.linalg.norm(X.reshape(W.shape), "nuc")
    np.testing.assert_allclose(peft.penalty(switched), expected, rtol=1e-5)


def test_the_gradient_is_the_dense_one_at_the_indices(key, params, x) -> None:
    peft = pefts.sara(THRESHOLD, rank_penalty=0)
    state = pefts.randomize(key, peft.init(key, params), 0.02)
    target = jax.random.normal(key, (5, 7))

    def loss(y: jax.Array) -> jax.Array:
        return jnp.mean((y - target) ** 2)

    sparse = jax.grad(lambda t: loss(outputs(peft, params, state._replace(trainable=t), x)))(
        state.trainable
    )
    dense = jax.grad(lambda p: loss(Mlp().apply({"params": p}, x)))(peft.merge(params, state))
    for path, group in sparse.items():
        idx = np.asarray(state.frozen[path]["idx"])
        expected = flat(dense)[path].reshape(-1)[idx]
        np.testing.assert_allclose(group["values"], expected, rtol=1e-5, atol=1e-8)
        assert group["values"].shape == idx.shape and (np.diff(idx) > 0).all()


def test_the_base_gets_the_gradient_of_the_other_entries(key) -> None:
    W = jax.random.normal(key, (6, 9))
    state = pefts.sara(0.5, rank_penalty=0).init(key, {"kernel": W})
    p = {**state.trainable["kernel"], **state.frozen["kernel"]}
    weight = jax.random.normal(jax.random.key(1), W.shape)
    grad = jax.grad(lambda W: jnp.sum(weight * effective(W, p, Call())))(W)
    np.testing.assert_array_equal(grad, np.where(np.abs(W) < 0.5, 0.0, weight))


def test_saved_and_loaded_it_is_the_same_model(key, params, x, tmp_path: Path) -> None:
    peft = pefts.sara(THRESHOLD, reselect_step=2, min_side=5)
    state = pefts.randomize(key, peft.init(key, params))
    file = tmp_path / "adapter.safetensors"
    pefts.save(file, peft, state, params)
    again, loaded = pefts.load(file, params)
    assert again.config == peft.config
    for path, leaf in flat(again.merge(params, loaded)).items():
        np.testing.assert_array_equal(leaf, flat(peft.merge(params, state))[path])


def test_a_large_penalty_shrinks_the_nuclear_norm(key, params, x) -> None:
    weights = {}
    for weight in (1e-6, 1.0):
        peft = pefts.sara(THRESHOLD, rank_mode="all", min_side=5, rank_penalty=weight)
        state = peft.init(key, params)
        states = train(peft, params, state, x, jnp.ones((5, 7)), optax.adam(3e-3), 30)
        weights[weight] = [float(peft.penalty(s)) / weight for s in (states[0], states[-1])]
    assert weights[1.0][1] < 0.5 * weights[1.0][0]
    assert weights[1e-6][1] > 0.9 * weights[1e-6][0]


# --- what is selected ---


def test_stacked_layers_are_padded_to_the_longest(key) -> None:
    W = jnp.stack([jnp.linspace(0.0, 1.0, 12), jnp.linspace(0.0, 2.0, 12)]).reshape(2, 4, 3)
    params = {"kernel": W, "far": {"kernel": jnp.ones((4, 3))}}
    peft = pefts.sara(0.5, rank_penalty=0, axes={"far": "io", "^kernel": "lio"}, reselect_step=1)
    state = peft.init(key, params)
    assert set(state.trainable) == {"kernel"}, "a leaf without small entries takes no part"
    assert state.trainable["kernel"]["values"].shape == (2, 6)
    assert selected(state) == {"kernel": 6 + 3}
    assert state.frozen["kernel"]["idx"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 15, 16, 17]]
    moved = state._replace(trainable={"kernel": {"values": jnp.full((2, 6), 7.0)}})
    mask = np.abs(np.asarray(W)) < 0.5
    np.testing.assert_array_equal(peft.merge(params, moved)["kernel"], np.where(mask, 7.0, W))
    grads = jax.grad(lambda t: jnp.sum(peft.merge(params, state._replace(trainable=t))["kernel"]))(
        state.trainable
    )
    np.testing.assert_array_equal(grads["kernel"]["values"], [[1.0] * 6, [1.0] * 3 + [0.0] * 3])


def test_a_threshold_for_a_share_of_the_entries(key, params) -> None:
    total = pefts.count(params)
    for fraction in (1e-3, 0.1, 0.5, 1.0):
        theta = threshold_for(params, fraction)
        below = sum(int((np.abs(leaf) < theta).sum()) for leaf in flat(params).values())
        assert below == np.ceil(fraction * total)
        state = pefts.sara(theta, rank_penalty=0).init(key, params)
        assert sum(selected(state).values()) == below
    kernels = threshold_for(params, 0.25, targets="kernel$")
    assert sum(int((np.abs(W) < kernels).sum()) for p, W in flat(params).items() if "k" in p) == 95
    zeros = {"bias": jnp.zeros(4), "kernel": jnp.linspace(1.0, 2.0, 6).reshape(2, 3)}
    assert 0 < threshold_for(zeros, 0.1) < 1e-30
    with pytest.raises(ValueError, match="fraction=0"):
        threshold_for(params, 0)


def test_small_entries_matter_least(key, x) -> None:
    """The paper's observation, on a model that was trained: the smallest tenth can go."""
    params, target = Mlp().init(key, x)["params"], jnp.sin(3 * x[:, :7])
    loss = jax.jit(lambda p: jnp.mean((Mlp().apply({"params": p}, x) - target) ** 2))
    tx = optax.adam(1e-2)
    moments, step = tx.init(params), jax.jit(tx.update)
    for _ in range(100):
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = step(jax.grad(loss)(params), moments)
        params = optax.apply_updates(params, updates)
    low, high = threshold_for(params, 0.1), threshold_for(params, 0.9)
    without_small = jax.tree.map(lambda W: jnp.where(jnp.abs(W) < low, 0.0, W), params)
    without_large = jax.tree.map(lambda W: jnp.where(jnp.abs(W) >= high, 0.0, W), params)
    base, small, large = (float(loss(p)) for p in (params, without_small, without_large))
    assert small - base < 0.02 * (large - base)


def test_the_learning_rate_of_a_threshold() -> None:
    rates = {5e-4: 8.3946e-4, 2e-3: 4.9659e-4, 1e-2: 3.0197e-5}
    for threshold, rate in rates.items():
        assert learning_rate(threshold) == pytest.approx(rate, rel=1e-4)
    with pytest.raises(ValueError, match="threshold=0"):
        learning_rate(0)


# --- errors ---


def test_shapes_that_depend_on_values_are_refused_inside_jit(params) -> None:
    peft = pefts.sara(THRESHOLD, rank_penalty=0)
    with pytest.raises(ValueError, match="inside jit or eval_shape; call peft.init outside"):
        jax.eval_shape(peft.init, jax.random.key(0), params)


def test_another_models_state_is_refused(key) -> None:
    peft = pefts.sara(THRESHOLD, rank_penalty=0)
    state = peft.init(key, {"kernel": jnp.zeros((4, 6))})
    with pytest.raises(
        ValueError, match=r"entries of a \(4, 6\) kernel and is used on one of \(6, 4\)"
    ):
        peft.merge({"kernel": jnp.zeros((6, 4))}, state)


def test_a_leaf_too_large_for_its_indices_is_refused() -> None:
    from pefts.methods.sara import _entries
    from pefts.targets import Site

    site = Site("wte/embedding", (2**20, 2**11), "io")
    with pytest.raises(ValueError, match="wte/embedding.*too many for 32-bit indices"):
        _entries(jnp.zeros((2, 3)), site, threshold=1.0)


# --- official golden vectors: torch kernels are ours transposed ---


@pytest.fixture
def golden() -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("../shared/golden/official/sara is not on this machine")
    return dict(np.load(GOLDEN))


LEAVES = {
    "first/kernel": "W1",
    "first/bias": "b1",
    "second/kernel": "W2",
    "second/bias": "b2",
}


def golden_params(golden: dict[str, np.ndarray]) -> dict:
    return pefts.paths.unflatten(
        {path: jnp.asarray(golden[f"{name}_0"].T) for path, name in LEAVES.items()}
    )


def mask_of(state: pefts.PeftState, path: str, shape: tuple[int, ...]) -> np.ndarray:
    group = state.frozen[path]
    mask = np.zeros(int(np.prod(shape)), bool)
    mask[np.asarray(group["idx"])] = np.asarray(group.get("active", True))
    return mask.reshape(shape)


def test_golden_masks_and_learning_rates(golden) -> None:
    with jax.enable_x64(True):
        params = golden_params(golden)
        peft = pefts.sara(float(golden["theta"]), rank_penalty=0)
        state = peft.init(jax.random.key(0), params)
        for path, name in LEAVES.items():
            expected = golden[f"mask0_{name}"].T
            np.testing.assert_array_equal(mask_of(state, path, expected.shape), expected)
            np.testing.assert_array_equal(
                flat(peft.merge(params, state))[path],
                golden[f"effective_step0_recommended_{name}"].T,
            )
    rates = [learning_rate(float(theta)) for theta in golden["lr_rule_theta"]]
    np.testing.assert_allclose(rates, golden["lr_rule_value"], rtol=1e-14)


def test_golden_nuclear_norm(golden) -> None:
    with jax.enable_x64(True):
        params = {"kernel": jnp.asarray(golden["W1_0"].T)}
        peft = pefts.sara(float(golden["theta"]), rank_penalty=1.0, rank_mode="all", min_side=4)
        state = peft.init(jax.random.key(0), params)
        value, grads = jax.value_and_grad(lambda t: peft.penalty(state._replace(trainable=t)))(
            state.trainable
        )
        np.testing.assert_allclose(value, golden["nuc_value_W1"], rtol=1e-12)
        mask = golden["mask0_W1"].T
        np.testing.assert_allclose(
            grads["kernel"]["values"], golden["nuc_grad_W1"].T[mask], rtol=0, atol=1e-12
        )


def test_golden_trajectory_over_the_switch(golden) -> None:
    with jax.enable_x64(True):
        params, switch = golden_params(golden), int(golden["T_p"])
        peft = pefts.sara(float(golden["theta"]), reselect_step=switch, rank_penalty=0)
        state = peft.init(jax.random.key(0), params)
        adam = optax.adamw(
            float(golden["lr"]),
            *(float(golden[name]) for name in ("beta1", "beta2", "eps")),
            weight_decay=float(golden["weight_decay"]),
        )
        tx = restart_at(adam, peft.traits.restart_steps)
        X, Y = jnp.asarray(golden["X"]), jnp.asarray(golden["Y"])
        states = train(peft, params, state, X, Y, tx, int(golden["steps"]))
        for index, one in enumerate(states):
            for path, leaf in flat(peft.merge(params, one)).items():
                np.testing.assert_allclose(
                    leaf, golden[f"recommended_params_{LEAVES[path]}"][index].T, rtol=0, atol=1e-12
                )
        for path, name in LEAVES.items():
            expected = golden[f"recommended_mask1_{name}"].T
            np.testing.assert_array_equal(mask_of(states[-1], path, expected.shape), expected)
            assert expected.sum() <= golden[f"mask0_{name}"].sum()
