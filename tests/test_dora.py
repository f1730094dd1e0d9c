"""DoRA beyond the table: column norms, the detached norm, dropout, published counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.bound import Call
from pefts.core import Declaration, Traits, lift
from pefts.low_rank import additive
from pefts.methods.dora import norms, with_magnitude
from pefts.targets import selection

D_IN, D_OUT, RANK = 12, 7, 3


def llama_3b_shapes() -> dict:
    """q and v of Llama-3.2-3B."""
    shapes = {"query": (3072, 3072), "value": (3072, 1024)}
    return {
        f"layer_{n}": {
            name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
            for name, shape in shapes.items()
        }
        for n in range(28)
    }


def problem(key: jax.Array, dtype=jnp.float32, bias: bool = True, **kwargs) -> tuple:
    model = nn.Dense(D_OUT, use_bias=bias, param_dtype=dtype, dtype=dtype)
    x = jax.random.normal(jax.random.fold_in(key, 1), (5, D_IN), dtype)
    params = model.init(key, x)["params"]
    if bias:
        params["bias"] = params["bias"] + dtype(0.5)
    peft = pefts.dora(rank=RANK, alpha=6.0, targets="kernel", **kwargs)
    return model, x, params, peft, peft.init(key, params)


def test_published_count_from_shapes_alone():
    peft = pefts.dora(rank=32, alpha=64.0, targets="(query|value)/kernel")
    state = jax.eval_shape(peft.init, jax.random.key(0), llama_3b_shapes())
    assert pefts.count(state.trainable) == 9_289_728


def test_merged_columns_have_norm_m(key):
    _, _, params, peft, state = problem(key)
    state = pefts.randomize(key, state, 0.5)
    merged = peft.merge(params, state)["kernel"]
    m = np.asarray(state.trainable["kernel"]["m"])
    np.testing.assert_allclose(np.linalg.norm(merged, axis=0), np.abs(m), rtol=1e-6)


def test_twice_the_magnitude_doubles_the_product_but_not_the_bias(key):
    model, x, params, peft, state = problem(key)
    group = state.trainable["kernel"]
    doubled = state._replace(trainable={"kernel": {**group, "m": 2 * group["m"]}})
    y = pefts.apply(model.apply)({"params": peft.bind(params, doubled)}, x)
    wanted = 2 * (x @ params["kernel"]) + params["bias"][None]
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6)


def test_norms_by_expansion_equal_the_dense_ones(key):
    with jax.enable_x64(True):
        W = jax.random.normal(key, (D_IN, D_OUT), jnp.float64)
        A = jax.random.normal(jax.random.fold_in(key, 1), (D_IN, RANK), jnp.float64)
        B = jax.random.normal(jax.random.fold_in(key, 2), (RANK, D_OUT), jnp.float64)
        c = norms(W, A, B)
        wanted = np.linalg.norm(np.asarray(W) + np.asarray(A) @ np.asarray(B), axis=0)
        np.testing.assert_allclose(c, wanted, rtol=1e-12)


def test_no_gradient_flows_through_the_norm(key):
    """Against the derivatives written out with c constant, in float64, with c the norm of V."""
    with jax.enable_x64(True):
        _, _, params, peft, state = problem(key, jnp.float64)
        state = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64), pefts.randomize(key, state, 0.3)
        )
        x = jax.random.normal(jax.random.fold_in(key, 3), (5, D_IN), jnp.float64)
        cotangent = jax.random.normal(jax.random.fold_in(key, 4), (5, D_OUT), jnp.float64)
        model = nn.Dense(D_OUT, param_dtype=jnp.float64, dtype=jnp.float64)

        def factored(trainable):
            bound = peft.bind(params, state._replace(trainable=trainable))
            return jnp.sum(cotangent * pefts.apply(model.apply)({"params": bound}, x))

        def dense(trainable):
            bound = peft.bind(params, state._replace(trainable=trainable))["kernel"]
            W = bound.rule.effective(params["kernel"], bound.state, Call())
            return jnp.sum(cotangent * (x @ W))

        group = {name: np.asarray(leaf) for name, leaf in state.trainable["kernel"].items()}
        A, B, m = (group[name] for name in "ABm")
        s, W = float(state.frozen["kernel"]["scale"]), np.asarray(params["kernel"])
        V = W + s * A @ B
        c = np.linalg.norm(V, axis=0)
        to_y = np.asarray(cotangent)
        to_V = np.asarray(x).T @ (to_y * (m / c))
        wanted = {
            "A": s * to_V @ B.T,
            "B": s * A.T @ to_V,
            "m": (to_y * (np.asarray(x) @ V)).sum(0) / c,
        }
        for loss in (factored, dense):
            got = jax.grad(loss)(state.trainable)["kernel"]
            for name, value in wanted.items():
                np.testing.assert_allclose(got[name], value, rtol=1e-10, atol=1e-12)


def test_dropout_leaves_the_base_product_of_the_whole_input(key):
    """y = x W + (m / c - 1) (x' W) + (m / c) s (x' A) B, x' the input that is left."""
    model, x, params, peft, state = problem(key, dropout=0.5)
    state = pefts.randomize(key, state, 0.3)
    bound = peft.bind(params, state)["kernel"]
    seen = []

    def dot(x, M):
        seen.append(x)
        return x @ M

    W, p = bound.base, bound.state
    y = bound.rule.linear(x, W, p, Call(key=key, dot=dot))
    kept = seen[0]
    assert 0 < int((kept == 0).sum()) < x.size
    c = jnp.linalg.norm(W + p["scale"] * p["A"] @ p["B"], axis=0)
    gain = (p["m"] / c)[None]
    wanted = x @ W + (gain - 1) * (kept @ W) + gain * p["scale"] * (kept @ p["A"] @ p["B"])
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    fresh = peft.init(key, params)
    apply = pefts.apply(model.apply)
    variables = {"params": peft.bind(params, fresh)}
    unchanged = apply(variables, x, rngs={"dropout": key})
    np.testing.assert_allclose(unchanged, model.apply({"params": params}, x), rtol=1e-5, atol=1e-6)


