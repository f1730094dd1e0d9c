"""pefts.calibrate against a float64 oracle over the inputs that an unscanned model's layers saw."""

import functools
import re
from typing import Any, Unpack

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import pefts
from pefts.bound import Rule
from pefts.core import Declaration, Traits, factory
from pefts.targets import Select, selection

SCANNED = tiny.Classifier()
KERNELS = ("attention/query", "attention/key", "attention/value", "attention/out", "up", "down")


def forward(variables: Any, batch: Any, model: nn.Module = SCANNED) -> jax.Array:
    return model.apply(variables, batch["tokens"], batch["mask"])


def make_batches(count: int = 3) -> list[dict[str, jax.Array]]:
    pairs = [tiny.inputs(seed) for seed in range(count)]
    return [{"tokens": tokens, "mask": mask} for tokens, mask in pairs]


@functools.cache
def model_params() -> Any:
    return tiny.parameters()


def axes_of(params: Any) -> dict[str, str]:
    return pefts.infer_axes(SCANNED.apply, params, *tiny.inputs())


def seen_inputs(params: Any, batches: list[Any]) -> dict[str, np.ndarray]:
    """{module path: every unmasked row that the unscanned model's linear modules saw}, float64."""
    rows: dict[str, list[np.ndarray]] = {}

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.Dense | nn.DenseGeneral):
            x = np.asarray(args[0].astype(jnp.float32), np.float64)
            if x.shape[:2] == keep.shape:
                x = x[keep].reshape(keep.sum(), -1)
            rows.setdefault("/".join(context.module.path), []).append(x)
        return next_fun(*args, **kwargs)

    for batch in batches:
        keep = np.asarray(batch["mask"])
        with nn.intercept_methods(note):  # not jitted: the rows must be concrete
            forward({"params": tiny.unroll(params)}, batch, tiny.Classifier(scanned=False))
    return {path: np.concatenate(parts) for path, parts in rows.items()}


def calibrated(params: Any, batches: list[Any], **kwargs: Any) -> Any:
    options = {"targets": "kernel", "axes": axes_of(params), "weights": "mask", **kwargs}
    return pefts.calibrate(forward, params, batches, **options)


def slices(stats: Any, name: str) -> Any:
    """The scanned model's statistics by the unscanned model's module paths."""
    found = {"classifier": stats["classifier/kernel"][name]}
    for kernel in KERNELS:
        stacked = stats[f"layers/{kernel}/kernel"][name]
        assert stacked.shape[0] == tiny.LAYERS
        found |= {f"layers_{n}/{kernel}": stacked[n] for n in range(tiny.LAYERS)}
    return found


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_second_moments_are_those_of_the_rows_each_layer_saw(dtype: Any) -> None:
    params, batches = tiny.cast(model_params(), dtype), make_batches()
    stats = calibrated(params, batches)
    rows = seen_inputs(params, batches)
    # bfloat16: the scanned and the unscanned model round their activations at other places
    tolerance = 2e-6 if dtype == jnp.float32 else 2e-2
    for path, moment in slices(stats, "second_moment").items():
        x = rows[path]
        assert moment.dtype == jnp.float32
        np.testing.assert_allclose(
            moment, x.T @ x / len(x), rtol=0, atol=tolerance * (x**2).mean(0).max()
        )
        mean, count = slices(stats, "mean")[path], slices(stats, "count")[path]
        np.testing.assert_allclose(mean, x.mean(0), rtol=0, atol=tolerance * np.abs(x).max())
        assert count == len(x)


def test_scanned_and_unscanned_agree() -> None:
    params, batches = model_params(), make_batches()
    model, unrolled = tiny.Classifier(scanned=False), tiny.unroll(params)
    single = pefts.calibrate(
        lambda variables, batch: forward(variables, batch, model),
        unrolled,
        batches,
        "kernel",
        axes=pefts.infer_axes(model.apply, unrolled, *tiny.inputs()),
        collect=("second_moment", "pca"),
        components=2,
        weights=lambda batch: batch["mask"],
    )
    stats = calibrated(params, batches, collect=("second_moment", "pca"), components=2)
    for name in ("second_moment", "mean", "count", "explained_variance"):
        for path, value in slices(stats, name).items():
            np.testing.assert_allclose(value, single[f"{path}/kernel"][name], rtol=2e-4, atol=2e-5)


def mean_loss(outputs: jax.Array, batch: Any) -> jax.Array:
    del batch
    return jnp.mean(jnp.square(outputs.astype(jnp.float32) - 1))


