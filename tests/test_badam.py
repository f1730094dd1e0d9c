"""BAdam against the official code and numpy in float64."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import close, near, run
from test_active import L, grads_of, layer, sharded_run, tree_of, unroll

import pefts
from pefts.optimizers.active import EMBEDDINGS, HEAD
from pefts.optimizers.badam import badam, block_at

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/badam/golden.npz"
B1, B2, EPS = 0.9, 0.999, 1e-8

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


# --- the official code ---


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.exists():
        pytest.skip("the golden vectors of the official code are not beside this repository")
    return np.load(GOLDEN)


def official(golden: Any, kind: str) -> Any:
    """The arrays W0, G, ... of the official model, as a tree with stacked layers."""

    def one(name: str) -> Any:
        x = golden[f"{kind}__{name}"]
        return jnp.asarray(np.swapaxes(x, -1, -2) if name.endswith("weight") else x)

    def stack(name: str) -> Any:
        leaves = [one(f"model.layers.{i}.{name}") for i in range(int(golden["n_blocks"]))]
        return jnp.stack(leaves, axis=1 if kind in ("G", "descending__W") else 0)

    names = {"w": "w.weight", "u": "u.weight", "b": "b.bias"}
    layers = {name: {"bias" if name == "b" else "kernel": stack(at)} for name, at in names.items()}
    if kind == "descending__W":  # blocks alone
        return {"layers": layers}
    ends = {"embed": one("model.embed_tokens.weight"), "lm_head": one("lm_head.weight")}
    return {"layers": layers, **ends}


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("order", ["descending", "ascending", "random"])
def test_the_official_trajectory(order: str, unrolled: bool, golden: Any, x64: None) -> None:
    interval, sequence = int(golden["switch_block_every"]), golden[f"{order}__block_sequence"]
    # Its first block has one update less than the others: we start at our second update.
    windows = (np.arange(len(sequence)) + 1) // interval
    blocks = [int(sequence[windows == w][0]) for w in range(max(windows) + 1)]
    np.testing.assert_array_equal(sequence, np.asarray(blocks)[windows])
    tx = badam(
        float(golden["lr"]),
        interval=interval,
        order=blocks if order == "random" else order,
        weight_decay=float(golden["weight_decay"]),
        no_decay=(),
    )
    shape = unroll if unrolled else (lambda tree: tree)
    params, G = shape(official(golden, "W0")), official(golden, "G")
    state = tx.init(params)
    state = (state[0]._replace(count=jnp.ones((), jnp.int32)), *state[1:])
    step, W, old = jax.jit(tx.update), params, official(golden, "W0")
    for t in range(int(golden["n_steps"])):
        updates, state = step(shape(jax.tree.map(lambda g, t=t: g[t], G)), state, W)
        W = optax.apply_updates(W, updates)
        if order == "descending":
            now = jax.tree.map(lambda w, t=t: w[t], official(golden, "descending__W"))
            now = shape({**now, "embed": old["embed"], "lm_head": old["lm_head"]})
            close(W, now, 0, 1e-12)
    if order != "descending":
        close(W, shape(official(golden, f"{order}__W_last")), 0, 1e-12)
    for name in ("embed", "lm_head"):
        np.testing.assert_array_equal(W[name], old[name])


# --- its steps ---


def oracle(params: Any, grads: list, blocks: list, *, interval: int, lr: float, wd: float) -> Any:
    """Adam from zero in every window, with decay of kernels alone."""
    W = jax.tree.map(lambda leaf: np.array(leaf, np.float64), params)
    for t, G in enumerate(grads):
        if t % interval == 0:
            M, V = (jax.tree.map(np.zeros_like, layer(W, 0)) for _ in range(2))
        i, c = blocks[t // interval], t % interval + 1
        paths = [path[-1].key for path, _ in jax.tree.leaves_with_path(layer(W, i))]
        leaves = map(jax.tree.leaves, (W["layers"], M, V, G["layers"]))
        for name, w, m, v, g in zip(paths, *leaves, strict=True):
            g = np.asarray(g, np.float64)[i]
            m[...], v[...] = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
            step = m / (1 - B1**c) / (np.sqrt(v / (1 - B2**c)) + EPS)
            w[i] -= lr * (step + (wd * w[i] if name == "kernel" else 0))
    return W


@pytest.mark.parametrize(
    ("order", "blocks"),
    [
        ("descending", [3, 2, 1, 0, 3, 2]),
        ("ascending", [0, 1, 2, 3, 0, 1]),
        ([1], [1] * 6),  # the same block again: from zero all the same
        ((2, 0, 0), [2, 0, 0, 2, 0, 0]),
    ],
)
def test_steps_are_the_papers(order: Any, blocks: list, x64: None) -> None:
    params, grads = tree_of(0, jnp.float64), grads_of(11, jnp.float64)
    expected = oracle(params, grads, blocks, interval=2, lr=0.01, wd=0.1)
    for shape in (lambda tree: tree, unroll):
        tx = badam(0.01, interval=2, order=order, weight_decay=0.1)
        end, state, _ = run(tx, shape(params), [shape(grad) for grad in grads])
        close(end, shape(expected), 1e-12, 1e-14)
    assert int(state[0].count) == 11


def test_a_random_order_is_a_new_permutation_in_every_pass() -> None:
    at = jax.jit(jax.vmap(lambda w: block_at("random", 4, w, 5)))
    passes = np.asarray(at(jnp.arange(200))).reshape(40, 5)
    np.testing.assert_array_equal(np.sort(passes, axis=1), np.arange(5)[None].repeat(40, axis=0))
    assert len({tuple(row) for row in passes}) > 25
    assert [int(block_at("random", 4, w, 5)) for w in range(5)] == passes[0].tolist()
    assert [int(block_at("random", 6, w, 5)) for w in range(10)] != passes[:2].ravel().tolist()
    params, grads = tree_of(0), grads_of(4)
    tx = badam(0.1, interval=1, order="random", seed=4)
    _, state, _ = run(tx, params, grads)
    end, _, _ = run(tx, params, grads)
    moved = np.any(
        np.asarray(end["layers"]["norm"]["scale"] != params["layers"]["norm"]["scale"]), 1
    )
    assert moved.all()  # one pass: each block once
    assert int(state[0].active[0]) == int(block_at("random", 4, 4, L))


def test_leaves_outside_the_layers_can_be_blocks() -> None:
    params, grads = tree_of(0), grads_of(6)
    tx = badam(0.1, interval=1, order="ascending", before=EMBEDDINGS, after=[HEAD])
    state = tx.init(params)
    for t, grad in enumerate(grads):
        updates, state = jax.jit(tx.update)(grad, state, params)
        moved = [
            bool(jnp.any(updates["embed"]["embedding"] != 0)),
            *jnp.any(updates["layers"]["query"]["kernel"] != 0, axis=(1, 2)).tolist(),
            bool(jnp.any(updates["lm_head"]["kernel"] != 0)),
        ]
        assert moved == [t == unit for unit in range(6)]
        assert not jnp.any(updates["norm"]["scale"])  # is in no block
    near(jnp.abs(updates["lm_head"]["kernel"]), 0.1, 1e-5)  # Adam's first step


def test_decay_spares_what_it_is_told_to() -> None:
    params = tree_of(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    make = functools.partial(badam, 0.1, order=[0], weight_decay=0.5)

    def decays(**options: Any) -> list[bool]:
        tx = make(**options)
        updates, _ = tx.update(zeros, tx.init(params), params)
        layers = updates["layers"]
        leaves = (layers["query"]["kernel"], layers["query"]["bias"], layers["norm"]["scale"])
        return [bool(jnp.all(leaf[0] != 0)) for leaf in leaves]

    assert decays() == [True, False, False]
    assert decays(no_decay=()) == [True, True, True]
    assert decays(no_decay="bias$") == [True, False, True]
    assert decays(no_decay=["query", "scale"]) == [False, False, False]
    trainable = pefts.full().init(jax.random.key(0), params).trainable
    tx = make()
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, trainable), tx.init(trainable), trainable)
    assert not jnp.any(updates["layers/query/bias"]["value"])
    assert jnp.any(updates["layers/query/kernel"]["value"])


def test_the_state_has_the_size_of_the_formula() -> None:
    params = tree_of(0)
    blocks = pefts.count(params["layers"])
    state = jax.eval_shape(badam(0.1, weight_decay=0.1).init, params)
    assert pefts.count(state) == 2 * blocks // L + 1 + 1 + 1  # Adam's count, ours, and the block
    state = jax.eval_shape(badam(0.1, after=(HEAD,)).init, params)
    assert pefts.count(state) == 2 * blocks // L + 2 * 21 + 2 + 1 + 1
    state = jax.eval_shape(badam(0.1).init, unroll(params))
    assert pefts.count(state) == 2 * blocks + L + 1 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval=0: give an integer of at least 1"),
        ({"order": "downwards"}, r"order='downwards' is unknown; choose one of \('ascending'"),
        ({"order": "fixed"}, "order='fixed' is unknown.*unit numbers"),
        ({"order": ()}, r"order=\(\) must name units by numbers from 0 to 3, at least one\."),
        ({"order": (0, 4)}, r"order=\(0, 4\).*0 to 3, at least one"),
        ({"order": (0.5,)}, r"order=\(0\.5,\) must name"),
        ({"no_decay": ("biass",)}, r"no_decay: 'biass' matches no parameter"),
        ({"after": ("lmhead",)}, r"after: 'lmhead' matches no parameter"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        badam(0.1, **options).init(tree_of(0))


def test_hyperparameters_can_be_injected_and_a_switch_compiles_nothing() -> None:
    params, grads = tree_of(0), grads_of(5)
    options = {"interval": 2, "weight_decay": 0.1, "order": "random"}
    tx = optax.inject_hyperparams(badam, static_args=("interval",))(0.1, **options)
    step, state, end = jax.jit(tx.update), tx.init(params), params
    for grad in grads:
        updates, state = step(grad, state, end)
        end = optax.apply_updates(end, updates)
    assert step._cache_size() == 1
    close(end, run(badam(0.1, **options), params, grads)[0])


def test_eight_devices_give_what_one_gives() -> None:
    expected, placed = sharded_run(badam(0.1, interval=2, weight_decay=0.1), 5)
    close(placed, expected, 0, 1e-5)