def test_a_column_of_zeros_stays_zero_and_finite(key):
    model, x, params, peft, _ = problem(key, bias=False)
    params = {"kernel": params["kernel"].at[:, 2].set(0)}
    state = peft.init(key, params)

    def loss(trainable):
        bound = peft.bind(params, state._replace(trainable=trainable))
        return jnp.sum(pefts.apply(model.apply)({"params": bound}, x) ** 2)

    grads = jax.grad(loss)(state.trainable)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    np.testing.assert_array_equal(peft.merge(params, state)["kernel"][:, 2], 0)


@pytest.mark.parametrize("kind", ["conv", "embed"])
def test_factored_equals_merged_in_convolutions_and_embeddings(key, kind):
    if kind == "conv":
        model, x = nn.Conv(7, (3,)), jax.random.normal(key, (2, 9, 4))
    else:
        model, x = nn.Embed(11, 6), jnp.arange(8).reshape(2, 4)
    params = model.init(key, x)["params"]
    peft = pefts.dora(rank=2, targets=".", axes=pefts.infer_axes(model.apply, params, x))
    state = pefts.randomize(key, peft.init(key, params))
    factored = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    merged = model.apply({"params": peft.merge(params, state)}, x)
    np.testing.assert_allclose(factored, merged, rtol=2e-5, atol=2e-6)
    assert not np.allclose(merged, model.apply({"params": params}, x), atol=1e-2)


def test_the_norm_is_that_of_the_kernel_a_chain_leaves(key):
    model, x, params, _, _ = problem(key)
    both = pefts.chain(
        pefts.lora(rank=2, targets="kernel"), pefts.dora(rank=RANK, targets="kernel")
    )
    state = pefts.randomize(key, both.init(key, params), 0.5)
    factored = pefts.apply(model.apply)({"params": both.bind(params, state)}, x)
    merged = model.apply({"params": both.merge(params, state)}, x)
    np.testing.assert_allclose(factored, merged, rtol=1e-5, atol=1e-5)


