"""LoRA+ groups by path, and weight decay by path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pefts
from pefts.optimizers import OPTIMIZERS, decay_mask, lora_plus, restart_at


@pytest.fixture(autouse=True)
def promotion() -> None:
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
        yield


@pytest.fixture
def trainable(key: jax.Array) -> dict:
    params = {
        "layers": {"query": {"kernel": jnp.ones((2, 6, 4))}},
        "embed": {"embedding": jnp.ones((9, 4))},
    }
    peft = pefts.lora(rank=2, targets="query|embed", axes={"query": "lio"})
    state = pefts.randomize(key, peft.init(key, params))
    return {**state.trainable, "norm/scale": {"value": jnp.ones(4)}}


def moved(tx: optax.GradientTransformation, tree: dict, grads: dict, steps: int = 3) -> dict:
    state, update = tx.init(tree), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree


def check(actual: dict, tree: dict, grads: dict, expected: dict) -> None:
    """Each leaf as an optimizer of its own moves it."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(actual):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        pick = [jax.tree_util.tree_leaves_with_path(t) for t in (tree, grads)]
        one, grad = (dict(pairs)[path] for pairs in pick)
        np.testing.assert_allclose(
            leaf, moved(expected[name], one, grad), rtol=1e-6, atol=1e-8, err_msg=name
        )


def test_each_group_has_its_rate_and_decay(trainable: dict) -> None:
    grads = jax.tree.map(jnp.cos, trainable)
    tx = lora_plus(1e-3, 8.0, weight_decay=0.5, no_decay=[r"scale/value$"])
    check(
        moved(tx, trainable, grads),
        trainable,
        grads,
        {
            "layers/query/kernel/A": optax.adamw(1e-3, weight_decay=0.5),
            "layers/query/kernel/B": optax.adamw(8e-3, weight_decay=0.5),
            "embed/embedding/A": optax.adamw(1e-6, weight_decay=0.5),
            "embed/embedding/B": optax.adamw(1e-6, weight_decay=0.5),
            "norm/scale/value": optax.adamw(1e-3, weight_decay=0.0),
        },
    )


def test_fast_leaves_may_be_spared_decay_and_follow_a_schedule(trainable: dict) -> None:
    grads = jax.tree.map(jnp.cos, trainable)
    schedule = optax.linear_schedule(1e-2, 0.0, 4)
    tx = lora_plus(
        schedule, 4.0, weight_decay=0.5, fast="/B$|norm", no_decay="norm", embedding="no_table"
    )
    fast = optax.linear_schedule(4e-2, 0.0, 4)
    check(
        moved(tx, trainable, grads),
        trainable,
        grads,
        {
            "layers/query/kernel/A": optax.adamw(schedule, weight_decay=0.5),
            "layers/query/kernel/B": optax.adamw(fast, weight_decay=0.5),
            "embed/embedding/A": optax.adamw(schedule, weight_decay=0.5),
            "embed/embedding/B": optax.adamw(fast, weight_decay=0.5),
            "norm/scale/value": optax.adamw(fast, weight_decay=0.0),
        },
    )


def test_it_stands_inside_a_restart(trainable: dict) -> None:
    grads = jax.tree.map(jnp.cos, trainable)
    tx = lora_plus(1e-2)
    once = moved(tx, trainable, grads, 2)
    again = moved(tx, once, grads, 1)
    restarted = moved(restart_at(tx, (2,)), trainable, grads, 3)
    jax.tree.map(np.testing.assert_array_equal, restarted, again)


def test_patterns_that_match_nothing_are_refused(trainable: dict) -> None:
    with pytest.raises(ValueError, match=r"fast: 'lora_B' matches no parameter"):
        lora_plus(1e-3, fast="lora_B").init(trainable)
    with pytest.raises(ValueError, match=r"no_decay: 'bais\$' matches no parameter"):
        lora_plus(1e-3, no_decay=["scale", "bais$"]).init(trainable)
    with pytest.raises(ValueError, match="ratio=0.5"):
        lora_plus(1e-3, 0.5)


def test_decay_spares_the_matching_leaves(trainable: dict) -> None:
    mask = decay_mask([r"/B$", "norm"])
    assert mask(trainable) == {
        "layers/query/kernel": {"A": True, "B": False},
        "embed/embedding": {"A": True, "B": False},
        "norm/scale": {"value": False},
    }
    tx = optax.adamw(0.1, weight_decay=0.5, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    after = moved(tx, trainable, zeros, 1)
    np.testing.assert_allclose(
        after["layers/query/kernel"]["A"], 0.95 * trainable["layers/query/kernel"]["A"], rtol=1e-6
    )
    np.testing.assert_array_equal(
        after["layers/query/kernel"]["B"], trainable["layers/query/kernel"]["B"]
    )
    np.testing.assert_array_equal(after["norm/scale"]["value"], 1.0)
    assert all(jax.tree.leaves(decay_mask(())(trainable)))


def test_a_decay_pattern_that_matches_nothing_is_refused(trainable: dict) -> None:
    with pytest.raises(ValueError, match="without: 'nrom' matches no parameter.*norm"):
        optax.adamw(0.1, mask=decay_mask(["norm", "nrom"])).init(trainable)


def test_the_table_of_optimizers_is_sorted() -> None:
    assert list(OPTIMIZERS) == sorted(OPTIMIZERS)
    assert all(callable(build) for build in OPTIMIZERS.values())
    assert pefts.OPTIMIZERS is OPTIMIZERS