def test_gradient_is_the_mean_over_batches_of_the_kernels_gradient() -> None:
    params, batches = model_params(), make_batches()
    stats = calibrated(params, batches, collect="gradient", loss=mean_loss, weights=None)
    both = calibrated(params, batches, collect=("gradient", "second_moment"), loss=mean_loss)
    grads = [
        jax.grad(lambda p, batch=batch: mean_loss(forward({"params": p}, batch), batch))(params)
        for batch in batches
    ]
    flat = [pefts.paths.flatten(grad) for grad in grads]
    assert set(stats) == {f"layers/{k}/kernel" for k in KERNELS} | {"classifier/kernel"}
    for path, found in stats.items():
        want = np.mean([grad[path] for grad in flat], axis=0, dtype=np.float64)
        want = want.reshape(found["gradient"].shape)
        np.testing.assert_allclose(found["gradient"], want, rtol=1e-4, atol=1e-7)
        assert set(found) == {"gradient"}
        np.testing.assert_allclose(both[path]["gradient"], want, rtol=1e-4, atol=1e-7)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(7, 4, name="embed")(ids)
        return nn.Dense(5, name="dense")(nn.gelu(nn.Conv(6, (3,), name="conv")(x)))


def test_gradient_alone_serves_convolutions_and_embeddings(key: jax.Array) -> None:
    ids, model = jnp.arange(10).reshape(2, 5) % 7, ConvNet()
    params = model.init(key, ids)["params"]

    def run(variables: Any, batch: Any) -> jax.Array:
        return model.apply(variables, batch)

    stats = pefts.calibrate(
        run, params, [ids], r"kernel|embedding", axes={"conv": "kio"}, collect="gradient",
        loss=mean_loss,
    )  # fmt: skip
    grad = jax.grad(lambda p: mean_loss(run({"params": p}, ids), ids))(params)
    for path, want in pefts.paths.flatten(grad).items():
        if not path.endswith("bias"):
            found = stats[path]["gradient"]
            np.testing.assert_allclose(found, want.reshape(found.shape), rtol=1e-4, atol=1e-7)
    for targets, kind in (("conv/kernel", "convolution"), ("embedding", "embedding")):
        with pytest.raises(ValueError, match=rf"not defined for '\w+/\w+', an? {kind}"):
            pefts.calibrate(run, params, [ids], targets, axes={"conv": "kio"})


def low_rank_rows(count: int, width: int, rank: int) -> np.ndarray:
    """Rows off the origin in a flat of the given dimension, with well separated variances."""
    rng = np.random.default_rng(0)
    scales = 1.5 ** -np.arange(rank)
    rows = rng.standard_normal((count, rank)) * scales @ rng.standard_normal((rank, width))
    return (rows + rng.standard_normal(width)).astype(np.float32)


