"""Learning rates for other widths and batches."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import close, jitted, run
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pefts
from pefts.optimizers.transfer import scale_by_width, scale_learning_rate, step_law

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


def shapes(width: int, layers: int = 2, ffn: int = 2) -> dict:
    """A transformer's kinds of leaves, abstract."""
    tree = {
        "embed": {"embedding": (11, width)},
        "layers": {
            "query": {"kernel": (layers, width, width), "bias": (layers, width)},
            "up": {"kernel": (layers, width, ffn * width)},
            "down": {"kernel": (layers, ffn * width, width)},
            "norm": {"scale": (layers, width)},
        },
        "out": {"kernel": (2, width // 2, width)},
        "lm_head": {"kernel": (width, 11)},
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def ones(tree: Any, dtype: Any = jnp.float32) -> Any:
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, dtype), tree)


AXES = {"out/kernel": "iio"}


def scaled(tx: optax.GradientTransformation, tree: Any) -> dict[str, float]:
    """The factor of every leaf, all of whose entries must have the same."""
    updates, _ = jitted(tx.update)(tree, tx.init(tree))
    flat = jax.tree_util.tree_leaves_with_path(updates)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    for _, leaf in flat:
        assert np.all(leaf == leaf.ravel()[0])
    return {name: float(leaf.ravel()[0]) for name, (_, leaf) in zip(names, flat, strict=True)}


def test_hidden_kernels_alone_follow_their_fan_in() -> None:
    base, params = shapes(4, layers=3), ones(shapes(12, layers=2, ffn=4))
    with jax.numpy_dtype_promotion("strict"):
        factors = scaled(scale_by_width(base, axes=AXES), params)
    third, sixth = np.float32(1 / 3), np.float32(1 / 6)
    assert factors == {
        "embed/embedding": 1.0,
        "layers/down/kernel": sixth,  # from 2 * 4 to 4 * 12
        "layers/norm/scale": 1.0,
        "layers/query/bias": 1.0,
        "layers/query/kernel": third,
        "layers/up/kernel": third,
        "lm_head/kernel": 1.0,
        "out/kernel": third,  # two input axes, (2, 2) and (2, 6)
    }


def test_the_base_model_itself_is_left_alone_and_a_head_can_be_named() -> None:
    base = shapes(4)
    assert set(scaled(scale_by_width(base, axes=AXES), ones(base)).values()) == {1.0}
    tx = scale_by_width(base, targets="lm_head|query/kernel", axes=AXES)
    factors = scaled(tx, ones(shapes(8)))
    assert {path for path, factor in factors.items() if factor == 0.5} == {
        "lm_head/kernel",
        "layers/query/kernel",
    }


def test_trees_of_full_and_of_lora_are_understood(key: jax.Array) -> None:
    peft = pefts.full()
    base = jax.eval_shape(peft.init, key, shapes(4)).trainable
    params = peft.init(key, ones(shapes(8))).trainable
    assert scaled(scale_by_width(base, axes=AXES), params)["layers/up/kernel/value"] == 0.5
    assert scaled(scale_by_width(shapes(4), axes=AXES), params)["layers/up/kernel/value"] == 0.5
    lora = pefts.lora(rank=2, targets="query/kernel", axes={"query": "lio"})
    base = jax.eval_shape(lora.init, key, shapes(4)).trainable
    factors = scaled(scale_by_width(base), ones(lora.init(key, ones(shapes(8))).trainable))
    assert factors == {"layers/query/kernel/A": 0.5, "layers/query/kernel/B": 1.0}


def test_behind_adam_it_is_a_learning_rate_per_leaf_and_does_not_touch_decay() -> None:
    params = ones(shapes(8))
    grads = [
        jax.tree.map(lambda leaf, t=t: jnp.cos(t + jnp.cumsum(leaf, -1)), params) for t in (0, 1)
    ]
    tx = optax.chain(
        optax.scale_by_adam(),
        scale_by_width(shapes(4), axes=AXES),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.01),
    )
    end, state, _ = run(tx, params, grads)
    query = params["layers"]["query"]
    for name, lr in (("kernel", 0.005), ("bias", 0.01)):
        own = optax.adamw(lr, weight_decay=0.1 * 0.01 / lr)
        mine = [grad["layers"]["query"][name] for grad in grads]
        close(end["layers"]["query"][name], run(own, query[name], mine)[0], 1e-5, 1e-6)
    assert jax.tree.leaves(state[1]) == []
    tx.update(grads[0], state, params, value=1.0)  # optax's extra arguments


