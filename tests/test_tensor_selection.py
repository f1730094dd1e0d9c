"""GreenTrainer's costs, importance and selection, against brute force and the official vectors."""

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import jitted, near, run

import pefts
from models.config import EncoderConfig
from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from models.encoder import EncoderClassifier
from models.rope import Rope
from pefts.tensor_selection import (
    Costs,
    Tensor,
    backward_cost,
    backward_share,
    importance,
    keep_selected,
    select,
    solve,
    tensor_costs,
)

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/greentrainer/golden.npz"
SIZES = dict(
    vocab_size=10,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    intermediate_size=12,
    max_positions=16,
)
B, N = 2, 3

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.exists():
        pytest.skip("the golden vectors of the official code are not beside this repository")
    return np.load(GOLDEN)


def decoder(**options: Any) -> Decoder:
    config = DecoderConfig(**{**SIZES, "rope": Rope(1e4), **options})
    return Decoder(config)


def shapes(model: Any, *inputs: Any) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def costs_of(model: Any) -> Costs:
    return tensor_costs(shapes(model, jnp.zeros((1, 3), jnp.int32)), batch=B, length=N)


# --- the costs ---


def test_a_decoder_by_hand() -> None:
    """Llama with an untied head: D 8, two query heads and one key head of 6, F 12, V 10."""
    costs, T = costs_of(decoder()), B * N
    layer = [
        ("mlp/down_proj/kernel", T * 12 * 8, T * 12 * 8),
        ("mlp/gate_proj/kernel", T * 12 * 8, T * 12 * 8),
        ("mlp/up_proj/kernel", T * 12 * 8, T * 12 * 8),
        ("mlp_norm/scale", T * 8, T * 8),
        ("self_attn/o_proj/kernel", T * 12 * 8, T * 12 * 8),
        ("self_attn/v_proj/kernel", T * 8 * 6 + 4 * B * N**2 * 12, T * 8 * 6),
        ("self_attn/k_proj/kernel", T * 8 * 6, T * 8 * 6),
        ("self_attn/q_proj/kernel", T * 8 * 12, T * 8 * 12),
        ("attention_norm/scale", T * 8, T * 8),
    ]
    expected = [
        Tensor("lm_head/kernel", None, T * 80, T * 80),
        Tensor("norm/scale", None, T * 8, T * 8),
        *(Tensor(f"layers/{path}", n, *cost) for n in (1, 0) for path, *cost in layer),
        Tensor("embed_tokens/embedding", None, 0, T * 8),
    ]
    assert list(costs.tensors) == expected
    in_layer = 5 * T * 96 + 2 * T * 48 + 2 * B * N**2 * 12 + 2 * T * 8
    assert costs.forward == T * 80 + T * 8 + 2 * in_layer + T * 8


def test_a_tied_table_is_the_head_too() -> None:
    costs, plain = costs_of(decoder(tie_embeddings=True)), costs_of(decoder())
    T, table = B * N, 80
    assert costs.tensors[0] == Tensor("norm/scale", None, T * 8 + T * table, T * 8)
    assert costs.tensors[-1] == Tensor("embed_tokens/embedding", None, 0, T * table + table)
    assert costs.tensors[1:-1] == plain.tensors[2:-1]
    assert costs.forward == plain.forward


def test_unrolled_layers_cost_what_scanned_ones_do() -> None:
    scanned, unrolled = costs_of(decoder()), costs_of(decoder(scan_layers=False))
    assert [t[2:] for t in scanned.tensors] == [t[2:] for t in unrolled.tensors]
    assert [t.layer for t in unrolled.tensors] == [None] * len(unrolled.tensors)
    names = [f"layers_{t.layer}" if t.layer is not None else "layers" for t in scanned.tensors]
    paths = [t.path.replace("layers", n) for t, n in zip(scanned.tensors, names, strict=True)]
    assert paths == [t.path for t in unrolled.tensors]


