"""AdaLoRA beyond the table: the official trajectory, the budget, masks, pruning."""

import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pefts
from pefts.bound import Call
from pefts.formats import adalora
from pefts.formats.contract import Native
from pefts.methods.adalora import budget_drops, prune, ranks, scores

GOLDEN = Path(__file__).parents[2] / "shared/golden/official/adalora/golden.npz"
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
MODULES = {"dense_0": "0.lora", "dense_2": "2.lora"}
TRANSPOSE = {"A": True, "B": True, "e": False}
T, T_I, T_F, INTERVAL, R0, TARGET = 12, 2, 3, 2, 4, 2


class Net(nn.Module):
    """7 -> 9 -> 5 with tanh between."""

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, param_dtype=jnp.float64, dtype=jnp.float64)
        return dense(5, name="dense_2")(jnp.tanh(dense(9, name="dense_0")(x)))


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip("the official AdaLoRA vectors (../shared/golden/official/adalora) are absent")
    return dict(np.load(GOLDEN))


def ours(golden: dict, kind: str, at: int | None = None) -> dict:
    """{path: {A, B, e}} in the orientation of kernels."""
    found = {}
    for module, theirs in MODULES.items():
        group = {}
        for name, transposed in TRANSPOSE.items():
            key = f"{kind}_{theirs}_{'E' if name == 'e' else name}"
            value = golden[key] if at is None else golden[key][at]
            group[name] = jnp.asarray(value.T if transposed else value[:, 0])
        found[f"{module}/kernel"] = group
    return found


def official(golden: dict, gamma: float = 0.1) -> tuple:
    """Net, its parameters, the method with the golden settings, and its state at the start."""
    params = {
        name: {"kernel": jnp.asarray(golden[f"{key}_W"].T), "bias": jnp.asarray(golden[f"{key}_b"])}
        for name, key in (("dense_0", "m0"), ("dense_2", "m2"))
    }
    peft = pefts.adalora(
        total_steps=int(golden["total_step"]),
        init_rank=int(golden["init_rank"]),
        target_rank=int(golden["target_rank"]),
        alpha=float(golden["lora_alpha"]),
        warmup=(int(golden["init_warmup"]), int(golden["final_warmup"])),
        interval=int(golden["mask_interval"]),
        betas=(float(golden["beta1"]), float(golden["beta2"])),
        gamma=gamma,
    )
    state = peft.init(jax.random.key(0), params)
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state.frozen)
    scale = jnp.asarray(golden["lora_alpha"] / (golden["init_rank"] + 1e-5))
    frozen = {path: {**group, "scale": scale} for path, group in frozen.items()}
    return Net(), params, peft, pefts.PeftState(ours(golden, "start"), frozen)


def test_forward_and_vjp_are_the_official_ones(golden, x64):
    model, params, peft, state = official(golden)
    x, cotangent = jnp.asarray(golden["x"]), jnp.asarray(golden["cot"])

    def forward(trainable):
        bound = peft.bind(params, state._replace(trainable=trainable))
        return pefts.apply(model.apply)({"params": bound}, x)

    y, pull = jax.vjp(forward, state.trainable)
    np.testing.assert_allclose(y, golden["y"], **TOLERANCE)
    wanted = ours(golden, "vjp")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), pull(cotangent)[0], wanted
    )
    merged = model.apply({"params": peft.merge(params, state)}, x)
    np.testing.assert_allclose(merged, golden["y"], **TOLERANCE)


def test_orthogonality_penalty_is_the_official_one(golden, x64):
    *_, peft, state = official(golden)
    value, grads = jax.value_and_grad(lambda t: peft.penalty(state._replace(trainable=t)))(
        state.trainable
    )
    np.testing.assert_allclose(value, golden["orth_reg_w0.1"], **TOLERANCE)
    for module, theirs in MODULES.items():
        for name in "AB":
            wanted = golden[f"orth_grad_{theirs}_{name}"].T
            np.testing.assert_allclose(grads[f"{module}/kernel"][name], wanted, **TOLERANCE)
        np.testing.assert_array_equal(grads[f"{module}/kernel"]["e"], 0)