def exact_components(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(0)
    _, singular, vectors = np.linalg.svd(centred, full_matrices=False)
    return vectors, singular**2 / (len(rows) - 1), (centred**2).sum() / (len(rows) - 1)


@pytest.mark.parametrize(
    ("width", "rank", "components", "sizes"),
    [
        (9, 9, 9, (20, 33, 4)),  # every direction kept
        (9, 9, 9, (4, 4, 30)),  # batches with fewer rows than components
        (48, 3, 3, (40, 40, 17)),  # low-rank data: the randomised SVD
        (48, 5, 8, (40, 40, 17)),  # more components than directions
    ],
)
def test_components_are_those_of_all_rows_at_once(
    key: jax.Array, width: int, rank: int, components: int, sizes: tuple[int, ...]
) -> None:
    rows = low_rank_rows(sum(sizes), width, rank)
    batches = np.split(rows, np.cumsum(sizes)[:-1])
    model = nn.Dense(5)
    params = model.init(key, rows)["params"]
    stats = pefts.calibrate(
        lambda variables, x: model.apply(variables, x), params, batches, "kernel",
        collect="pca", components=components,
    )["kernel"]  # fmt: skip
    vectors, variances, total = exact_components(rows)
    found = np.asarray(stats["components"], np.float64)
    kept = min(rank, components)
    np.testing.assert_allclose(found @ found.T, np.eye(components), atol=2e-6)
    projector = vectors[:kept].T @ vectors[:kept]
    np.testing.assert_allclose(found[:kept].T @ found[:kept], projector, atol=2e-4)
    np.testing.assert_allclose(np.abs((found[:kept] * vectors[:kept]).sum(1)), 1, atol=2e-5)
    np.testing.assert_allclose(stats["explained_variance"][:kept], variances[:kept], rtol=2e-5)
    np.testing.assert_allclose(
        stats["explained_variance_ratio"][:kept], variances[:kept] / total, rtol=2e-5
    )
    np.testing.assert_allclose(stats["mean"], rows.mean(0, dtype=np.float64), rtol=1e-5, atol=1e-6)
    assert stats["count"] == len(rows)
    assert (np.take_along_axis(found, np.abs(found).argmax(1)[:, None], axis=1) > 0).all()


def test_few_components_of_full_rank_data_come_close(key: jax.Array) -> None:
    """What earlier batches dropped is lost: the variance found is slightly below the exact one."""
    rng = np.random.default_rng(1)
    rows = (rng.standard_normal((256, 40)) * 0.8 ** np.arange(40)).astype(np.float32)
    model = nn.Dense(5)
    params = model.init(key, rows)["params"]
    found = pefts.calibrate(
        lambda variables, x: model.apply(variables, x), params, np.split(rows, 4), "kernel",
        collect="pca", components=6,
    )["kernel"]  # fmt: skip
    _, variances, _ = exact_components(rows)
    ratio = np.asarray(found["explained_variance"]) / variances[:6]
    assert ratio.max() < 1 + 1e-5 and ratio.min() > 0.95


def test_components_of_a_scanned_model_ignore_padding() -> None:
    params, batches = model_params(), make_batches()
    stats = calibrated(params, batches, collect="pca", components=3, targets="layers.*kernel")
    rows = seen_inputs(params, batches)
    for n in range(tiny.LAYERS):
        want = exact_components(rows[f"layers_{n}/up"])
        ratio = stats["layers/up/kernel"]["explained_variance"][n] / want[1][:3]
        assert float(ratio.max()) < 1 + 1e-5 and float(ratio.min()) > 0.9
        assert stats["layers/up/kernel"]["count"][n] == len(rows[f"layers_{n}/up"])
    full = calibrated(params, batches, collect="pca", components=12, targets="layers/up")
    for n in range(tiny.LAYERS):
        want = exact_components(rows[f"layers_{n}/up"])[1]
        found = full["layers/up/kernel"]["explained_variance"][n]
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5 * want[0])


EVERYTHING: Any = {
    "collect": ("second_moment", "sample_moment", "gradient", "pca"),
    "components": 3,
    "loss": mean_loss,
}


def test_eight_devices_give_what_one_gives() -> None:
    params, batches = model_params(), make_batches()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = [jax.device_put(b, NamedSharding(mesh, PartitionSpec("data"))) for b in batches]
    one, eight = (calibrated(params, given, **EVERYTHING) for given in (batches, spread))
    for path, group in one.items():
        for name, value in group.items():
            scale = float(jnp.abs(value).max())
            # a direction turns by the rounding error over the gap to the next variance
            allowed = 1e-3 if name in ("components", "cosine") else 1e-5 * scale
            np.testing.assert_allclose(eight[path][name], value, rtol=1e-5, atol=allowed)


def test_two_calls_give_the_same_bits() -> None:
    one, two = (calibrated(model_params(), make_batches(), **EVERYTHING) for _ in range(2))
    for path, group in one.items():
        for name, value in group.items():
            np.testing.assert_array_equal(two[path][name], value, err_msg=f"{path} {name}")


def test_nothing_of_a_batch_is_kept() -> None:
    """The bytes that are alive when the next batch is asked for, batches included."""
    params, alive = model_params(), []

    def stream() -> Any:
        for seed in range(6):
            alive.append(sum(array.nbytes for array in jax.live_arrays()))
            yield make_batches(seed + 1)[seed]

    calibrated(params, stream(), **EVERYTHING)
    assert len(set(alive[2:])) == 1


def test_the_cosine_says_whether_a_further_batch_changed_anything(key: jax.Array) -> None:
    model, rows = nn.Dense(3), low_rank_rows(40, 6, 6)
    params = model.init(key, rows)["params"]

    def cosine(*batches: np.ndarray) -> Any:
        return pefts.calibrate(
            lambda variables, x: model.apply(variables, x), params, batches, "kernel",
            collect="pca", components=2,
        )["kernel"]["cosine"]  # fmt: skip

    np.testing.assert_array_equal(cosine(rows), [0, 0])
    np.testing.assert_allclose(cosine(rows, rows), [1, 1], atol=1e-5)
    turned = np.roll(rows, 1, axis=1)
    before, after = (exact_components(x)[0][:2] for x in (rows, np.concatenate([rows, 3 * turned])))
    want = np.abs((before * after).sum(1))
    assert want.max() < 0.99
    np.testing.assert_allclose(cosine(rows, 3 * turned), want, atol=0.05)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.Dense(x.shape[-1], name="layer")
        return layer(layer(x))