def test_a_gain_is_not_rounded_to_bfloat16(key):
    """1.0055 rounds to 1.0078 in bfloat16, an error that all tokens would share."""
    _, _, params, peft, state = problem(key, jnp.bfloat16, bias=False)
    bound = peft.bind(params, state)["kernel"]
    p = {**bound.state, "m": bound.state["m"] * jnp.float32(1.0055)}
    x = jax.random.normal(key, (400, D_IN), jnp.bfloat16)
    y = bound.rule.linear(x, params["kernel"], p, Call())
    assert y.dtype == jnp.bfloat16
    base = np.asarray(x @ params["kernel"], np.float64)
    gain = np.sum(np.asarray(y, np.float64) * base) / np.sum(base * base)
    assert abs(gain - 1.0055) < 5e-4


# --- a direction of another method ---


PISSA = {"method": "pissa", "rank": RANK, "alpha": 6.0}


def with_direction(key: jax.Array, direction: dict, **kwargs) -> tuple:
    model, x, params, _, _ = problem(key)
    return model, x, params, pefts.dora(direction=direction, targets="kernel", **kwargs)


def test_a_direction_starts_as_its_method_does_beside_the_column_norms(key):
    _, _, params, peft = with_direction(key, PISSA)
    state = peft.init(key, params)
    alone = pefts.pissa(rank=RANK, alpha=6.0, targets="kernel").init(key, params)
    m = state.trainable["kernel"].pop("m")
    jax.tree.map(np.testing.assert_array_equal, state, alone)
    np.testing.assert_allclose(m, np.linalg.norm(params["kernel"], axis=0), rtol=1e-6)