def test_twelve_official_steps(golden, x64):
    *_, peft, state = official(golden)
    update = jax.jit(peft.update)
    for at in range(T):
        state = state._replace(trainable=ours(golden, "params", at))
        state = update(state, ours(golden, "grads", at), jnp.int32(at))
        check_averages(golden, state, at)
        found = np.concatenate(list(scores(state).values()))
        np.testing.assert_allclose(found, golden["scores"][at], rtol=1e-9, atol=1e-15)
        check_masks(golden, state, at)
        if golden["threshold"][at] >= 0:  # the officials' cut: what lies above it stays
            e = np.concatenate([leaf.ravel() for leaf in e_of(state).values()])
            above = golden["scores"][at] > golden["threshold"][at] * (1 + 1e-9)
            np.testing.assert_array_equal(e != 0, above)
        assert sum(ranks(state).values()) == int(golden["nonzero"][at])
    assert update._cache_size() == 1


def check_averages(golden: dict, state: pefts.PeftState, at: int) -> None:
    for kind, theirs in (("sensitivity", "ipt"), ("uncertainty", "unc")):
        for path, group in ours(golden, theirs, at).items():
            found = {name: state.frozen[path][f"{kind}_{name}"] for name in group}
            jax.tree.map(
                lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-15),
                found,
                group,
            )


def check_masks(golden: dict, state: pefts.PeftState, at: int) -> None:
    """e is the official one after the cut, A and B are as they were before it."""
    for module, theirs in MODULES.items():
        group = state.trainable[f"{module}/kernel"]
        np.testing.assert_array_equal(group["e"], golden[f"masked_{theirs}_E"][at][:, 0])
        for name in "AB":
            before = golden[f"params_{theirs}_{name}"][at].T
            np.testing.assert_array_equal(group[name], before)


def test_budget_is_the_official_one(golden):
    drops = budget_drops(2 * R0, 2 * TARGET, T - T_F - T_I)
    for t, wanted in enumerate(golden["curr_rank"], start=1):
        assert 2 * R0 - int((drops <= t - T_I).sum()) == wanted


@pytest.mark.parametrize(
    ("start", "target", "steps"), [(432, 144, 50), (30, 7, 1), (5, 5, 9), (7, 1, 4), (90, 3, 1000)]
)
def test_budget_drops_invert_the_cubic(start, target, steps):
    """Against the formula in whole numbers, at each step of the cuts and around them."""
    drops = budget_drops(start, target, steps)
    assert len(drops) == start - target
    for u in range(-2, steps + 3):
        left = steps - min(max(u, 0), steps)
        wanted = target + (start - target) * left**3 // steps**3
        assert start - int((drops <= u).sum()) == wanted


def stacked_problem(**kwargs) -> tuple:
    """Three scanned layers of 8 x 5 at rank 4, and a 5 x 6 kernel of its own rank 3."""
    params = {
        "layers": {"kernel": jax.random.normal(jax.random.key(1), (3, 8, 5))},
        "last": {"kernel": jax.random.normal(jax.random.key(2), (5, 6))},
    }
    peft = pefts.adalora(
        **{"total_steps": 10, "init_rank": 4, "target_rank": 2, "warmup": (0, 3), **kwargs},
        axes={"layers": "lio"},
        rank_pattern={"last": 3},
    )
    return params, peft, peft.init(jax.random.key(0), params)


def run(peft: pefts.Peft, state: pefts.PeftState, steps: int, ties: bool = False) -> list:
    """States after each update, with random values and gradients (or equal ones)."""
    states = []
    update = jax.jit(peft.update)
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(3), step)
        if ties:
            grads = jax.tree.map(jnp.ones_like, state.trainable)
            state = state._replace(trainable=jax.tree.map(jnp.ones_like, state.trainable))
        else:
            grads = pefts.randomize(key, state, 1.0).trainable
            state = pefts.randomize(jax.random.fold_in(key, 1), state, 0.1)
        state = update(state, grads, jnp.int32(step))
        states.append(state)
    return states


