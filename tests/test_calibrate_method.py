"""pefts.calibrate for a method: what it needs, where it will adapt."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import pefts
from pefts.core import Declaration, Peft, Traits, lift
from pefts.targets import selection

MODEL = tiny.Classifier()
ATTENTION = {f"layers/attention/{name}/kernel" for name in ("query", "key", "value", "out")}
MLP = {"layers/up/kernel", "layers/down/kernel"}


@functools.cache
def model_params() -> Any:
    return tiny.parameters()


@functools.cache
def axes() -> dict[str, str]:
    return pefts.infer_axes(MODEL.apply, model_params(), *tiny.inputs())


def forward(variables: Any, batch: Any) -> jax.Array:
    return MODEL.apply(variables, *batch)


def mean_loss(outputs: jax.Array, batch: Any) -> jax.Array:
    del batch
    return jnp.mean(jnp.square(outputs - 1))


def calibrated(targets: Any, **kwargs: Any) -> Any:
    batches = [tiny.inputs(seed) for seed in range(2)]
    options = {"weights": lambda batch: batch[1], **kwargs}
    return pefts.calibrate(forward, model_params(), batches, targets, **options)


def same(found: Any, want: Any) -> None:
    assert set(found) == set(want)
    for path, group in want.items():
        assert set(found[path]) == set(group)
        for name, value in group.items():
            # Fewer kernels are another program, which may add in another order.
            scale = float(np.max(np.abs(value)))
            np.testing.assert_allclose(
                found[path][name], value, rtol=0, atol=2e-6 * scale, err_msg=f"{path} {name}"
            )


def test_a_method_brings_its_targets_and_its_needs(key: jax.Array) -> None:
    peft = pefts.eva(rank=2, rho=2.0, targets="layers.*kernel", exclude="down", axes=axes())
    stats = calibrated(peft)
    assert set(stats) == ATTENTION | {"layers/up/kernel"}
    assert {group["components"].shape for group in stats.values()} == {(2, 4, 12), (2, 4, 16)}
    want = calibrated("layers.*kernel", exclude="down", axes=axes(), collect="pca", components=4)
    same(stats, want)
    peft.init(key, model_params(), stats)


@pytest.mark.parametrize(
    ("build", "collect", "options"),
    [
        (pefts.corda, "sample_moment", {}),
        (pefts.lora_ga, "gradient", {"loss": mean_loss, "weights": None}),
        (
            lambda rank, **where: pefts.senszoq(1 / rank, **where),
            "squared_gradient",
            {"loss": mean_loss, "weights": None},
        ),
    ],
)
def test_each_need_is_collected(
    build: Any, collect: Any, options: dict[str, Any], key: jax.Array
) -> None:
    peft = build(rank=2, targets=["up", "query"], axes=axes())
    stats = calibrated(peft, **options)
    same(stats, calibrated(["up", "query"], axes=axes(), collect=collect, **options))
    peft.init(key, model_params(), stats)


def test_the_needy_member_of_a_composition_is_found(key: jax.Array) -> None:
    corda = pefts.corda(rank=2, targets="up|down|query", axes=axes())
    want = calibrated(corda)
    head = pefts.full(targets="classifier")
    same(calibrated(pefts.chain(head, corda)), want)
    labels = {"attention": "low", "(up|down)": "data", "classifier": "head"}
    members = {"low": pefts.lora(rank=2, axes=axes()), "data": corda, "head": head}
    split = pefts.partition(members, labels)
    part = {path: group for path, group in want.items() if path in MLP}
    same(calibrated(split), part)
    nested = pefts.chain(pefts.bitfit(targets="up/bias"), split)
    stats = calibrated(nested)
    same(stats, part)
    nested.init(key, model_params(), stats)


def test_a_part_of_a_part_lies_in_both(key: jax.Array) -> None:
    corda = pefts.corda(rank=2, targets="kernel", axes=axes())
    inner = pefts.partition({"data": corda}, {"(up|down|classifier)/kernel": "data"})
    outer = pefts.partition(
        {"blocks": inner, "head": pefts.full(targets="classifier")},
        {"layers": "blocks", "classifier": "head"},
    )
    stats = calibrated(outer)
    assert set(stats) == MLP
    outer.init(key, model_params(), stats)


def test_labels_given_as_a_function_restrict_nothing(key: jax.Array) -> None:
    corda = pefts.corda(rank=2, targets="up|down|query", axes=axes())

    def label(path: str) -> str | None:
        return "data" if "up/kernel" in path else None

    split = pefts.partition({"data": corda}, label)
    stats = calibrated(split)
    same(stats, calibrated(corda))
    split.init(key, model_params(), stats)


def hungry(**traits: Any) -> Peft:
    """A method that stands in no registry."""
    rule = pefts.bound.Rule(lambda key, W, *, site, stats: ({}, {}), lambda W, p, call: W)
    chosen = selection(targets="layers/up/kernel", axes=axes())
    config = {"method": "hungry", "targets": "layers/up/kernel", "axes": axes()}
    return lift(Declaration(rule, chosen, Traits(**traits)), config)


def test_a_method_may_need_several_statistics_and_context() -> None:
    needs = ("second_moment", "gradient", "pca", "context", "sample_moment", "squared_gradient")
    stats = calibrated(hungry(needs=needs, components=3), loss=mean_loss)
    assert set(stats) == {"layers/up/kernel"}
    assert set(stats["layers/up/kernel"]) > {
        "second_moment", "gradient", "components", "sample_moment", "squared_gradient"
    }  # fmt: skip


def by_hand(params: Any, batches: list[Any]) -> list[dict[str, np.ndarray]]:
    """The gradient of each batch."""

    @jax.jit
    def gradient(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: mean_loss(forward({"params": p}, batch), batch))(params)

    return [pefts.paths.flatten(gradient(params, batch)) for batch in batches]


def test_squared_gradient_is_the_mean_of_squares_not_the_square_of_the_mean() -> None:
    options: dict[str, Any] = {"axes": axes(), "loss": mean_loss, "weights": None}
    alone = calibrated("kernel", collect="squared_gradient", **options)
    both = calibrated("kernel", collect=("squared_gradient", "gradient"), **options)
    grads = by_hand(model_params(), [tiny.inputs(seed) for seed in range(2)])
    assert set(alone) == ATTENTION | MLP | {"classifier/kernel"}
    for path, found in alone.items():
        want = np.mean([np.square(grad[path], dtype=np.float64) for grad in grads], axis=0)
        mean = np.mean([grad[path] for grad in grads], axis=0, dtype=np.float64)
        want, mean = (value.reshape(both[path]["gradient"].shape) for value in (want, mean))
        assert set(found) == {"squared_gradient"}
        for F in (found["squared_gradient"], both[path]["squared_gradient"]):
            np.testing.assert_allclose(F, want, rtol=1e-4, atol=1e-6 * want.max())
        np.testing.assert_allclose(both[path]["gradient"], mean, rtol=1e-4, atol=1e-7)
        assert np.abs(mean**2 - want).max() > 1e-2 * want.max()


class Twice(nn.Module):
    """An embedding, a convolution, and one layer that runs two times."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Conv(5, (3,), name="conv")(nn.Embed(7, 5, name="embed")(ids))
        dense = nn.Dense(5, name="dense")
        return dense(jnp.tanh(dense(x)))