def test_a_module_called_twice_adds_both_calls(key: jax.Array) -> None:
    x = jax.random.normal(key, (7, 4))
    params = Twice().init(key, x)["params"]

    def run(variables: Any, batch: Any) -> jax.Array:
        return Twice().apply(variables, batch)

    stats = pefts.calibrate(run, params, [x], "kernel")["layer/kernel"]
    first = np.asarray(x, np.float64)
    second = first @ np.asarray(params["layer"]["kernel"], np.float64)
    both = np.concatenate([first, second])
    np.testing.assert_allclose(stats["second_moment"], both.T @ both / 14, rtol=1e-5, atol=1e-6)
    assert stats["count"] == 14
    with pytest.raises(ValueError, match="'layer/kernel' runs more often"):
        pefts.calibrate(run, params, [x], "kernel", collect="pca", components=2)


def test_batches_of_one_shape_share_one_trace(key: jax.Array) -> None:
    model, traces = nn.Dense(3), []
    params = model.init(key, jnp.ones((2, 4)))["params"]

    def run(variables: Any, batch: Any) -> jax.Array:
        traces.append(batch.shape)
        return model.apply(variables, batch)

    pefts.calibrate(run, params, (jnp.ones((n, 4)) for n in (2, 5, 2, 5, 2)), "kernel")
    # once more for the first batch, abstractly, to see which sites share their input
    assert sorted(traces) == [(2, 4), (2, 4), (5, 4)]


def test_a_branch_that_does_not_run_keeps_what_was_found(key: jax.Array) -> None:
    model = nn.Dense(3)
    rows = jnp.asarray(low_rank_rows(30, 4, 4))
    params = model.init(key, rows)["params"]

    def run(variables: Any, batch: Any) -> jax.Array:
        on, x = batch
        return jax.lax.cond(on, lambda y: model.apply(variables, y), lambda y: y[:, :3], x)

    batches = [(jnp.bool_(on), rows + shift) for on, shift in ((True, 0.0), (False, 9.0))]
    options: Any = {"collect": ("pca", "second_moment"), "components": 4}
    stats = pefts.calibrate(run, params, batches, "kernel", **options)["kernel"]
    alone = pefts.calibrate(run, params, batches[:1], "kernel", **options)["kernel"]
    for name, value in alone.items():
        np.testing.assert_allclose(stats[name], value, rtol=1e-6, err_msg=name)


# Errors


def test_padding_may_hold_anything_and_rows_may_not(key: jax.Array) -> None:
    model, x = nn.Dense(3), jax.random.normal(key, (2, 5, 4))
    params = model.init(key, x)["params"]
    mask = jnp.ones((2, 5)).at[1, 3:].set(0)
    broken = x.at[1, 4, 2].set(jnp.nan)

    def run(variables: Any, batch: Any) -> jax.Array:
        return model.apply(variables, batch["x"])

    def collect(x: jax.Array, **kwargs: Any) -> Any:
        return pefts.calibrate(run, params, [{"x": x, "mask": mask}], "kernel", **kwargs)["kernel"]

    clean, padded = collect(x, weights="mask"), collect(broken, weights="mask")
    np.testing.assert_array_equal(clean["second_moment"], padded["second_moment"])
    with pytest.raises(ValueError, match="inputs of 'kernel' became NaN"):
        collect(broken)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batches": []}, "batches is empty"),
        ({"targets": "querry"}, "Near names: .*query"),
        ({"collect": ("moments",)}, "collect=('moments',)"),
        ({"collect": ()}, "collect=()"),
        ({"collect": "gradient", "weights": None}, "'gradient' and loss"),
        ({"loss": mean_loss}, "'gradient' and loss"),
        ({"collect": "gradient", "loss": mean_loss}, "weights do not reach a gradient"),
        ({"components": 3}, "'pca' and a number"),
        ({"collect": "pca"}, "'pca' and a number"),
        ({"collect": "pca", "components": 13}, "components=13 is out of range"),
        ({"collect": "pca", "components": 0}, "components=0 is out of range"),
        ({"weights": "masks"}, "weights='masks' names no entry"),
        ({"weights": lambda batch: batch["mask"].T}, "weights of shape (6, 8) do not fit"),
        ({"weights": lambda batch: batch["mask"] & False}, "there is only padding"),
        ({"targets": "classifier", "collect": "pca", "components": 12}, "more than the 8 rows"),
    ],
)
def test_bad_arguments_say_so(kwargs: dict[str, Any], message: str) -> None:
    given = {"batches": make_batches(1), **kwargs}
    batches = given.pop("batches")
    with pytest.raises(ValueError, match=re.escape(message) if "Near" not in message else message):
        calibrated(model_params(), batches, **given)