def test_biases_norms_and_fused_products_of_other_families() -> None:
    gpt2 = decoder(
        rope=None, norm="layer", gated=False, fused_qkv=True, num_kv_heads=2, qkv_bias=True,
        output_bias=True, mlp_bias=True, tie_embeddings=True, scan_layers=False,
    )  # fmt: skip
    by_path = {t.path: t for t in costs_of(gpt2).tensors}
    T, qkv = B * N, "layers_1/self_attn/qkv_proj"
    order = list(by_path)
    assert order.index(f"{qkv}/bias") == order.index(f"{qkv}/kernel") - 1
    assert by_path[f"{qkv}/bias"][2:] == (4 * B * N**2 * 12, T * 36)
    assert by_path[f"{qkv}/kernel"][2:] == (T * 8 * 36, T * 8 * 36)
    assert by_path["layers_0/mlp_norm/bias"][2:] == (0, T * 8)
    assert by_path["embed_positions/embedding"][2:] == (0, T * 8)
    assert order[-2:] == ["embed_positions/embedding", "embed_tokens/embedding"]
    gemma = decoder(qk_norm=True, sandwich=True)
    by_path = {t.path: t for t in costs_of(gemma).tensors}
    assert by_path["layers/self_attn/q_norm/scale"][2:] == (T * 12, T * 12)
    assert by_path["layers/self_attn/k_norm/scale"][2:] == (T * 6, T * 6)
    assert len(by_path) == 3 + 13


def test_an_encoder_pools_before_its_head() -> None:
    config = EncoderConfig(10, 8, 2, 2, 12, 16, 2)
    model = EncoderClassifier(config, 5, "pooler")
    tokens = jnp.zeros((1, 3), jnp.int32)
    tensors = tensor_costs(shapes(model, tokens, tokens), batch=B, length=N).tensors
    T = B * N
    assert [t.path for t in tensors[:4]] == [
        "classifier/bias", "classifier/kernel", "pooler/dense/bias", "pooler/dense/kernel",
    ]  # fmt: skip
    assert [t[2:] for t in tensors[:4]] == [(0, B * 5), (B * 40,) * 2, (0, B * 8), (B * 64,) * 2]
    by_path = {(t.path, t.layer): t[2:] for t in tensors}
    value = "encoder/layers/attention/value"
    assert by_path[f"{value}/bias", 1] == (4 * B * N**2 * 8, T * 8)
    assert by_path[f"{value}/kernel", 0] == (T * 64, T * 64)
    assert [t.path for t in tensors[-3:]] == [
        f"embeddings/{name}_embeddings/embedding" for name in ("position", "token_type", "word")
    ]
    assert tensors[4][:2] == ("encoder/layers/mlp/norm/bias", 1)


def test_all_tensors_cost_everything_and_more_tensors_cost_more() -> None:
    costs = costs_of(decoder())
    full = sum(t.t_dy + t.t_dw for t in costs.tensors)
    n = len(costs.tensors)
    assert backward_cost(costs, [True] * n) == full
    assert backward_cost(costs, np.zeros(n, bool)) == 0
    rng = np.random.default_rng(0)
    for _ in range(50):
        m = rng.random(n) < 0.3
        more = m | (rng.random(n) < 0.2)
        assert backward_cost(costs, m) <= backward_cost(costs, more) <= full
    last = np.zeros(n, bool)
    last[-1] = True
    assert backward_cost(costs, last) == sum(t.t_dy for t in costs.tensors) + costs.tensors[-1].t_dw
    with pytest.raises(ValueError, match=f"selected has 2 entries for {n} tensors"):
        backward_cost(costs, [True, False])


def test_the_share_of_the_backward_pass() -> None:
    costs = Costs((Tensor("a", None, 50, 50), Tensor("b", None, 50, 50)), forward=100)
    assert backward_share(costs, 1.0) == 1.0
    assert backward_share(costs, 0.5) == pytest.approx(0.5 * 1.5 - 0.5)
    real = costs_of(decoder())
    share, full = backward_share(real, 0.6), backward_cost(real, [True] * len(real.tensors))
    assert real.forward + share * full == pytest.approx(0.6 * (real.forward + full))
    for rho in (1 / 3, 0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="give a share above 0.333, which the forward pass"):
            backward_share(costs, rho)


