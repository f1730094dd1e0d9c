"""KIND beyond the table: gates by class, learngene models, transfer, what cannot be merged."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cases import GATES
from subject import base_inputs, base_params, model_axes

import pefts
from pefts.bound import Call
from pefts.methods.kind import rows_of

D_IN, D_OUT, SIDE = 9, 7, 7
CLASSES = len(GATES)


@pytest.fixture
def W(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (D_IN, D_OUT))


@pytest.fixture
def x(key: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, 1), (CLASSES, 5, D_IN))


def kind(**kwargs: Any) -> pefts.Peft:
    return pefts.kind(**{"learngenes": 2, "tailors": 3, "targets": "kernel", **kwargs})


def run(peft: pefts.Peft, state: pefts.PeftState, W: jax.Array, x: jax.Array, **context: Any):
    bound = peft.bind({"kernel": W}, state, **context)
    return pefts.apply(nn.Dense(D_OUT, use_bias=False).apply)({"params": bound}, x)


def merged(peft: pefts.Peft, state: pefts.PeftState, W: jax.Array) -> np.ndarray:
    return np.asarray(peft.merge({"kernel": W}, state)["kernel"])


def components(W: jax.Array, first: int, last: int) -> np.ndarray:
    """The part of W that its singular triplets first <= n < last make up."""
    U, s, Vt = np.linalg.svd(np.asarray(W, np.float64), full_matrices=False)
    return (U[:, first:last] * s[first:last]) @ Vt[first:last]


# --- what a state starts as ---


@pytest.mark.parametrize("train", ["tailors", "all"])
@pytest.mark.parametrize("start", ["svd", "fresh"])
def test_a_pretrained_model_is_unchanged_bit_for_bit(W, x, key, train, start):
    peft = kind(train=train, start=start)
    assert peft.traits.identity_at_init
    state = peft.init(key, {"kernel": W})
    np.testing.assert_array_equal(run(peft, state, W, x), x @ W)
    np.testing.assert_array_equal(merged(peft, state, W), W)


def test_open_gates_and_all_components_are_the_full_model(W, key):
    peft = kind(learngenes=3, tailors=SIDE - 3, residual=False)
    assert not peft.traits.identity_at_init
    np.testing.assert_allclose(merged(peft, peft.init(key, {"kernel": W}), W), W, atol=1e-5)


@pytest.mark.parametrize("options", [{"start": "fresh"}, {"gates": [[0, 0, 0]], "active_class": 0}])
def test_no_tailors_are_the_learngene_model(W, key, options):
    """Closed gates, or tailors that have not learnt yet."""
    peft = kind(residual=False, **options)
    state = peft.init(key, {"kernel": W})
    np.testing.assert_allclose(merged(peft, state, W), components(W, 0, 2), atol=1e-5)


def test_without_a_residual_the_tail_is_dropped(W, key):
    peft = kind(residual=False)
    state = peft.init(key, {"kernel": W})
    np.testing.assert_allclose(merged(peft, state, W), components(W, 0, 5), atol=1e-5)


def test_a_closed_gate_takes_its_component_out_of_the_base(W, key):
    peft = kind(gates=[[1, 0, 1]], active_class=0)
    assert not peft.traits.identity_at_init
    state = peft.init(key, {"kernel": W})
    np.testing.assert_allclose(merged(peft, state, W), W - components(W, 3, 4), atol=1e-5)


def test_fresh_tailors_are_orthonormal_directions_without_weight(W, key):
    group = kind(start="fresh").init(key, {"kernel": W}).trainable["kernel"]
    for name in ("U_T", "V_T"):
        np.testing.assert_allclose(group[name].T @ group[name], np.eye(3), atol=1e-6)
    assert not np.asarray(group["s_T"]).any()


@pytest.mark.parametrize(
    ("train", "residual", "trained", "frozen"),
    [("tailors", True, "T", "T0"), ("tailors", False, "T", "G"), ("all", False, "GT", "")],
)
def test_transfer_trains_the_tailors_alone(W, key, train, residual, trained, frozen):
    state = kind(train=train, residual=residual).init(key, {"kernel": W})
    assert set(state.trainable["kernel"]) == {f"{n}_{g}" for g in trained for n in "UsV"}
    names = set(state.frozen.get("kernel", {}))
    assert names == ({f"{n}_{frozen}" for n in "UsV"} if frozen else set())
    count = (2 * (train == "all") + 3) * (D_IN + D_OUT + 1)
    assert pefts.count(state.trainable) == count


def test_without_learngenes_the_tailors_lead_the_spectrum(W, key):
    peft = kind(learngenes=0, train="all", residual=False)
    state = peft.init(key, {"kernel": W})
    np.testing.assert_allclose(merged(peft, state, W), components(W, 0, 3), atol=1e-5)


# --- classes ---


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("start", ["svd", "fresh"])
@pytest.mark.parametrize("train", ["tailors", "all"])
def test_each_example_is_served_by_the_kernel_of_its_class(W, x, key, residual, start, train):
    options = {"gates": GATES, "residual": residual, "start": start, "train": train}
    mixed, fixed = kind(**options), [kind(active_class=c, **options) for c in range(CLASSES)]
    state = pefts.randomize(key, mixed.init(key, {"kernel": W}), 0.3)
    ids = jnp.asarray([2, 0, 3, 1])
    y = run(mixed, state, W, x, class_ids=ids)
    for example, out, c in zip(x, y, ids.tolist(), strict=True):
        kernel = merged(fixed[c], state, W)
        np.testing.assert_allclose(out, example @ kernel, rtol=1e-4, atol=1e-5)
        alone = run(fixed[c], state, W, example[None])[0]
        np.testing.assert_allclose(out, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("active_class", [None, 1])
@pytest.mark.parametrize("residual", [True, False])
def test_an_inactive_tailor_has_no_gradient_at_all(W, x, key, active_class, residual):
    gates = [[1, 1, 1], [1, 0, 1]]
    peft = kind(gates=gates, active_class=active_class, residual=residual)
    state = pefts.randomize(key, peft.init(key, {"kernel": W}))
    context = {} if active_class else {"class_ids": jnp.ones(CLASSES, jnp.int32)}

    def loss(trainable: Any) -> jax.Array:
        return jnp.sum(run(peft, state._replace(trainable=trainable), W, x, **context) ** 2)

    for name, leaf in jax.grad(loss)(state.trainable)["kernel"].items():
        size = np.abs(np.asarray(leaf)).reshape(-1, 3).sum(0)
        assert size[1] == 0 and size[0] > 0 and size[2] > 0, name


def test_classes_reach_scanned_and_rematerialised_layers(key):
    """One batch of four classes is four batches on merged models."""
    options = {"learngenes": 2, "tailors": 3, "gates": GATES, "axes": model_axes(True)}
    mixed, params, inputs = pefts.kind(**options), base_params(), base_inputs()
    ids = jnp.arange(tiny.BATCH) % CLASSES
    state = pefts.randomize(key, mixed.init(key, params))

    @jax.jit
    def outputs(ids: jax.Array) -> jax.Array:
        bound = mixed.bind(params, state, class_ids=ids)
        return pefts.apply(tiny.Classifier().apply)({"params": bound}, *inputs)

    y = outputs(ids)
    for c in range(CLASSES):
        dense = pefts.kind(**options, active_class=c).merge(params, state)
        wanted = tiny.Classifier().apply({"params": dense}, *inputs)
        np.testing.assert_allclose(y[ids == c], wanted[ids == c], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["conv", "embed"])
def test_classes_reach_convolutions_and_embeddings(key, layer):
    if layer == "conv":
        model, x = nn.Conv(7, (3,)), jax.random.normal(key, (CLASSES, 9, 4))
    else:
        model, x = nn.Embed(11, 6), jnp.arange(4 * CLASSES).reshape(CLASSES, 4) % 11
    params = model.init(key, x)["params"]
    options = {"gates": GATES, "axes": pefts.infer_axes(model.apply, params, x)}
    mixed = kind(targets="kernel|embedding", **options)
    state = pefts.randomize(key, mixed.init(key, params))
    ids = jnp.arange(CLASSES)
    y = pefts.apply(model.apply)({"params": mixed.bind(params, state, class_ids=ids)}, x)
    for c in range(CLASSES):
        fixed = kind(targets="kernel|embedding", active_class=c, **options)
        wanted = model.apply({"params": fixed.merge(params, state)}, x[c : c + 1])
        np.testing.assert_allclose(y[c : c + 1], wanted, rtol=2e-5, atol=2e-5)


def test_a_fixed_class_exports_as_a_lora(W, x, key):
    peft = kind(gates=[[1, 0, 1]], active_class=0)
    state = pefts.randomize(key, peft.init(key, {"kernel": W}))
    lora, converted = pefts.to_lora(peft, state, {"kernel": W})
    assert lora.config["rank"] == 6
    np.testing.assert_allclose(
        run(lora, converted, W, x), run(peft, state, W, x), rtol=1e-4, atol=1e-5
    )


# --- refusals ---


def test_a_batch_of_classes_has_no_merged_kernel(W, key):
    peft = kind(gates=GATES)
    assert not peft.traits.mergeable and peft.traits.needs == ("context",)
    state = peft.init(key, {"kernel": W})
    with pytest.raises(ValueError, match="cannot be merged .*fix one by active_class"):
        peft.merge({"kernel": W}, state)
    bound = peft.bind({"kernel": W}, state)["kernel"]
    with pytest.raises(ValueError, match="no dense kernel .*fix one by active_class"):
        bound.rule.effective(W, bound.state, Call())


@pytest.mark.parametrize(
    ("context", "match"),
    [
        ({}, r"gates for 4 classes and was not told the batch's: .*class_ids=\.\.\."),
        ({"class_ids": jnp.ones(CLASSES)}, r"class_ids of shape \(4,\) and dtype float32"),
        ({"class_ids": jnp.ones((CLASSES, 1), int)}, r"class_ids of shape \(4, 1\)"),
        ({"class_ids": jnp.ones(3, int)}, r"names 3 examples, .*shape \(4, 5, 6\)"),
        ({"class_ids": jnp.asarray([0, 1, 4, 2])}, "holds 4, .* the classes 0 to 3"),
        ({"class_ids": jnp.asarray([0, -1, 3, 2])}, "holds -1, .* the classes 0 to 3"),
    ],
)
def test_class_ids_are_checked(W, x, key, context, match):
    peft = kind(gates=GATES)
    state = peft.init(key, {"kernel": W})
    with pytest.raises(ValueError, match=match):
        run(peft, state, W, x, **context)


@pytest.mark.parametrize("unknown", [4, -1, 1000])
@pytest.mark.parametrize("residual", [True, False])
def test_an_unknown_class_inside_jit_spoils_its_own_outputs_alone(W, x, key, unknown, residual):
    peft = kind(gates=GATES, residual=residual)
    state = peft.init(key, {"kernel": W})
    y = jax.jit(lambda ids: run(peft, state, W, x, class_ids=ids))(jnp.asarray([0, unknown, 3, 2]))
    assert np.isnan(y[1]).all()
    assert np.isfinite(np.delete(y, 1, axis=0)).all()


def test_an_unknown_class_has_no_row():
    rows = jax.jit(lambda ids: rows_of({"class_ids": ids}, np.eye(3, dtype=np.float32)))(
        jnp.asarray([2, 3, -1, 0])
    )
    np.testing.assert_array_equal(np.isnan(rows).all(1), [False, True, True, False])
    np.testing.assert_array_equal(rows[0], [0, 0, 1])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"gates": np.eye(3)}, r"(?s)gates=.*tolist\(\)"),
        ({"gates": [1, 0, 1]}, r"gates\[0\]=1: give a list"),
        ({"gates": [[1, 1, 1], [1, 1, 1, 1]]}, r"gates\[1\]"),
        ({"active_class": 0}, "active_class=0: gates has 0 rows"),
        ({"gates": GATES, "active_class": -1}, "active_class=-1: gates has 4 rows"),
        ({"learngenes": True}, "learngenes=True"),
    ],
)
def test_arguments_are_checked(kwargs, match):
    with pytest.raises(ValueError, match=match):
        kind(**kwargs)


def test_more_components_than_the_kernel_has_name_it(W, key):
    with pytest.raises(ValueError, match="= 8 are more than the 7 components of 'kernel', a 9 x 7"):
        kind(learngenes=5).init(key, {"kernel": W})
