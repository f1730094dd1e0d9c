"""Poly and MHR beyond the table: mixed batches, gates, conversions, official golden vectors."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from subject import base_inputs, base_params, model_axes

import pefts
from pefts.bound import Call
from pefts.methods.poly import for_tasks, ids_of, lora_of, mixed, weights

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "official" / "poly" / "golden.npz"
D_IN, D_OUT, TASKS = 12, 8, 4
IDS = jnp.asarray([2, 0, 3, 1])


@pytest.fixture
def W(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (D_IN, D_OUT))


@pytest.fixture
def x(key: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, 1), (len(IDS), 5, D_IN))


def poly(**kwargs: Any) -> pefts.Peft:
    given = {"rank": 3, "skills": 3, "splits": 2, "tasks": TASKS, "targets": "kernel", **kwargs}
    return pefts.poly(**given)


def moved(peft: pefts.Peft, key: jax.Array, W: jax.Array, scale: float = 0.5) -> pefts.PeftState:
    return pefts.randomize(jax.random.fold_in(key, 2), peft.init(key, {"kernel": W}), scale)


def run(peft: pefts.Peft, state: pefts.PeftState, W: jax.Array, x: jax.Array, **given: Any):
    rngs = {"rngs": {"dropout": given.pop("stream")}} if "stream" in given else {}
    bound = peft.bind({"kernel": W}, state, **given)
    return pefts.apply(nn.Dense(D_OUT, use_bias=False).apply)({"params": bound}, x, **rngs)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


# --- mixed batches ---


@pytest.mark.parametrize("splits", [1, 4])
def test_a_batch_of_tasks_is_its_separate_runs(W, x, key, splits):
    peft = poly(splits=splits)
    state = moved(peft, key, W)
    y = run(peft, state, W, x, task_ids=IDS)
    for n, task in enumerate(IDS.tolist()):
        close(y[n : n + 1], run(peft, state, W, x[n : n + 1], task_ids=IDS[n : n + 1]))
        fixed = poly(splits=splits, task=task)
        close(y[n : n + 1], run(fixed, state, W, x[n : n + 1]))
        close(y[n], x[n] @ fixed.merge({"kernel": W}, state)["kernel"])
    assert np.abs(np.diff(run(peft, state, W, x[:1].repeat(4, 0), task_ids=IDS), axis=0)).min() > 0


def test_tasks_reach_scanned_and_rematerialised_layers(key):
    """One batch of four tasks is four batches on merged models."""
    options = {"rank": 2, "skills": 3, "splits": 2, "tasks": TASKS, "axes": model_axes(True)}
    peft, params, inputs = pefts.poly(**options), base_params(), base_inputs()
    ids = jnp.arange(tiny.BATCH) % TASKS
    state = pefts.randomize(key, peft.init(key, params), 0.3)

    @jax.jit
    def outputs(ids: jax.Array) -> jax.Array:
        bound = peft.bind(params, state, task_ids=ids)
        return pefts.apply(tiny.Classifier().apply)({"params": bound}, *inputs)

    y = outputs(ids)
    for task in range(TASKS):
        dense = pefts.poly(**options, task=task).merge(params, state)
        wanted = tiny.Classifier().apply({"params": dense}, *inputs)
        close(y[ids == task], wanted[ids == task])


def test_a_task_trains_its_own_row_and_the_common_skills(W, x, key):
    peft = poly()
    state = moved(peft, key, W)

    def loss(trainable: Any) -> jax.Array:
        ids = jnp.asarray([1, 3, 1, 3])
        return jnp.sum(run(peft, state._replace(trainable=trainable), W, x, task_ids=ids) ** 2)

    grads = jax.grad(loss)(state.trainable)["kernel"]
    np.testing.assert_array_equal(np.abs(grads["Z"]).sum((1, 2)) > 0, [False, True, False, True])
    assert all(np.abs(grads[name]).min() > 0 for name in "AB")


def test_the_update_of_an_example_is_never_dense(W, x, key):
    """Factors of each example, (4, 12, 3), are the largest thing that a mixed batch needs."""
    peft = poly()
    state = moved(peft, key, W)
    program = jax.make_jaxpr(lambda ids: run(peft, state, W, x, task_ids=ids))(IDS)
    shapes = {v.aval.shape for eqn in program.eqns for v in eqn.outvars}
    assert not any(shape[-2:] == (D_IN, D_OUT) for shape in shapes)


# --- gates ---


def test_weights_are_normalised_gates():
    Z = jnp.asarray([[0.0, jnp.log(3.0)], [0.0, 0.0]])
    np.testing.assert_allclose(weights(Z), [[0.4, 0.6], [0.5, 0.5]], rtol=1e-6)


def test_sampled_gates_are_a_relaxed_bernoullis(key):
    """sigmoid(Z + logistic noise) is above t with probability sigmoid(Z - logit(t))."""
    Z = jnp.broadcast_to(jnp.asarray([0.7, -30.0]), (20_000, 1, 2))
    noise = jax.random.logistic(key, Z.shape).at[..., 1].set(0)
    w = np.asarray(weights(Z, noise))[:, 0, 0]  # all but the first skill's gate is closed
    assert np.abs(w - 1).max() < 1e-3
    g = jax.nn.sigmoid(Z + noise)[:, 0, 0]
    for t in (0.2, 0.5, 0.8):
        wanted = jax.nn.sigmoid(0.7 - jnp.log(t / (1 - t)))
        assert abs(float(jnp.mean(g > t)) - float(wanted)) < 0.02


@pytest.mark.parametrize("given", [{"tasks": TASKS}, {"tasks": TASKS, "task": 1}, {"tasks": 1}])
def test_training_samples_the_gates_of_each_example(W, x, key, given):
    """Two examples of one task and one input differ under the stream, and are alike without."""
    peft = poly(**given)
    assert peft.traits.stochastic
    state, same = moved(peft, key, W), x[:1].repeat(2, 0)
    context = {"task_ids": jnp.asarray([1, 1])} if peft.traits.needs else {}
    y = run(peft, state, W, same, stream=key, **context)
    assert float(jnp.abs(y[0] - y[1]).max()) > 1e-3
    close(run(peft, state, W, same, stream=key, **context), y)
    plain = run(peft, state, W, same, **context)
    close(plain[0], plain[1])
    calm = poly(**given, noise=False)
    assert not calm.traits.stochastic
    np.testing.assert_array_equal(run(calm, state, W, same, stream=key, **context), plain)


def test_one_task_samples_for_a_single_example_too(W, x, key):
    peft = poly(task=1)
    state = moved(peft, key, W)
    alone = run(peft, state, W, x[0, 0], stream=key)
    assert alone.shape == (D_OUT,)
    close(alone, run(peft, state, W, x[:1, 0], stream=key)[0])
    assert float(jnp.abs(alone - run(peft, state, W, x[0, 0])).max()) > 1e-3


def test_uniform_weights_are_not_sampled(W, x, key):
    peft = poly(task="uniform")
    assert not peft.traits.stochastic
    state = moved(peft, key, W)
    np.testing.assert_array_equal(run(peft, state, W, x, stream=key), run(peft, state, W, x))


# --- what it is in special cases ---


def test_one_skill_is_a_lora_of_alpha_one(W, x, key):
    peft = poly(skills=1, splits=1, tasks=1)
    state = moved(peft, key, W)
    p = state.trainable["kernel"]
    lora = pefts.lora(rank=3, alpha=1.0, targets="kernel")
    start = lora.init(key, {"kernel": W})
    same = start._replace(trainable={"kernel": {"A": p["A"][0, 0], "B": p["B"][0, 0]}})
    close(run(peft, state, W, x), run(lora, same, W, x))


def test_factors_are_averaged_and_not_products(W, key):
    peft = poly(splits=1, task=0)
    state = moved(peft, key, W)
    p = {name: np.asarray(leaf, np.float64) for name, leaf in state.trainable["kernel"].items()}
    w = 1 / (1 + np.exp(-p["Z"][0, 0]))
    w /= w.sum()
    delta = np.tensordot(w, p["A"][0], 1) @ np.tensordot(w, p["B"][0], 1) / 3
    close(peft.merge({"kernel": W}, state)["kernel"] - W, delta)
    products = sum(w[k] * p["A"][0, k] @ p["B"][0, k] for k in range(3)) / 3
    assert np.abs(delta - products).max() > 0.01


@pytest.mark.parametrize("splits", [1, 2])
def test_factors_start_as_in_peft(key, splits):
    peft = poly(rank=16, skills=8, splits=splits, tasks=50, targets="kernel")
    state = peft.init(key, {"kernel": jnp.ones((400, 20))})
    A, B, Z = (state.trainable["kernel"][name] for name in "ABZ")
    bound = 1 / np.sqrt(400 / splits)
    assert 0.99 * bound < float(jnp.abs(A).max()) <= bound
    assert not np.any(B)
    assert 0.9e-3 < float(jnp.abs(Z).max()) <= 1e-3
    assert Z.shape == (50, splits, 8)
    assert float(state.frozen["kernel"]["scale"]) == pytest.approx(1 / 16)


def test_one_task_needs_no_ids_and_has_one_row(W, x, key):
    peft = poly(tasks=1)
    assert peft.traits.mergeable and not peft.traits.needs
    state = moved(peft, key, W)
    alone = run(peft, state, W, x)
    close(alone, run(peft, state, W, x, task_ids=jnp.zeros(4, int)))
    close(alone, x @ peft.merge({"kernel": W}, state)["kernel"])
    with pytest.raises(ValueError, match="task_ids holds 2, and tasks=1 allows 0 to 0"):
        run(peft, state, W, x, task_ids=IDS)


# --- conversions ---


@pytest.mark.parametrize("task", [0, 3, "uniform"])
@pytest.mark.parametrize("splits", [1, 4])
def test_a_task_becomes_a_plain_lora(W, x, key, splits, task):
    peft = poly(splits=splits, alpha=2.0)
    state = moved(peft, key, W)
    lora, converted = lora_of(peft, state, {"kernel": W}, task)
    assert (lora.config["method"], lora.config["rank"]) == ("lora", 3)
    assert pefts.count(converted.trainable) == 3 * (D_IN + D_OUT)
    close(run(lora, converted, W, x), run(poly(splits=splits, alpha=2.0, task=task), state, W, x))


def test_the_mean_of_all_skills_is_the_default_and_forgets_the_router(W, x, key):
    """MHR-mu: what uniform weights compute, whatever the router has learnt."""
    peft = poly()
    state = moved(peft, key, W)
    A, B = (np.asarray(state.trainable["kernel"][name], np.float64).mean(1) for name in "AB")
    delta = A.reshape(D_IN, 3) @ np.swapaxes(B, 0, 1).reshape(3, D_OUT) / 3
    close(run(*lora_of(peft, state, {"kernel": W}), W, x), np.asarray(x) @ (np.asarray(W) + delta))


def test_members_of_a_chain_are_converted(key):
    params = {"body": {"kernel": jnp.ones((4, 6))}, "classifier": {"kernel": jnp.ones((6, 2))}}
    peft = pefts.chain(pefts.head_only(), poly(rank=2, targets="body"))
    state = pefts.randomize(key, peft.init(key, params))
    lora, converted = lora_of(peft, state, params, 1)
    assert [member["method"] for member in lora.config["members"]] == ["head_only", "lora"]
    fixed = pefts.chain(pefts.head_only(), poly(rank=2, targets="body", task=1))
    for ours, theirs in zip(
        jax.tree.leaves(lora.merge(params, converted)),
        jax.tree.leaves(fixed.merge(params, state)),
        strict=True,
    ):
        close(ours, theirs)


def test_new_tasks_begin_with_uniform_weights_and_train_the_router_alone(W, x, key):
    """MHR-z: T h K trainable numbers per kernel."""
    old = poly()
    state = moved(old, key, W)
    new, start = for_tasks(old, state, tasks=2)
    assert set(start.trainable["kernel"]) == {"Z"} and set(start.frozen["kernel"]) > {"A", "B"}
    assert pefts.count(start.trainable) == 2 * 2 * 3
    ids = jnp.asarray([0, 1, 1, 0])
    before = run(new, start, W, x, task_ids=ids)
    close(before, run(*lora_of(old, state, {"kernel": W}), W, x))
    grads = jax.grad(
        lambda t: jnp.sum(run(new, start._replace(trainable=t), W, x, task_ids=ids) ** 2)
    )(start.trainable)
    assert np.abs(np.asarray(grads["kernel"]["Z"])).min() > 0
    everything, full = for_tasks(new, start, tasks=3, train="all")
    assert set(full.trainable["kernel"]) == {"A", "B", "Z"}
    assert jax.tree.map(jnp.shape, full) == jax.tree.map(
        jnp.shape, everything.init(key, {"kernel": W})
    )


def test_a_router_over_a_frozen_inventory_is_saved(W, x, key, tmp_path):
    peft, state = for_tasks(poly(), moved(poly(), key, W), tasks=2)
    state = pefts.randomize(key, state)
    pefts.save(tmp_path / "a.safetensors", peft, state, {"kernel": W})
    again, restored = pefts.load(tmp_path / "a.safetensors", {"kernel": W})
    ids = jnp.asarray([0, 1, 1, 0])
    np.testing.assert_array_equal(
        run(again, restored, W, x, task_ids=ids), run(peft, state, W, x, task_ids=ids)
    )


# --- refusals ---


@pytest.mark.parametrize(
    ("context", "match"),
    [
        ({}, r"routes between 4 tasks and was not told the batch's: .*task_ids=\.\.\."),
        ({"task_ids": jnp.ones(4)}, r"task_ids of shape \(4,\) and dtype float32"),
        ({"task_ids": jnp.ones((4, 1), int)}, r"task_ids of shape \(4, 1\)"),
        ({"task_ids": jnp.ones(3, int)}, r"names 3 examples, .*shape \(4, 5, 12\)"),
        ({"task_ids": jnp.asarray([0, 1, 4, 2])}, "holds 4, and tasks=4 allows 0 to 3"),
        ({"task_ids": jnp.asarray([0, -1, 3, 2])}, "holds -1, and tasks=4"),
    ],
)
def test_task_ids_are_checked(W, x, key, context, match):
    peft = poly()
    with pytest.raises(ValueError, match=match):
        run(peft, peft.init(key, {"kernel": W}), W, x, **context)


def test_an_unknown_task_inside_jit_is_the_nearest_one():
    found = jax.jit(lambda ids: ids_of({"task_ids": ids}, 3))(jnp.asarray([2, 3, -1, 0, 99]))
    np.testing.assert_array_equal(found, [2, 2, 0, 0, 2])


def test_mixed_tasks_have_no_kernel(W, key):
    peft = poly()
    assert not peft.traits.mergeable and peft.traits.needs == ("context",)
    state = peft.init(key, {"kernel": W})
    with pytest.raises(ValueError, match="cannot be merged .*fix one by task"):
        peft.merge({"kernel": W}, state)
    bound = peft.bind({"kernel": W}, state)["kernel"]
    with pytest.raises(ValueError, match="no dense kernel .*fix one by task"):
        bound.rule.effective(W, bound.state, Call())


def test_a_convolution_is_routed_for_one_task_alone(key):
    model, x = nn.Conv(6, (3,)), jax.random.normal(key, (4, 9, 4))
    params = model.init(key, x)["params"]
    options = {"targets": "kernel", "axes": pefts.infer_axes(model.apply, params, x)}
    peft = poly(**options)
    state = pefts.randomize(key, peft.init(key, params), 0.3)
    with pytest.raises(ValueError, match="no dense kernel for a convolution"):
        pefts.apply(model.apply)({"params": peft.bind(params, state, task_ids=IDS)}, x)
    for noise in (True, False):
        fixed = poly(task=1, noise=noise, **options)
        y = pefts.apply(model.apply)({"params": fixed.bind(params, state)}, x)
        close(y, model.apply({"params": fixed.merge(params, state)}, x))


# --- official golden vectors: A and B are (in, out) as here, the kernel is transposed ---


@pytest.fixture
def golden(x64: None) -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("../shared/golden/official/poly is not on this machine")
    return dict(np.load(GOLDEN))


def golden_case(golden: dict, name: str) -> tuple[dict, pefts.Peft, pefts.PeftState, dict]:
    own = {k.removeprefix(f"{name}_"): v for k, v in golden.items() if k.startswith(f"{name}_")}
    r, h, K, T = (int(own[n]) for n in ("rank", "n_splits", "n_skills", "n_tasks"))
    params = {"kernel": jnp.asarray(own["W"].T), "bias": jnp.asarray(own["b"])}
    leaves = {"A": own["lora_A"], "B": own["lora_B"], "Z": own["logits"].reshape(T, h, K)}
    state = pefts.PeftState(
        {"kernel": {name: jnp.asarray(leaf) for name, leaf in leaves.items()}},
        {"kernel": {"scale": jnp.float64(1 / r)}},
    )
    return params, poly(rank=r, skills=K, splits=h, tasks=T), state, own


@pytest.mark.parametrize("name", ["poly", "mhr"])
def test_golden_outputs_and_gradients(golden, name):
    params, peft, state, own = golden_case(golden, name)

    def outputs(trainable: Any) -> jax.Array:
        full = state._replace(trainable=trainable)
        bound = peft.bind(params, full, task_ids=own["task_ids"])
        return pefts.apply(nn.Dense(20).apply)({"params": bound}, jnp.asarray(own["x"]))

    y, pull = jax.vjp(outputs, state.trainable)
    np.testing.assert_allclose(y, own["y_eval"], rtol=1e-9, atol=1e-12)
    grads = pull(jnp.asarray(own["cot"]))[0]["kernel"]
    for leaf, wanted in (("A", "A"), ("B", "B"), ("Z", "logits")):
        expected = own[f"grad_{wanted}"].reshape(grads[leaf].shape)
        np.testing.assert_allclose(grads[leaf], expected, rtol=1e-9, atol=1e-12, err_msg=leaf)


@pytest.mark.parametrize("name", ["poly", "mhr"])
def test_golden_weights_and_training_outputs(golden, name):
    params, _, state, own = golden_case(golden, name)
    p, u = state.trainable["kernel"], jnp.asarray(own["uniform"])
    Z = p["Z"][own["task_ids"]]
    np.testing.assert_allclose(weights(Z), own["weights_eval"], rtol=1e-9)
    w = weights(Z, jnp.log(u) - jnp.log1p(-u))
    np.testing.assert_allclose(w, own["weights_train"], rtol=1e-9)
    A, B = (np.asarray(factor) for factor in mixed(w, p["A"], p["B"]))
    y = own["x"] @ own["W"].T + own["b"] + own["x"] @ A @ B / int(own["rank"])
    np.testing.assert_allclose(y, own["y_train"], rtol=1e-9, atol=1e-12)