def test_scores_after_two_steps_by_the_equations():
    """In numpy, layer by layer, with both averages started at zero."""
    _, peft, state = stacked_problem(betas=(0.7, 0.9))
    smooth, spread = {}, {}
    for step in range(2):
        state = pefts.randomize(jax.random.key(step), state)
        grads = pefts.randomize(jax.random.key(7 + step), state).trainable
        for path, group in state.trainable.items():
            for name, leaf in group.items():
                now = np.abs(np.asarray(leaf, np.float64) * np.asarray(grads[path][name]))
                at = path, name
                smooth[at] = 0.7 * smooth.get(at, 0) + 0.3 * now
                spread[at] = 0.9 * spread.get(at, 0) + 0.1 * np.abs(now - smooth[at])
        state = peft.update(state, grads, jnp.int32(step))
    found = scores(state)
    assert {path: score.shape for path, score in found.items()} == {
        "last/kernel": (3,),
        "layers/kernel": (3, 4),
    }
    for path, score in found.items():
        A, B, e = (smooth[path, name] * spread[path, name] for name in "ABe")
        for k in range(score.shape[-1]):
            wanted = e[..., k] + A[..., :, k].mean(-1) + B[..., k, :].mean(-1)
            np.testing.assert_allclose(score[..., k], wanted, rtol=1e-4)


def total(state: pefts.PeftState) -> int:
    return sum(int(np.sum(found)) for found in ranks(state).values())


@pytest.mark.parametrize("ties", [False, True])
def test_the_budget_is_met_across_stacked_layers_and_ranks(ties):
    """b0 = 3 * 4 + 3, bT = 4 * 2; exactly the budget stays, equal scores included."""
    _, peft, state = stacked_problem(warmup=(2, 3))
    wanted = [15, 15, *(8 + 7 * (5 - u) ** 3 // 5**3 for u in range(1, 6)), 8, 8, 8]
    states = run(peft, state, 10, ties)
    assert [total(state) for state in states] == wanted
    assert set(ranks(states[-1])) == {"last/kernel", "layers/kernel"}
    assert len(ranks(states[-1])["layers/kernel"]) == 3
    if ties:
        assert ranks(states[-1]) == {"last/kernel": 3, "layers/kernel": [4, 1, 0]}


def test_cuts_come_every_interval_and_the_pattern_freezes_at_the_end():
    _, peft, state = stacked_problem(total_steps=14, warmup=(1, 4), interval=3)
    states = run(peft, state, 14)
    found = [total(state) for state in states]
    cut = [t for t, n in enumerate(found, start=1) if n < 15]
    assert cut == [3, 6, 9, 11, 12, 13, 14]
    patterns = [jax.tree.map(lambda e: np.asarray(e != 0), e_of(state)) for state in states[10:]]
    for pattern in patterns[1:]:
        jax.tree.map(np.testing.assert_array_equal, pattern, patterns[0])
    for name in ("sensitivity_A", "uncertainty_e"):
        averages = [np.asarray(s.frozen["last/kernel"][name]) for s in states]
        assert not np.array_equal(averages[8], averages[7])
        for late in averages[9:]:
            np.testing.assert_array_equal(late, averages[8])


def e_of(state: pefts.PeftState) -> dict:
    return {path: group["e"] for path, group in state.trainable.items()}


def test_a_masked_triplet_can_revive_before_the_end():
    _, peft, state = stacked_problem(warmup=(1, 3))
    states = run(peft, state, 7)
    flat = [np.concatenate([np.ravel(e) != 0 for e in e_of(s).values()]) for s in states]
    assert any((later & ~now).any() for now, later in zip(flat, flat[1:], strict=False))


def test_a_target_of_the_initial_rank_cuts_nothing():
    params = {"kernel": jnp.ones((6, 4))}
    peft = pefts.adalora(total_steps=4, init_rank=3, target_rank=3, targets="kernel")
    states = run(peft, peft.init(jax.random.key(0), params), 4)
    assert [ranks(state) for state in states] == [{"kernel": 3}] * 4


def test_pruning_changes_shapes_and_nothing_else():
    params, peft, state = stacked_problem()
    final = run(peft, state, 10)[-1]
    small = prune(final)
    kept = ranks(final)
    assert small.trainable["last/kernel"]["A"].shape == (5, kept["last/kernel"])
    assert small.trainable["layers/kernel"]["B"].shape == (3, max(kept["layers/kernel"]), 5)
    assert small.frozen["layers/kernel"]["sensitivity_e"].shape == (3, max(kept["layers/kernel"]))
    assert pefts.count(small.trainable) < pefts.count(final.trainable)
    assert ranks(small) == kept
    for path in ("last", "layers"):
        before, after = (peft.merge(params, s)[path]["kernel"] for s in (final, small))
        np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)
        assert not np.allclose(after, params[path]["kernel"], atol=1e-3)
    empty = final._replace(
        trainable={path: {**g, "e": 0 * g["e"]} for path, g in final.trainable.items()}
    )
    np.testing.assert_array_equal(
        peft.merge(params, prune(empty))["last"]["kernel"], params["last"]["kernel"]
    )


def test_factors_start_normal_and_dropout_is_of_the_adapter_alone(key):
    """A and B have deviation 0.02; y = x W + s ((drop(x) A) * e) B with inverted dropout."""
    params = {"kernel": jax.random.normal(key, (400, 300))}
    build = functools.partial(pefts.adalora.__wrapped__, 10, 4, 2, dropout=0.25)
    group, frozen = build().rule.init(
        key, params["kernel"], site=build().selection.resolve(params, rank=4)[0], stats=None
    )
    np.testing.assert_allclose(group["A"].std(), 0.02, rtol=0.1)
    np.testing.assert_allclose(group["B"].std(), 0.02, rtol=0.1)
    p = {**group, **frozen, "e": jnp.array([1.0, -2.0, 0.0, 3.0])}
    x, W = jnp.ones((50, 400)), params["kernel"]
    quiet = build().rule.linear(x, W, p, Call())
    noisy = build().rule.linear(x, W, p, Call(key=key))
    keep = jax.random.bernoulli(key, 0.75, x.shape)
    wanted = (
        x @ W + p["scale"] * ((jnp.where(keep, x / 0.75, 0.0) @ p["A"]) * p["e"][None]) @ p["B"]
    )
    np.testing.assert_allclose(noisy, wanted, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(noisy - quiet).max()) > 1e-2


def test_penalty_counts_each_stacked_layer_and_survives_orthonormal_factors():
    _, peft, state = stacked_problem(gamma=2.0)
    found = []
    for group in pefts.randomize(jax.random.key(5), state).trainable.values():
        for A, B in zip(
            group["A"].reshape(-1, *group["A"].shape[-2:]),
            group["B"].reshape(-1, *group["B"].shape[-2:]),
            strict=True,
        ):
            eye = np.eye(A.shape[-1])
            found += [np.linalg.norm(A.T @ A - eye), np.linalg.norm(B @ B.T - eye)]
    got = peft.penalty(pefts.randomize(jax.random.key(5), state))
    assert len(found) == 8
    np.testing.assert_allclose(got, 2 * np.mean(found), rtol=1e-5)
    group = {"A": jnp.eye(8, 4), "B": jnp.eye(4, 5), "e": jnp.ones(4)}
    orthonormal = {"kernel": group}
    value, grads = jax.value_and_grad(lambda t: peft.penalty(pefts.PeftState(t, {})))(orthonormal)
    assert float(value) == 0
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)