def test_dtypes_stay_and_parts_of_a_tree_work() -> None:
    params = ones(shapes(8), jnp.bfloat16)
    labels = {name: "hidden" if name == "layers" else "rest" for name in params}
    tx = optax.partition({"hidden": scale_by_width(shapes(4)), "rest": optax.identity()}, labels)
    updates, _ = jitted(tx.update)(params, tx.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert float(updates["layers"]["query"]["kernel"][0, 0, 0]) == 0.5
    assert float(updates["lm_head"]["kernel"][0, 0]) == 1.0


def test_a_sharded_kernel_keeps_its_sharding() -> None:
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, P(None, "fsdp", None)))
    tx = scale_by_width(shapes(4), targets="query/kernel", axes=AXES)
    grads = {"layers": {"query": {"kernel": place(jnp.ones((2, 8, 8)))}}}
    update = jitted(tx.update)(grads, tx.init(grads))[0]["layers"]["query"]["kernel"]
    assert len(update.sharding.device_set) == 8 and np.all(update == 0.5)


def test_a_base_model_that_does_not_fit_is_refused() -> None:
    params, base = ones(shapes(8)), shapes(4)
    with pytest.raises(ValueError, match="ambiguous"):
        scale_by_width(base).init(params)
    with pytest.raises(ValueError, match="targets: 'qurey' matches no parameter"):
        scale_by_width(base, targets="qurey").init(params)
    del base["layers"]["up"]
    with pytest.raises(ValueError, match="base_shapes has nothing for 'layers/up/kernel' of shape"):
        scale_by_width(base, axes=AXES).init(params)
    base["layers"]["up"] = {"kernel": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
    with pytest.raises(ValueError, match=r"base_shapes has \(4, 8\) for 'layers/up/kernel'"):
        scale_by_width(base, axes=AXES).init(params)


def test_learning_rates_follow_the_batch() -> None:
    assert scale_learning_rate(0.1, 32, 128, "linear") == pytest.approx(0.4)
    assert scale_learning_rate(0.1, 32, 128) == pytest.approx(0.2)
    assert scale_learning_rate(0.1, 128, 32, "sqrt") == pytest.approx(0.05)
    assert scale_learning_rate(0.1, 32, 128, "none") == 0.1
    bad = [
        ((optax.constant_schedule(0.1), 1, 1), "give the peak"),
        ((0.0, 1, 1), "learning_rate=0.0: give the peak, above 0"),
        ((0.1, 0, 1), "base_batch=0: give the size of a batch"),
        ((0.1, 1, float("nan")), "batch=nan: give the size of a batch"),
        ((0.1, 1, 1, "cube"), "rule='cube' is unknown; choose one of"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            scale_learning_rate(*arguments)


def test_the_step_law_is_its_formula() -> None:
    law = step_law(2.0**30, 2.0**36)
    assert law.learning_rate == pytest.approx(1.79 * 2 ** (-0.713 * 30 + 0.307 * 36))
    assert law.batch_tokens == pytest.approx(0.58 * 2 ** (0.571 * 36))
    assert math.log(step_law(1e9, 2e11).batch_tokens / step_law(1e9, 1e11).batch_tokens, 2) == (
        pytest.approx(0.571)
    )
    assert step_law(1e9, 1e11).learning_rate == pytest.approx(1.632e-3, rel=1e-3)
    for arguments, name in (((0, 1e9), "parameters=0"), ((1e9, -1), "tokens=-1")):
        with pytest.raises(ValueError, match=f"{name}: give a number above 0"):
            step_law(*arguments)
