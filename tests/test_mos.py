"""MoS beyond the table: the released code, the tables, what is one module type."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts import core

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/mos/golden.npz"


def tree(layers: int, **kernels: tuple[int, int]) -> dict[str, Any]:
    key = jax.random.key(5)
    return {
        f"layer_{n}": {
            name: {"kernel": jax.random.normal(jax.random.fold_in(key, n), shape)}
            for name, shape in kernels.items()
        }
        for n in range(layers)
    }


class Layers(nn.Module):
    """Every layer on an input of its own, as the reference vectors are."""

    count: int

    @nn.compact
    def __call__(self, xs: list[jax.Array]) -> list[jax.Array]:
        named = (f"layer_{n}" for n in range(self.count))
        layers = [nn.Dense(20, use_bias=False, param_dtype=float, name=name) for name in named]
        return [layer(x) for layer, x in zip(layers, xs, strict=True)]


@pytest.mark.skipif(not GOLDEN.is_file(), reason="../shared/golden/official/mos is not here")
@pytest.mark.usefixtures("x64")
def test_it_is_the_official_mixture() -> None:
    """Outputs, factors, and the gradients that pools gather from all layers."""
    g = np.load(GOLDEN)
    L, e, p, r, c = (
        int(g[name]) for name in ("layers", "equiv_rank", "private_rank", "rank", "shards")
    )
    params = {f"layer_{n}": {"kernel": jnp.asarray(g[f"l{n}_W"].T)} for n in range(L)}
    peft = pefts.mos(rank=r, alpha=float(g["alpha"]), budget=e, private=p, shards=c)
    fresh = peft.init(jax.random.key(0), params)
    pool_A, pool_B = "A.layer.kernel.12x20", "B.layer.kernel.12x20"
    pools = {pool_A: jnp.asarray(g["pool_A"]), pool_B: jnp.asarray(g["pool_B"].T)}
    assert {name: leaf.shape for name, leaf in fresh.trainable[core.SHARED].items()} == {
        name: leaf.shape for name, leaf in pools.items()
    }
    frozen = {
        f"layer_{n}/kernel": {
            pool_A: jnp.asarray(g[f"l{n}_idx_A"].reshape(r, c)),
            pool_B: jnp.asarray(g[f"l{n}_idx_B"].reshape(r, c)),
            "scale": jnp.asarray(float(g["alpha"]) / r),
        }
        for n in range(L)
    }
    assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(jnp.shape, fresh.frozen)
    xs = [jnp.asarray(g[f"l{n}_x"]) for n in range(L)]

    def run(trainable: Any) -> list[jax.Array]:
        bound = peft.bind(params, pefts.PeftState(trainable, frozen))
        return pefts.apply(Layers(L).apply)({"params": bound}, xs)

    ys, pull = jax.vjp(run, {core.SHARED: pools})
    grads = pull([jnp.asarray(g[f"l{n}_cot"]) for n in range(L)])[0][core.SHARED]
    expected = [g[f"l{n}_y"] for n in range(L)] + [g["grad_pool_A"], g["grad_pool_B"].T]
    for actual, wanted in zip([*ys, grads[pool_A], grads[pool_B]], expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())
    assert float(jnp.abs(fresh.trainable[core.SHARED][pool_A]).max()) <= g["pool_A_bound"]


@pytest.mark.skipif(not GOLDEN.is_file(), reason="../shared/golden/official/mos is not here")
def test_our_tables_are_built_as_the_official_ones() -> None:
    """The same checks hold for both: which rows come first, which behind them, none twice."""
    g = np.load(GOLDEN)
    L, e, p, r, c = 3, 3, 1, 5, 2
    params = tree(L, dense=(12, 20))
    frozen = pefts.mos(rank=r, budget=e, private=p, shards=c).init(jax.random.key(0), params).frozen
    official = [{f: g[f"l{n}_idx_{f}"] for f in "AB"} for n in range(L)]
    ours = [
        {f: np.asarray(group[f"{f}.layer.dense.kernel.12x20"]).ravel() for f in "AB"}
        for group in frozen.values()
    ]
    for tables in (official, ours):
        common = (e - p) * L * c
        for layer, pair in enumerate(tables):
            own = common + layer * p * c + np.arange(p * c)
            for table in pair.values():
                shared, private = table[: (r - p) * c], table[(r - p) * c :]
                np.testing.assert_array_equal(private, own)
                assert shared.max() < common
                assert len(set(shared.tolist())) == len(shared)
            assert not np.array_equal(pair["A"], pair["B"])
        assert not np.array_equal(tables[0]["A"], tables[1]["A"])


def test_with_nothing_shared_it_is_a_lora() -> None:
    """e = p = r: each layer has its own rows, in order."""
    params = tree(3, dense=(12, 20))
    peft = pefts.mos(rank=2, alpha=6.0, budget=2, private=2, shards=4)
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), params))
    pools = state.trainable[core.SHARED]
    rows_A = np.asarray(pools["A.layer.dense.kernel.12x20"]).reshape(3, 2, 12)
    rows_B = np.asarray(pools["B.layer.dense.kernel.12x20"]).reshape(3, 2, 20)
    factors = {
        f"layer_{n}/dense/kernel": {"A": jnp.asarray(rows_A[n].T), "B": jnp.asarray(rows_B[n])}
        for n in range(3)
    }
    lora = pefts.lora(rank=2, alpha=6.0)
    scales = lora.init(jax.random.key(0), params).frozen
    expected = lora.merge(params, pefts.PeftState(factors, scales))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
        peft.merge(params, state),
        expected,
    )


def test_layers_of_a_type_share_a_pool_and_types_do_not() -> None:
    params = {
        **tree(3, query=(6, 4), value=(6, 4)),
        "2": {"query": {"kernel": jnp.ones((6, 4))}},
        "pooler": {"dense": {"kernel": jnp.ones((6, 6))}},
        "blocks": {"query": {"kernel": jnp.ones((5, 6, 4))}},
    }
    params["layer_9"] = {"query": {"kernel": jnp.ones((6, 2))}}
    axes = {r"blocks/": "lio"}
    peft = pefts.mos(rank=1, budget=1, private=0, shards=2, axes=axes)
    pools = peft.init(jax.random.key(0), params).trainable[core.SHARED]
    rows = {name: leaf.shape for name, leaf in pools.items() if name.startswith("A.")}
    assert rows == {
        "A.layer.query.kernel.6x4": (6, 3),
        "A.layer.value.kernel.6x4": (6, 3),
        "A.layer.query.kernel.6x2": (2, 3),
        "A.query.kernel.6x4": (2, 3),
        "A.pooler.dense.kernel.6x6": (2, 3),
        "A.blocks.query.kernel.6x4": (10, 3),
    }


def test_stacked_and_unrolled_layers_are_one_type_of_as_many_layers() -> None:
    kernel = jax.random.normal(jax.random.key(0), (3, 6, 4))
    stacked = {"layers": {"dense": {"kernel": kernel}}}
    unrolled = {f"layers_{n}": {"dense": {"kernel": kernel[n]}} for n in range(3)}
    pools, private = [], []
    for params in (stacked, unrolled):
        peft = pefts.mos(rank=4, budget=2, private=1, shards=2, axes={"layers/": "lio"})
        if params is unrolled:
            peft = pefts.mos(rank=4, budget=2, private=1, shards=2)
        state = peft.init(jax.random.key(0), params)
        pools.append(state.trainable[core.SHARED])
        tables = [group["A.layers.dense.kernel.6x4"] for group in state.frozen.values()]
        private.append(np.concatenate([np.reshape(t, (-1, 4, 2)) for t in tables])[:, 3])
    jax.tree.map(np.testing.assert_array_equal, *pools)
    np.testing.assert_array_equal(private[0], private[1])


def test_another_target_changes_no_pool_and_no_table() -> None:
    params = tree(2, query=(6, 4), value=(6, 4))
    states = [
        pefts.mos(rank=2, budget=2, private=0, shards=2, targets=targets).init(
            jax.random.key(0), params
        )
        for targets in ("query", "query|value")
    ]
    for part in ("trainable", "frozen"):
        one, both = (getattr(state, part) for state in states)
        for path, group in one.items():
            for name, leaf in group.items():
                np.testing.assert_array_equal(leaf, both[path][name])