def test_published_count_from_shapes_alone():
    """Llama-3.2-3B, q and v at r0 = 64; DeBERTaV3-base's six kinds of kernel at rank 1, plus e."""
    llama = {
        f"layer_{n}": {
            "query": {"kernel": jax.ShapeDtypeStruct((3072, 3072), jnp.float32)},
            "value": {"kernel": jax.ShapeDtypeStruct((3072, 1024), jnp.float32)},
        }
        for n in range(28)
    }
    peft = pefts.adalora(total_steps=5000, init_rank=64, target_rank=32, warmup=(0, 500))
    state = jax.eval_shape(peft.init, jax.random.key(0), llama)
    assert pefts.count(state.trainable) == 18_353_664
    sides = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    deberta = {
        f"layer_{n}_{k}": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
        for n in range(12)
        for k, shape in enumerate(sides)
    }
    for rank in (1, 3):
        peft = pefts.adalora(total_steps=10, init_rank=rank, target_rank=1)
        state = jax.eval_shape(peft.init, jax.random.key(0), deberta)
        assert pefts.count(state.trainable) == rank * (165_888 + 72)


def test_the_scale_keeps_the_initial_rank():
    _, peft, state = stacked_problem(alpha=6.0)
    assert float(state.frozen["last/kernel"]["scale"]) == pytest.approx(6 / (3 + 1e-5), rel=1e-6)
    small = prune(run(peft, state, 10)[-1])
    np.testing.assert_array_equal(
        small.frozen["last/kernel"]["scale"], state.frozen["last/kernel"]["scale"]
    )