def flops(model: Decoder, params: Any, tokens: Any, pattern: str | None) -> float:
    """What XLA counts for the loss, and for the gradients of what `pefts.full` trains."""

    def loss(params: Any) -> Any:
        return jnp.sum(model.apply({"params": params}, tokens) ** 2)

    if pattern is None:
        return jax.jit(loss).lower(params).compile().cost_analysis()["flops"]
    peft = pefts.full(targets=pattern)
    state = jax.eval_shape(peft.init, jax.random.key(0), params)

    def gradient(trainable: Any, frozen: Any, params: Any) -> Any:
        state = pefts.PeftState(trainable, frozen)
        return jax.grad(lambda one: loss(peft.merge(params, state._replace(trainable=one))))(
            trainable
        )

    return jax.jit(gradient).lower(*state, params).compile().cost_analysis()["flops"]


def test_the_costs_are_those_of_the_compiled_program() -> None:
    wide = dict(hidden_size=64, head_dim=32, intermediate_size=128, vocab_size=100, num_kv_heads=2)
    model, tokens = decoder(**wide, scan_layers=False), jnp.zeros((2, 16), jnp.int32)
    params = shapes(model, tokens)
    costs = tensor_costs(params, batch=2, length=16)
    n = len(costs.tensors)
    forward = flops(model, params, tokens, None)
    full = flops(model, params, tokens, ".") - forward
    assert forward == pytest.approx(2 * costs.forward, rel=0.1)
    assert full == pytest.approx(2 * backward_cost(costs, [True] * n), rel=0.1)
    chosen = np.array([t.path.startswith("layers_1/mlp") for t in costs.tensors])
    part = flops(model, params, tokens, "layers_1/mlp") - forward
    assert part / full == pytest.approx(
        backward_cost(costs, chosen) / backward_cost(costs, [1] * n), abs=0.06
    )
    assert part < 0.6 * full


# --- the solver ---


def test_the_official_instances(golden: Any) -> None:
    missed = 0
    for n in range(24):
        t_dy, t_dw, gain = (golden[name][n] for name in ("t_dy", "t_dw", "importance"))
        m = solve(t_dy, t_dw, gain, int(golden["limit"][n]))
        assert gain[m].sum() == pytest.approx(float(golden["optimal_value"][n]), abs=1e-12)
        np.testing.assert_array_equal(m, golden["optimal_mask"][n].astype(bool))
        costs = Costs(tuple(Tensor("", k, int(t_dy[k]), int(t_dw[k])) for k in range(9)), 0)
        assert backward_cost(costs, m) <= golden["limit"][n]
        assert backward_cost(costs, golden["official_mask"][n]) == golden["official_cost"][n]
        missed += gain[m].sum() > golden["official_value"][n] + 1e-6
    assert missed == 2
    m = solve([0, 2, 1, 4, 0], [5, 1, 7, 3, 1], [1, 3, 10, 5, 3], 0.6 * 24)
    np.testing.assert_array_equal(m, golden["selftest_mask"].astype(bool))
    assert np.array([1, 3, 10, 5, 3])[m].sum() == golden["selftest_value"]


def brute(t_dy: Any, t_dw: Any, gain: Any, limit: float) -> float:
    best = 0.0
    for m in itertools.product([False, True], repeat=len(gain)):
        m = np.array(m)
        deepest = np.flatnonzero(m)[-1] + 1 if m.any() else 0
        if np.sum(t_dy[:deepest]) + np.sum(t_dw[m]) <= limit:
            best = max(best, gain[m].sum())
    return best


def test_brute_force_agrees() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        t_dy, t_dw = rng.integers(0, 12, (2, 8))
        gain, limit = rng.normal(size=8), rng.uniform(-1, 90)
        m = solve(t_dy, t_dw, gain, limit)
        assert gain[m].sum() == pytest.approx(brute(t_dy, t_dw, gain, limit), abs=1e-12)


def test_costs_that_are_rounded_never_break_the_limit() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        t_dy, t_dw = rng.uniform(1e9, 9e9, (2, 8))
        gain, limit = rng.normal(size=8), rng.uniform(1e9, 6e10)
        m = solve(t_dy, t_dw, gain, limit, resolution=3000)
        best, value = brute(t_dy, t_dw, gain, limit), gain[m].sum()
        deepest = np.flatnonzero(m)[-1] + 1 if m.any() else 0
        assert np.sum(t_dy[:deepest]) + np.sum(t_dw[m]) <= limit
        assert (
            value <= best + 1e-12
            and value >= brute(t_dy, t_dw, gain, limit * (1 - 8 / 3000)) - 1e-12
        )
    assert solve([0.0] * 3, [1.9] * 3, [1.0] * 3, 4.0, resolution=4).sum() == 2
    assert not solve([1.5], [1.5], [1.0], 0.0).any()
    assert not solve([0.0, 0.0], [0.5, 0.0], [1.0, -1.0], 0.0).any()