def test_a_gradient_is_squared_whole(key: jax.Array) -> None:
    """Of all calls of a module in a batch together; embeddings and convolutions have one too."""
    ids, model = jnp.arange(10).reshape(2, 5) % 7, Twice()
    params = jax.jit(model.init)(key, ids)["params"]

    def run(variables: Any, ids: Any) -> Any:
        return model.apply(variables, ids)

    stats = pefts.calibrate(
        run, params, [ids], "kernel|embedding", axes={"conv": "kio"},
        collect="squared_gradient", loss=mean_loss,
    )  # fmt: skip
    grad = jax.grad(lambda p: mean_loss(run({"params": p}, ids), ids))(params)
    want = {path: leaf for path, leaf in pefts.paths.flatten(grad).items() if "bias" not in path}
    assert stats.keys() == want.keys()
    for path, leaf in want.items():
        found = stats[path]["squared_gradient"]
        np.testing.assert_allclose(found, leaf.reshape(found.shape) ** 2, rtol=1e-4, atol=1e-9)


def test_squares_that_overflow_are_the_gradients_fault() -> None:
    def steep(outputs: jax.Array, batch: Any) -> jax.Array:
        return 1e25 * mean_loss(outputs, batch)

    for collect in ("squared_gradient", ("gradient", "squared_gradient")):
        with pytest.raises(ValueError, match="the gradient of 'classifier/kernel' became NaN or"):
            calibrated("classifier/kernel", collect=collect, axes=axes(), loss=steep, weights=None)


TWO = r"['corda', 'eva'] in this chain all start from statistics: calibrate each of them by itself"


@pytest.mark.parametrize(
    ("build", "kwargs", "message"),
    [
        (lambda: pefts.lora(axes=axes()), {}, "lora starts from no statistics"),
        (lambda: hungry(needs=("context",)), {}, "hungry starts from no statistics"),
        (
            lambda: pefts.chain(pefts.lora(axes=axes()), pefts.full()),
            {},
            "chain starts from no statistics",
        ),
        (lambda: pefts.chain(pefts.corda(axes=axes()), pefts.eva(axes=axes())), {}, TWO),
        (
            lambda: pefts.corda(axes=axes()),
            {"collect": ("pca",)},
            "collect=('pca',): corda brings its own",
        ),
        (lambda: pefts.corda(axes=axes()), {"components": 2}, "components=2: corda brings"),
        (lambda: pefts.corda(axes=axes()), {"exclude": "up"}, "exclude='up': corda brings"),
        (lambda: pefts.corda(axes=axes()), {"axes": {}}, "axes={}: corda brings its own"),
        (lambda: pefts.lora_ga(axes=axes()), {}, "'gradient' and loss(outputs, batch)"),
        (
            lambda: pefts.corda(axes=axes()),
            {"loss": mean_loss},
            "'gradient' and loss(outputs, batch)",
        ),
        (
            lambda: hungry(needs=("squared_gradient",)),
            {},
            "go together, and so do 'squared_gradient' and loss",
        ),
        (
            lambda: hungry(needs=("squared_gradient",)),
            {"loss": mean_loss},
            "weights do not reach a gradient",
        ),
        (
            lambda: hungry(needs=("pca",), components=13),
            {},
            "components=13 is out of range for 'layers/up/kernel', whose inputs have 12",
        ),
    ],
)
def test_methods_that_cannot_be_served_say_so(
    build: Any, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        calibrated(build(), **kwargs)
