"""Additive rules, factors that take over a part of a kernel, and decisions over all kernels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts import low_rank
from pefts.core import Declaration, Traits, lift
from pefts.targets import selection

D_IN, D_OUT, RANK = 7, 5, 2


def parts(seed: int, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(D_IN, RANK)), rng.normal(size=(RANK, D_OUT))
    return A.astype(dtype), B.astype(dtype)


def test_moved_factors_are_the_difference_of_the_products() -> None:
    (A, B), (A0, B0) = parts(0), parts(1)
    with jax.enable_x64(True):
        left, right = low_rank.moved(*map(jnp.asarray, (A, B, A0, B0)), jnp.float64(0.5))
        np.testing.assert_allclose(left @ right, 0.5 * (A @ B - A0 @ B0), atol=1e-14)
    assert left.shape == (D_IN, 2 * RANK)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_moved_factors_vanish_where_nothing_moved(dtype: Any) -> None:
    A, B = (jnp.asarray(a, dtype) for a in parts(0))
    left, right = low_rank.moved(A, B, A, B, jnp.asarray(3.0, dtype))
    assert not np.asarray(left @ right).any()


def rule_of_ranks() -> Any:
    """An additive method whose rank at each layer comes from `prepare`."""

    def prepare(sites: Any, matrix_of: Any, stats: Any) -> Any:
        kept, found = [], {}
        for site in sites:
            kernels = matrix_of(site)
            assert kernels.shape == (*site.stack, site.d_in, site.d_out)
            if site.path.endswith("skipped/kernel"):
                continue
            kept.append(dataclasses.replace(site, rank=3, static=(("layers", len(kernels)),)))
            found[site.path] = {"kept": jnp.arange(1, 1 + len(kernels))}
        return tuple(kept), found

    def start(key: Any, W: Any, *, site: Any, stats: Any) -> Any:
        del key, W
        active = jnp.arange(site.rank) < stats["kept"]
        A = jnp.where(active[None], jnp.ones((site.d_in, site.rank)), 0.0)
        return {"A": A, "B": jnp.ones((site.rank, site.d_out))}, {}

    rule = low_rank.additive(start, lambda p, call: (p["A"], p["B"]))
    chosen = selection(axes={"kernel": "lio"})
    return lift(Declaration(rule, chosen, Traits(), rank=1, prepare=prepare), {"method": "ranks"})


def test_prepare_decides_ranks_and_sites_before_any_init(key: jax.Array) -> None:
    params = {
        name: {"kernel": jax.random.normal(key, (2, D_IN, D_OUT))} for name in ("up", "skipped")
    }
    peft = rule_of_ranks()
    state = peft.init(key, params)
    assert set(state.trainable) == {"up/kernel"}
    assert np.array_equal(state.trainable["up/kernel"]["A"][:, 0], [[1, 0, 0], [1, 1, 0]])
    merged = peft.merge(params, state)
    change = np.asarray(merged["up"]["kernel"] - params["up"]["kernel"])
    np.testing.assert_allclose(change, np.broadcast_to([[[1]], [[2]]], change.shape), atol=1e-6)
    assert merged["skipped"]["kernel"] is params["skipped"]["kernel"]


def test_layers_are_initialised_as_if_they_stood_alone(key: jax.Array) -> None:
    """One layer after the other, under two stacked axes, each with a key of its own."""
    params = {"up": {"kernel": jnp.ones((2, 3, D_IN, D_OUT))}}
    state = pefts.lora(rank=2, axes={"kernel": "llio"}).init(key, params)
    A = np.asarray(state.trainable["up/kernel"]["A"])
    assert A.shape == (2, 3, D_IN, 2)
    assert len(np.unique(A.reshape(6, -1), axis=0)) == 6


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_kernel_that_is_not_finite_is_named(value: float, key: jax.Array) -> None:
    params = {"up": {"kernel": jnp.ones((D_IN, D_OUT)).at[0, 0].set(value)}}
    with pytest.raises(ValueError, match="dora: the initial 'm' of 'up/kernel' is not finite: the"):
        pefts.dora(rank=2).init(key, params)


def test_statistics_of_another_model_are_refused(key: jax.Array) -> None:
    rule = low_rank.additive(lambda key, W, *, site, stats: ({}, {}), lambda p, call: (p, p))
    peft = lift(Declaration(rule, selection(), Traits(needs=("gradient",))), {"method": "downhill"})
    params = {"up": {"kernel": jnp.ones((D_IN, D_OUT))}}
    stats = {"up/kernel": {"gradient": jnp.ones((D_OUT, D_IN))}}
    with pytest.raises(ValueError, match=r"'gradient' of 'up/kernel' has shape \(5, 7\)"):
        peft.init(key, params, stats)