def test_what_is_no_instance_is_refused() -> None:
    with pytest.raises(ValueError, match="have shapes .*: give one of each per tensor"):
        solve([1], [1, 2], [1], 1)
    with pytest.raises(ValueError, match="has a negative cost"):
        solve([1], [-1], [1], 1)
    with pytest.raises(ValueError, match="importance is not finite"):
        solve([1], [1], [np.nan], 1)
    with pytest.raises(ValueError, match="resolution=0: give an integer from 1"):
        solve([1], [1], [1], 1, resolution=0)


# --- importance and training ---


@functools.cache
def setting(scan: bool) -> tuple[Any, Any]:
    """Parameters of a decoder and its loss on one batch."""
    model = decoder(scan_layers=scan, initializer_range=0.3)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 10, (4, 8)), jnp.int32)
    params = model.init(jax.random.key(1), tokens)["params"]

    def loss(params: Any) -> Any:
        return jnp.mean(
            model.apply({"params": params}, tokens[:, :-1], tokens[:, 1:], method="loss")
        )

    return params, jax.jit(loss)


@pytest.mark.parametrize("scan", [True, False])
def test_importance_predicts_the_change_of_the_loss(scan: bool) -> None:
    params, loss = setting(scan)
    tx = optax.adamw(1e-3, weight_decay=0.1)
    state, slope = tx.init(params), jax.jit(jax.grad(loss))
    for _ in range(2):  # moments of other steps take part
        updates, state = jitted(tx.update)(slope(params), state, params)
        params = optax.apply_updates(params, updates)
    before = jax.tree.map(np.asarray, state)
    gain = jax.jit(lambda p, s: importance(loss, p, tx, s))(params, state)
    jax.tree.map(np.testing.assert_array_equal, state, before)
    updates, _ = jitted(tx.update)(slope(params), state, params)
    after = optax.apply_updates(params, updates)
    actual = float(loss(params) - loss(after))
    total = sum(float(jnp.sum(value)) for value in gain.values())
    assert actual > 1e-3
    assert total == pytest.approx(actual, rel=0.1)
    only = optax.tree.zeros_like(params)  # one tensor alone
    path = "layers" if scan else "layers_0"
    one = updates[path]["mlp"]["down_proj"]["kernel"]
    only[path]["mlp"]["down_proj"]["kernel"] = one.at[1].set(0) if scan else one
    alone = float(loss(params) - loss(optax.apply_updates(params, only)))
    value = gain[f"{path}/mlp/down_proj/kernel"]
    assert value.shape == ((2,) if scan else ())
    assert float(value.reshape(-1)[0]) == pytest.approx(alone, rel=0.25)


def test_importance_of_what_full_trains_has_the_same_names() -> None:
    params, loss = setting(True)
    peft = pefts.full()
    state, tx = peft.init(jax.random.key(0), params), optax.sgd(1e-2)

    @jax.jit
    def adapted(trainable: Any) -> Any:
        return loss(peft.merge(params, state._replace(trainable=trainable)))

    ours = importance(adapted, state.trainable, tx, tx.init(state.trainable))
    direct = importance(loss, params, tx, tx.init(params))
    assert set(ours) == set(direct)
    for path in direct:
        near(ours[path], direct[path], 1e-6)