def test_norms_of_a_direction_need_no_product_of_the_kernels_size(key):
    """c of W + s (A B - A0 B0), from its factors: no array of d_in x d_out but W itself."""
    _, _, params, peft = with_direction(key, PISSA)
    state = pefts.randomize(key, peft.init(key, params), 0.3)
    bound = peft.bind(params, state)["kernel"]
    x = jnp.ones((2, D_IN))
    jaxpr = jax.make_jaxpr(lambda W: bound.rule.linear(x, W, bound.state, Call()))(params["kernel"])
    made = [eqn for eqn in jaxpr.eqns for out in eqn.outvars if out.aval.shape == (D_IN, D_OUT)]
    assert {eqn.primitive.name for eqn in made} <= {"stop_gradient", "mul"}
    p = {name: np.asarray(leaf, np.float64) for name, leaf in bound.state.items()}
    V = np.asarray(params["kernel"]) + p["scale"] * (p["A"] @ p["B"] - p["A0"] @ p["B0"])
    wanted = np.asarray(x) @ V * (p["m"] / np.linalg.norm(V, axis=0))
    got = bound.rule.linear(x, params["kernel"], bound.state, Call())
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_direction_brings_its_statistics(key):
    model, x, params, peft = with_direction(key, {"method": "corda", "rank": RANK})
    assert peft.traits.needs == ("sample_moment",)
    with pytest.raises(ValueError, match="dora initialises from the statistic 'sample_moment'"):
        peft.init(key, params)
    stats = {"kernel": {"sample_moment": jnp.eye(D_IN), "samples": 1.0}}
    y = pefts.apply(model.apply)({"params": peft.bind(params, peft.init(key, params, stats))}, x)
    np.testing.assert_allclose(y, model.apply({"params": params}, x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="dora: the initial 'A' .* the moment of its inputs stays"):
        peft.init(key, params, {"kernel": {"sample_moment": jnp.zeros((D_IN, D_IN))}})


def test_ranks_and_kernels_are_selected_by_dora_itself(key):
    params = {name: {"kernel": jax.random.normal(key, (D_IN, D_OUT))} for name in ("up", "down")}
    direction = {"method": "olora", "rank": 2}
    peft = pefts.dora(direction=direction, exclude="down", rank_pattern={"up": 4})
    state = peft.init(key, params)
    assert state.trainable.keys() == {"up/kernel"}
    assert state.trainable["up/kernel"]["A"].shape == (D_IN, 4)
    assert pefts.from_config(peft.config).init(key, params).trainable.keys() == {"up/kernel"}


def fake_direction(start, **changes):
    """DoRA on a method that stands in no table."""
    rule = additive(start, lambda p, call: (p["A"], p["B"]))
    return with_magnitude(Declaration(rule, selection(targets="kernel"), **changes))


def ones(key, W, *, site, stats):
    del key, stats
    return {"A": jnp.ones((W.shape[0], 1)), "B": jnp.ones((1, W.shape[1]))}, {"seen": jnp.zeros(())}


def test_the_magnitude_is_that_of_the_first_direction(key):
    """A method that changes the kernels at step 0 changes what m starts from."""
    _, _, params, _, _ = problem(key)
    for identity, V in ((True, params["kernel"]), (False, params["kernel"] + 1)):
        declared = fake_direction(ones, traits=Traits(identity_at_init=identity))
        m = lift(declared, {"method": "fake"}).init(key, params).trainable["kernel"]["m"]
        np.testing.assert_allclose(m, np.linalg.norm(V, axis=0), rtol=1e-6)


def test_a_directions_penalty_and_schedule_see_its_own_state(key):
    """And m comes through both untouched, beside what all kernels share."""
    _, _, params, _, _ = problem(key)

    def start(key, W, *, site, stats):
        return {}, {"A": jnp.ones((W.shape[0], 1)), "B": jnp.ones((1, W.shape[1]))}

    def penalty(state, params=None):
        assert state.trainable == {"shared": {"m": state.trainable["shared"]["m"]}}
        return jnp.sum(state.trainable["shared"]["m"]) + jnp.sum(params["kernel"])

    def update(state, grads, step):
        assert jax.tree.structure(grads) == jax.tree.structure(state.trainable)
        doubled = jax.tree.map(lambda leaf: 2 * leaf, state.trainable)
        return state._replace(trainable=doubled)

    declared = fake_direction(
        start,
        init_shared=lambda key, sites: ({"m": jnp.ones(3)}, {}),
        penalty=penalty,
        update=update,
    )
    peft = lift(declared, {"method": "fake"})
    state = peft.init(key, params)
    m = state.trainable["kernel"]["m"]
    wanted = 3 + params["kernel"].sum()
    np.testing.assert_allclose(peft.penalty(state, params), wanted, rtol=1e-6)
    after = peft.update(state, state.trainable, jnp.zeros((), jnp.int32))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    np.testing.assert_array_equal(after.trainable["kernel"]["m"], m)
    np.testing.assert_array_equal(after.trainable["shared"]["m"], 2 * jnp.ones(3))


def test_directions_that_dora_cannot_normalise_are_refused(key):
    _, _, params, _, _ = problem(key)

    def clash(key, W, *, site, stats):
        trainable, frozen = ones(key, W, site=site, stats=stats)
        return trainable, {**frozen, "m": jnp.zeros(3)}

    with pytest.raises(ValueError, match="has an array 'm' of its own"):
        lift(fake_direction(clash), {"method": "fake"}).init(key, params)
    with pytest.raises(ValueError, match="changes the kernels at step 0 by arrays that they share"):
        shared = {"init_shared": lambda key, sites: ({}, {})}
        fake_direction(ones, traits=Traits(identity_at_init=False), **shared)
    noisy = additive(ones, lambda p, call: (p["A"], p["B"]))._replace(uses_key=True)
    with pytest.raises(ValueError, match="without dropout"):
        with_magnitude(Declaration(noisy, selection()))