def test_a_site_that_no_output_depends_on_is_an_error(key: jax.Array) -> None:
    model, x = nn.Dense(3), jnp.ones((2, 4))
    params = {"used": model.init(key, x)["params"], "cut": model.init(key, x)["params"]}

    def run(variables: Any, batch: Any) -> jax.Array:
        y = model.apply({"params": variables["params"]["used"]}, batch)
        if "both" in modes:
            cut = model.apply({"params": variables["params"]["cut"]}, batch)
            y = y + jax.lax.stop_gradient(cut)
        return y.astype(jnp.int32) if "integer" in modes else y

    modes = {"both"}
    with pytest.raises(ValueError, match="'cut/kernel' saw no input that counts.*stop_gradient"):
        pefts.calibrate(run, params, [x], "kernel")
    modes = set()
    with pytest.raises(ValueError, match="never read.*'cut/kernel'"):
        pefts.calibrate(run, params, [x], "kernel")
    modes = {"both", "integer"}
    with pytest.raises(ValueError, match="no floating-point output"):
        pefts.calibrate(run, params, [x], "kernel")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kernel: kernel[:, 1:], "has shape (11, 20)"),
        (lambda kernel: kernel[..., 1:], "has shape (12, 19)"),
        (None, "Could not find parameter"),
    ],
)
@pytest.mark.parametrize("targets", ["attention", "kernel"])
def test_parameters_of_another_model_are_refused(change: Any, message: str, targets: str) -> None:
    flat = pefts.paths.flatten(model_params())
    kernel = flat.pop("layers/up/kernel")
    if change is not None:
        flat["layers/up/kernel"] = change(kernel)
    params = pefts.paths.unflatten(flat)
    message = f"at 'layers/up': .*{re.escape(message)}.* Pass the parameters that belong to this"
    with pytest.raises(ValueError, match=message):
        pefts.calibrate(forward, params, make_batches(1), targets, axes=axes_of(model_params()))


def test_parameters_of_another_nnx_model_are_refused() -> None:
    graphdef, params, rest = pefts.nnx.split(nnx.Linear(5, 3, rngs=nnx.Rngs(0)))

    def run(variables: Any, batch: Any) -> jax.Array:
        return pefts.nnx.apply(graphdef)(variables["params"], rest, batch)

    other = {**params, "kernel": params["kernel"][1:]}
    with pytest.raises(
        ValueError, match="'kernel' has 4 rows in these params.*gives it 5 features"
    ):
        pefts.calibrate(run, other, [jnp.ones((2, 5))], "kernel", adapted=True)


# A method that starts from the statistics


@factory
def principal_lora(rank: int = 2, **select: Unpack[Select]) -> Declaration:
    """LoRA whose A starts from the principal directions of the inputs."""

    def start(key: Any, W: Any, *, site: Any, stats: Any) -> tuple[dict, dict]:
        A = stats["components"][: site.rank].T
        return {"A": A, "B": jnp.zeros((site.rank, site.d_out))}, {"mean": stats["mean"]}

    def effective(W: Any, p: Any, call: Any) -> Any:
        return W + (p["A"] @ p["B"]).astype(W.dtype)

    return Declaration(
        Rule(start, effective),
        selection(**select),
        Traits(needs=("pca",), components=rank),
        rank=rank,
    )


def test_statistics_reach_a_methods_init_slice_by_slice(key: jax.Array) -> None:
    params, batches = model_params(), make_batches()
    axes = axes_of(params)
    peft = principal_lora(rank=2, targets="layers.*kernel", axes=axes)
    with pytest.raises(ValueError, match="initialises from the statistic 'pca'.*calibrate"):
        peft.init(key, params)
    stats = pefts.calibrate(forward, params, batches, peft, weights="mask")
    state = peft.init(key, params, stats)
    for path, group in stats.items():
        want = jnp.swapaxes(group["components"], 1, 2)
        np.testing.assert_array_equal(state.trainable[path]["A"], want)
        np.testing.assert_array_equal(state.frozen[path]["mean"], group["mean"])
    bound = peft.bind(params, pefts.randomize(key, state))
    merged = peft.merge(params, pefts.randomize(key, state))
    factored = pefts.apply(forward)({"params": bound}, batches[0])
    dense = forward({"params": merged}, batches[0])
    np.testing.assert_allclose(factored, dense, rtol=1e-5, atol=1e-5)