def flat(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


@pytest.mark.parametrize("scan", [True, False])
def test_what_is_not_selected_stays_to_the_bit(scan: bool) -> None:
    params, loss = setting(scan)
    tx = optax.adamw(1e-2, weight_decay=0.1)
    costs = tensor_costs(params, batch=4, length=8)
    choice = select(costs, importance(loss, params, tx, tx.init(params)), rho=0.6)
    full = backward_cost(costs, [True] * len(costs.tensors))
    assert choice.backward == backward_cost(costs, choice.selected) / full
    assert 0.2 < choice.backward <= backward_share(costs, 0.6)
    assert bool(choice.partial) == scan
    peft = pefts.full(targets=choice.targets)
    state = peft.init(jax.random.key(0), params)
    assert set(state.trainable) == set(choice.mask)
    slope = jax.jit(jax.grad(lambda t: loss(peft.merge(params, state._replace(trainable=t)))))
    grads = slope(state.trainable)
    tx = optax.chain(tx, keep_selected(choice.mask))
    trainable, _, _ = run(tx, state.trainable, [grads] * 3)
    old, new = flat(params), flat(peft.merge(params, state._replace(trainable=trainable)))
    for one, chosen in zip(costs.tensors, choice.selected, strict=True):
        at = slice(None) if one.layer is None else one.layer
        moved = np.any(old[one.path][at] != new[one.path][at])
        assert moved == chosen, one


def test_tensors_without_importance_are_no_candidates() -> None:
    costs = costs_of(decoder(scan_layers=False))
    gain = {t.path: 1.0 for t in costs.tensors if "down_proj" in t.path}
    choice = select(costs, gain, rho=1.0)
    assert choice.targets == r"^(layers_0/mlp/down_proj/kernel|layers_1/mlp/down_proj/kernel)$"
    assert choice.partial == ()
    scanned = costs_of(decoder())
    choice = select(scanned, {"layers/mlp_norm/scale": np.array([-1.0, 2.0])}, rho=1.0)
    assert choice.targets == "^(layers/mlp_norm/scale)$"
    assert choice.partial == ("layers/mlp_norm/scale",)
    assert choice.mask["layers/mlp_norm/scale"].tolist() == [False, True]


def test_masks_work_on_bfloat16_leaves_and_under_strict_promotion() -> None:
    params = {"layers": {"k": {"kernel": jnp.ones((2, 3, 4), jnp.bfloat16)}}, "b": jnp.ones(2)}
    tx = keep_selected({"layers/k/kernel": [False, True], "b": True})
    with jax.numpy_dtype_promotion("strict"):
        updates, state = jitted(tx.update)(params, tx.init(params))
    assert updates["layers"]["k"]["kernel"].dtype == jnp.bfloat16
    assert updates["layers"]["k"]["kernel"][:, 0, 0].tolist() == [0.0, 1.0]
    assert updates["b"].tolist() == [1.0, 1.0] and jax.tree.leaves(state) == []
    tx.update(params, state, params, value=1.0)  # optax's extra arguments


def test_what_does_not_fit_is_refused() -> None:
    costs = costs_of(decoder())
    with pytest.raises(ValueError, match="importance has 'lm_haed/kernel', which has no cost"):
        select(costs, {"lm_haed/kernel": 1.0}, rho=0.5)
    with pytest.raises(
        ValueError, match=r"of 'layers/mlp_norm/scale' has shape \(\); it must be \(2,\)"
    ):
        select(costs, {"layers/mlp_norm/scale": 1.0}, rho=0.5)
    with pytest.raises(
        ValueError, match="rho=0.5: no tensor that lowers the loss fits; the cheapest"
    ):
        select(costs, {"lm_head/kernel": -1.0}, rho=0.5)
    with pytest.raises(ValueError, match="importance is not finite: lower"):
        select(costs, {"lm_head/kernel": float("nan")}, rho=0.5)
    for arguments in ({"batch": 0, "length": 1}, {"batch": 1, "length": 1.5}):
        with pytest.raises(ValueError, match=": give an integer from 1"):
            tensor_costs({}, **arguments)
    for tree in (
        {"tower": {"kernel": jnp.ones((2, 2))}},
        {"layers": {"mlp": {"moe": {"kernel": jnp.ones((2, 2, 2))}}}},
        {"norm": {"scale": jnp.ones((2, 2))}},
        {"lm_head": {"weight": jnp.ones((2, 2))}},
    ):
        with pytest.raises(ValueError, match="is no leaf of models.decoder or models.encoder"):
            tensor_costs(tree, batch=1, length=1)
    params = {"layers": {"norm": {"scale": jnp.ones((2, 3))}}}
    with pytest.raises(ValueError, match="mask has .* for 'norm/scale', the tree no such leaf"):
        keep_selected({"norm/scale": True}).init(params)
    with pytest.raises(
        ValueError, match=r"mask has \(3,\) for 'layers/norm/scale', the tree \(2, 3\)"
    ):
        keep_selected({"layers/norm/scale": [True] * 3}).init(params)