def test_a_target_that_the_patterns_do_not_allow_is_refused():
    params = {"query": {"kernel": jnp.ones((6, 4))}, "value": {"kernel": jnp.ones((6, 4))}}
    peft = pefts.adalora(total_steps=9, init_rank=3, target_rank=3, rank_pattern={"query": 1})
    with pytest.raises(ValueError, match="target_rank=3 asks for 6 triplets .* start with 4"):
        peft.init(jax.random.key(0), params)


def test_pairs_come_as_tuples_or_as_json_lists(key):
    """A method rebuilt from JSON is the same one, and cuts at the same steps."""
    peft = pefts.adalora(
        6, 3, 1, warmup=(1, 2), betas=(0.5, 0.9), interval=2, targets=["query", "value"]
    )
    config = json.loads(json.dumps(peft.config))
    assert (config["warmup"], config["betas"]) == ([1, 2], [0.5, 0.9])
    again = pefts.from_config(config)
    assert again.config == peft.config == config
    params = {name: {"kernel": jnp.ones((6, 4))} for name in ("query", "value")}
    runs = [run(method, method.init(key, params), 6) for method in (peft, again)]
    jax.tree.map(np.testing.assert_array_equal, *runs)
    assert [total(state) for state in runs[0]] == [6, 3, 6, 2, 2, 2]


def test_pairs_fill_the_fields_that_peft_reads():
    peft = pefts.adalora(9, warmup=(1, 2), betas=(0.5, 0.9))
    fields = adalora.to_hf(Native(peft.config, {}, {}, lambda slot: np.zeros(()))).fields
    assert (fields["tinit"], fields["tfinal"]) == (1, 2)
    assert (fields["beta1"], fields["beta2"]) == (0.5, 0.9)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"warmup": 3}, "warmup=3: give two"),
        ({"warmup": (1, 2, 3)}, r"warmup=\(1, 2, 3\): give two"),
        ({"warmup": (0, -1)}, r"warmup=\(0, -1\): give two integers"),
        ({"warmup": [0.5, 0]}, r"warmup=\(0.5, 0\): give two integers"),
        ({"warmup": (4, 5)}, r"4 \+ 5 must be below total_steps=9"),
        ({"betas": 0.85}, "betas=0.85: give two"),
        ({"betas": (0.85, 1.0)}, r"betas=\(0.85, 1.0\): give two numbers in \[0, 1\)"),
    ],
)
def test_pairs_out_of_range_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        pefts.adalora(total_steps=9, **arguments)


def test_training_finds_the_kernel_that_needs_the_rank(key):
    """`up` is off by a matrix of rank 3, `down` by a smaller one: the budget of 4 goes to `up`."""
    x = jax.random.normal(key, (64, 8))
    shapes = {"up": (8, 6), "down": (8, 5)}
    params = {name: {"kernel": jax.random.normal(key, shape)} for name, shape in shapes.items()}
    low = jax.random.normal(jax.random.fold_in(key, 1), (8, 3))
    change = 0.5 * low @ jax.random.normal(jax.random.fold_in(key, 2), (3, 6))
    peft = pefts.adalora(total_steps=80, init_rank=3, target_rank=2, warmup=(10, 20), gamma=0.1)
    optimizer = optax.adam(2e-2)

    def loss(trainable, frozen):
        state = pefts.PeftState(trainable, frozen)
        merged = peft.merge(params, state)
        up, down = (merged[name]["kernel"] - params[name]["kernel"] for name in ("up", "down"))
        errors = x @ (up - change), x @ (down - 0.1 * change[:, :5])
        return sum(jnp.mean(error**2) for error in errors) + peft.penalty(state)

    @jax.jit
    def train(carry, step):
        state, moments = carry
        value, grads = jax.value_and_grad(loss)(*state)
        updates, moments = optimizer.update(grads, moments, state.trainable)
        state = state._replace(trainable=optax.apply_updates(state.trainable, updates))
        return (peft.update(state, grads, step), moments), value

    state = peft.init(key, params)
    carry = (state, optimizer.init(state.trainable))
    with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in mixed types
        (state, _), values = jax.lax.scan(train, carry, jnp.arange(80))
    assert ranks(state) == {"down/kernel": 1, "up/kernel": 3}
    assert float(values[-1]) < 0.2 * float(values[0])
