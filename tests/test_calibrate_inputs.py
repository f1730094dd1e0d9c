"""What pefts.calibrate makes of inputs: one probe for shared ones, and moments by example."""

import functools
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import pefts
from models import encoder
from models.config import EncoderConfig

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "official" / "corda" / "golden.npz"
OF_INPUTS: Any = {"collect": ("second_moment", "sample_moment", "pca"), "components": 3}


@functools.cache
def tiny_params(scanned: bool = True) -> Any:
    return tiny.parameters() if scanned else tiny.unroll(tiny.parameters())


def tiny_run(variables: Any, batch: Any) -> jax.Array:
    scanned = "layers" in variables["params"]
    return tiny.Classifier(scanned).apply(variables, *batch)


def tiny_axes(params: Any) -> dict[str, str]:
    return pefts.infer_axes(tiny.Classifier("layers" in params).apply, params, *tiny.inputs())


def tiny_batches() -> list[Any]:
    return [tiny.inputs(seed) for seed in range(3)]


def mean_loss(outputs: jax.Array, batch: Any) -> jax.Array:
    del batch
    return jnp.mean(jnp.square(outputs - 1))


def by_itself(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """With a probe at every site: nothing is looked for in a model that binds by itself."""
    return pefts.calibrate(pefts.apply(fn), *args, adapted=True, **kwargs)


def shared(stats: Any, name: str) -> list[set[str]]:
    """The sites by the array that they hold under this name."""
    groups: dict[int, set[str]] = {}
    for path, group in stats.items():
        groups.setdefault(id(group[name]), set()).add(path.removesuffix("/kernel"))
    return sorted(groups.values(), key=lambda group: (-len(group), min(group)))


def close(found: Any, want: Any) -> None:
    assert set(found) == set(want)
    for path, group in want.items():
        assert set(found[path]) == set(group)
        for name, value in group.items():
            pair, atol = (found[path][name], value), 2e-4 if name == "cosine" else 1e-5
            if name == "components" and "second_moment" in group:
                # A direction, and its cosine with the one before, is off by rounding over its
                # distance to the next; what it explains of the moments by the square of that.
                pair = tuple(explained(np.asarray(C), group["second_moment"]) for C in pair)
            np.testing.assert_allclose(*pair, rtol=1e-5, atol=atol, err_msg=f"{path} {name}")


def explained(C: np.ndarray, M: Any) -> np.ndarray:
    """c^T M c of every component, and how far they are from orthonormal."""
    C, M = np.asarray(C, np.float64), np.asarray(M, np.float64)
    inner = np.einsum("...rd,...sd->...rs", C, C)
    return np.stack([np.einsum("...rd,...de,...re->...r", C, M, C), *np.moveaxis(inner, -1, 0)])


# Shared inputs


@pytest.mark.parametrize("scanned", [True, False])
def test_grouped_sites_hold_what_each_would_find_by_itself(scanned: bool) -> None:
    params = tiny_params(scanned)
    options = {
        "axes": tiny_axes(params),
        "weights": lambda batch: batch[1],
        "loss": mean_loss,
        **OF_INPUTS,
        "collect": (*OF_INPUTS["collect"], "gradient"),
        "targets": "layers.*kernel",
    }
    stats = pefts.calibrate(tiny_run, params, tiny_batches(), **options)
    single = by_itself(tiny_run, params, tiny_batches(), **options)
    close(stats, single)
    blocks = ("layers",) if scanned else ("layers_0", "layers_1")
    for name in ("second_moment", "sample_moment", "components", "cosine", "mean", "count"):
        assert len(shared(single, name)) == len(stats)
        triples = [{f"{b}/attention/{part}" for part in ("query", "key", "value")} for b in blocks]
        assert shared(stats, name)[: len(blocks)] == triples
        assert len(shared(stats, name)) == 4 * len(blocks)
    assert len(shared(stats, "gradient")) == len(stats)


BERT = {
    "model_type": "bert",
    "vocab_size": 19,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "hidden_act": "gelu",
}


@pytest.mark.parametrize(
    "options",
    [{}, {"scan_layers": False}, {"remat": "full"}, {"remat": "full", "scan_layers": False}],
)
def test_four_probes_serve_the_six_kernels_of_an_encoder_layer(
    options: dict[str, Any], key: jax.Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = encoder.build(EncoderConfig.from_hf(BERT, **options), num_labels=2, pooling="mean")
    tokens = jax.random.randint(key, (4, 9), 0, 19)
    mask = jnp.arange(9)[None] < jnp.array([9, 4, 7, 1])[:, None]
    params = model.init(key, tokens, mask)["params"]
    probed: set[str] = set()
    module = sys.modules["pefts.calibrate"]  # pefts.calibrate itself is the function
    rows = module._row_weights

    def note(x: jax.Array, weights: Any, path: str) -> jax.Array:
        probed.add(str(path))
        return rows(x, weights, path)

    monkeypatch.setattr(module, "_row_weights", note)
    arguments: Any = {
        "params": params,
        "batches": [(tokens, mask)],
        "axes": pefts.infer_axes(model.apply, params, tokens, mask),
        "weights": lambda batch: batch[1],
    }

    def run(variables: Any, batch: Any) -> jax.Array:
        return model.apply(variables, *batch)

    stats = pefts.calibrate(run, **arguments)
    layers = 1 if options.get("scan_layers", True) else 2
    assert (len(stats), len(probed)) == (6 * layers, 4 * layers)
    assert {len(group) for group in shared(stats, "second_moment")} == {3, 1}
    close(stats, by_itself(run, **arguments))


class Wired(nn.Module):
    """Modules a and b with one input array, used in the way that `how` says."""

    how: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wired = getattr(self, self.how)
        return sum((y.reshape(-1).sum() for y in wired(x)), start=jnp.zeros(()))

    def same(self, x: jax.Array) -> Any:
        a, b = nn.Dense(5, name="a"), nn.DenseGeneral((2, 3), use_bias=False, name="b")
        return a(x), b(inputs=x)

    def equation(self, x: jax.Array) -> Any:
        a, b = nn.Dense(5, name="a"), nn.Einsum((4, 6), "...d,df->...f", name="b")
        return a(x), b(x)

    def both_twice(self, x: jax.Array) -> Any:
        a, b = nn.Dense(4, name="a"), nn.Dense(4, name="b")
        return [f(h) for h in (x, x**2 + 1) for f in (a, b)]

    def vmapped(self, x: jax.Array) -> Any:
        experts = nn.vmap(
            Wired, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None,
            axis_size=3,
        )  # fmt: skip
        return (experts("same", name="experts")(x),)

    def copied(self, x: jax.Array) -> Any:
        return nn.Dense(5, name="a")(x), nn.Dense(5, name="b")(x * 1)

    def one_twice(self, x: jax.Array) -> Any:
        a, b = nn.Dense(4, name="a"), nn.Dense(4, name="b")
        return a(x), a(jnp.tanh(x)), b(x)

    def crossed(self, x: jax.Array) -> Any:
        a, b, h = nn.Dense(4, name="a"), nn.Dense(4, name="b"), jnp.tanh(x)
        return a(x), b(h), a(h), b(x)

    def other_axis(self, x: jax.Array) -> Any:
        a, b = nn.DenseGeneral(5, axis=-1, name="a"), nn.DenseGeneral(5, axis=1, name="b")
        return a(x), b(x)

    def other_order(self, x: jax.Array) -> Any:
        a = nn.DenseGeneral(5, axis=(1, 2), name="a")
        return a(x), nn.Einsum((4, 4, 5), "abc,cbo->ao", name="b")(x)

    def other_dtype(self, x: jax.Array) -> Any:
        a, b = nn.Dense(5, dtype=jnp.bfloat16, name="a"), nn.Dense(5, name="b")
        return a(x).astype(jnp.float32), b(x)

    def branches(self, x: jax.Array) -> Any:
        a, b = nn.Dense(5, name="a"), nn.Dense(5, name="b")
        if self.is_initializing():
            return a(x), b(x)
        return (jax.lax.cond(x.sum() > 0, lambda: a(x), lambda: b(x)),)


@pytest.mark.parametrize(
    ("how", "together"),
    [
        ("same", True),
        ("equation", True),
        ("both_twice", True),
        ("vmapped", True),
        ("copied", False),
        ("one_twice", False),
        ("crossed", False),
        ("other_axis", False),
        ("other_order", False),
        ("other_dtype", False),
        ("branches", False),
    ],
)
def test_only_sites_with_equal_inputs_are_grouped(how: str, together: bool, key: jax.Array) -> None:
    model = Wired(how)
    positive = jax.random.uniform(key, (6, 4, 4))
    batches = [positive, -2 * positive]
    params = model.init(key, positive)["params"]

    def run(variables: Any, batch: Any) -> jax.Array:
        return model.apply(variables, batch)

    axes = pefts.infer_axes(model.apply, params, positive)
    if how == "other_order":
        axes = {"a": "iio", "b": "iio"}
    options: Any = {
        "targets": "kernel",
        "axes": axes,
        "collect": ("second_moment", "sample_moment"),
    }
    stats = pefts.calibrate(run, params, batches, **options)
    close(stats, by_itself(run, params, batches, **options))
    assert (len(shared(stats, "second_moment")) == 1) == together


def test_a_model_that_hides_behind_its_own_jit_is_measured_site_by_site(key: jax.Array) -> None:
    model = Wired("same")
    x = jax.random.normal(key, (6, 4))
    params = model.init(key, x)["params"]
    jitted = jax.jit(model.apply)
    jax.eval_shape(jitted, {"params": params}, x)  # from now on it is not traced again

    def run(variables: Any, batch: Any) -> jax.Array:
        return jitted(variables, batch)

    stats = pefts.calibrate(run, params, [x], "kernel", axes={"b": "ioo"})
    assert len(shared(stats, "second_moment")) == 2
    for group in stats.values():
        np.testing.assert_allclose(group["second_moment"], x.T @ x / 6, rtol=1e-5, atol=1e-6)


class Padded(nn.Module):
    """a and b read one array, but for inputs that b wants padded."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 2), (0, 0))) if len(x) > 6 else x
        return nn.Dense(5, name="a")(x).sum() + nn.Dense(5, name="b")(padded).sum()


def test_a_group_that_another_shape_breaks_is_refused(key: jax.Array) -> None:
    model, x = Padded(), jax.random.normal(key, (6, 4))
    params = model.init(key, x)["params"]

    def run(variables: Any, batch: Any) -> jax.Array:
        return model.apply(variables, batch)

    with pytest.raises(ValueError, match="'b/kernel' and 'a/kernel' have the same input in the"):
        pefts.calibrate(run, params, [x, jnp.ones((7, 4))], "kernel")


# Moments by example


def dense_stats(x: Any, key: jax.Array, mask: Any = None, **kwargs: Any) -> Any:
    """The statistics of one kernel whose inputs are the batches themselves."""
    model = nn.Dense(3)
    batches = [{"x": jnp.asarray(part)} for part in x]
    if mask is not None:
        batches = [{**b, "mask": jnp.asarray(m)} for b, m in zip(batches, mask, strict=True)]
        kwargs["weights"] = "mask"
    params = model.init(key, batches[0]["x"])["params"]
    options = {"collect": "sample_moment", **kwargs}

    def run(variables: Any, batch: Any) -> jax.Array:
        return model.apply(variables, batch["x"])

    return pefts.calibrate(run, params, batches, "kernel", **options)["kernel"]


def exact_moment(examples: Any) -> np.ndarray:
    """Over (tokens, d_in) arrays, as the released code does, in float64."""
    total = 0
    for X in examples:
        scaled = np.asarray(X, np.float64)
        scaled = scaled / np.abs(np.max(scaled))
        total = total + scaled.T @ scaled
    return np.asarray(total) / len(examples)


def test_sample_moments_match_the_released_code(key: jax.Array) -> None:
    if not GOLDEN.exists():
        pytest.skip("../shared/golden/official/corda is not on this machine")
    golden = np.load(GOLDEN)
    calib, C = golden["calib"], golden["C"]
    for batches in (calib[None], calib[:, None]):  # one batch of three, three batches of one
        found = dense_stats(batches, key)
        np.testing.assert_allclose(found["sample_moment"], C, rtol=0, atol=2e-7 * np.abs(C).max())
        assert found["samples"] == 3 and found["count"] == 120


def test_padding_has_no_part_in_sample_moments(key: jax.Array) -> None:
    """Neither in the maximum, nor in the sum, nor, for an example of nothing else, in the count."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 7, 4)).astype(np.float32)
    lengths = np.array([[7, 3, 0], [1, 7, 5]])
    mask = np.arange(7) < lengths[:, :, None]
    examples = [x[n, b, :length] for (n, b), length in np.ndenumerate(lengths) if length]
    x[~mask] = 1e6
    x[0, 1, -1] = np.nan
    found = dense_stats(x, key, mask)
    np.testing.assert_allclose(found["sample_moment"], exact_moment(examples), rtol=1e-5)
    assert (int(found["samples"]), int(found["count"])) == (5, lengths.sum())


def test_the_maximum_is_signed_and_may_be_zero(key: jax.Array) -> None:
    rng = np.random.default_rng(1)
    x = -1 - rng.random((3, 6, 4)).astype(np.float32)
    found = dense_stats([x], key)
    np.testing.assert_allclose(found["sample_moment"], exact_moment(x), rtol=1e-5)
    mask = np.arange(6)[None] < np.array([6, 2, 5])[:, None]
    kept = [example[keep] for example, keep in zip(x, mask, strict=True)]
    padded = dense_stats([x], key, [mask])  # padding is not the zero that it is replaced by
    np.testing.assert_allclose(padded["sample_moment"], exact_moment(kept), rtol=1e-5)
    x[1, 2, 3] = 0  # no scale to divide by: this example stays as it is
    plain = x[1].astype(np.float64)
    want = (2 * exact_moment(x[[0, 2]]) + plain.T @ plain) / 3
    np.testing.assert_allclose(dense_stats([x], key)["sample_moment"], want, rtol=1e-5)
    nothing = dense_stats([np.zeros((2, 5, 4), np.float32)], key)
    np.testing.assert_array_equal(nothing["sample_moment"], np.zeros((4, 4)))


def test_inputs_without_tokens_are_examples_of_one_row(key: jax.Array) -> None:
    x = np.random.default_rng(2).standard_normal((9, 4)).astype(np.float32)
    want = exact_moment(x[:, None])
    for batches in ([x], list(x)):  # nine rows, nine inputs that are one row
        found = dense_stats(batches, key)
        np.testing.assert_allclose(found["sample_moment"], want, rtol=1e-5, atol=1e-6)
        assert found["samples"] == 9


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sample_moments_of_every_layer(dtype: Any) -> None:
    params = tiny.cast(tiny_params(), dtype)
    stats = pefts.calibrate(
        tiny_run, params, tiny_batches(), "kernel", axes=tiny_axes(params),
        collect="sample_moment", weights=lambda batch: batch[1],
    )  # fmt: skip
    seen: dict[str, list[np.ndarray]] = {}

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.Dense | nn.DenseGeneral):
            path = "/".join(context.module.path)
            x = np.asarray(args[0].astype(jnp.float32))
            for example, keep in zip(x, mask, strict=True):
                kept = example[keep] if x.ndim > 2 else example
                seen.setdefault(path, []).append(kept.reshape(-1, stats_width(path)))
        return next_fun(*args, **kwargs)

    def stats_width(path: str) -> int:
        return {"out": tiny.HEADS * tiny.HEAD_SIZE, "down": tiny.HIDDEN}.get(
            path.rpartition("/")[2], tiny.WIDTH
        )

    unrolled = tiny.unroll(params)
    for batch in tiny_batches():
        mask = np.asarray(batch[1])
        with nn.intercept_methods(note):  # not jitted: the rows must be concrete
            tiny_run({"params": unrolled}, batch)
    # bfloat16: the scanned and the unscanned model round their activations at other places
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    assert len(seen) == 6 * tiny.LAYERS + 1
    for path, examples in seen.items():
        block, _, rest = path.partition("/")
        name = f"layers/{rest}/kernel" if rest else f"{path}/kernel"
        index = int(block[-1]) if rest else ()
        want = exact_moment(examples)
        found = stats[name]["sample_moment"][index]
        np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())
        assert stats[name]["samples"][index] == len(examples)
