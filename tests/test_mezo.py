"""MeZO and its rules against the official programs, and runs made again from their scalars."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pefts import deferred
from pefts.zeroth_order import adazeta, directions, engine, estimator, mezo, seed_log, sparse_mezo
from pefts.zeroth_order.adazeta import exponent, schedule
from pefts.zeroth_order.directions import fold_in, run_key
from pefts.zeroth_order.engine import Decay, Rule
from pefts.zeroth_order.estimator import Options

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official"
PARTS = ("W", "b", "g")
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="no golden files beside the project")
pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / name / "golden.npz"))


def start(stored: dict[str, np.ndarray], prefix: str = "") -> dict[str, jax.Array]:
    return {part: jnp.asarray(stored[f"{prefix}{part}0"]) for part in PARTS}


def loss(theta: Any, X: Any, Y: Any) -> jax.Array:
    prediction = (X @ theta["W"].T + theta["b"][None]) * theta["g"][None]
    return jnp.mean(0.5 * (prediction - Y) ** 2)


def looked_up(z: dict[str, np.ndarray]) -> directions.Draw:
    """A draw that returns the stored direction, of step t and query q, of each leaf's key."""
    steps, queries = next(iter(z.values())).shape[:2]
    run = run_key(0)
    keys = [fold_in(fold_in(run, t), q) for t in range(steps) for q in range(queries)]
    tables = {part: np.stack([fold_in(key, i) for key in keys]) for i, part in enumerate(PARTS)}

    def draw(key: jax.Array, shape: tuple[int, ...], path: str) -> jax.Array:
        found = jnp.all(jnp.asarray(tables[path]) == jax.random.key_data(key)[None], axis=1)
        return jnp.asarray(z[path]).reshape(-1, *shape)[jnp.argmax(found)]

    return draw


def noise(stored: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """(T, Q, ...) by leaf."""
    z = {part: stored[f"{prefix}z{part}"] for part in PARTS}
    queries = z["b"].ndim == 3
    return z if queries else {part: array[:, None] for part, array in z.items()}


def run(tx: Any, theta: Any, stored: Any, x: Any, y: Any) -> tuple[list, list]:
    """Parameters after each update, and the numbers that it was."""
    step = jax.jit(lambda theta, state, x, y: tx.step(theta, state, lambda t: loss(t, x, y)))
    state, thetas, records = tx.init(theta), [], []
    for t in range(len(x)):
        theta, state = step(theta, state, x[t], y[t])
        thetas.append(theta)
        records.append(engine.state_of(state).last)
    return thetas, records


def check(thetas: list, stored: dict[str, np.ndarray], prefix: str, tolerance: float) -> None:
    for part in PARTS:
        ours = np.stack([theta[part] for theta in thetas])
        np.testing.assert_allclose(ours, stored[f"{prefix}{part}"], rtol=0, atol=tolerance)


# ------------------------------------------------------------------------ the official programs


@needs_golden
@pytest.mark.parametrize("decay", ["nowd", "wd"])
def test_official_trajectory(decay: str, x64: None) -> None:
    stored, prefix = golden("mezo"), f"{decay}__"
    how = Options(eps=float(stored["eps"]))
    spared = Decay(0.1, lambda path: path != "W") if decay == "wd" else None
    tx = engine.build(float(stored["lr"]), how, decay=spared, draw=looked_up(noise(stored, prefix)))
    thetas, records = run(tx, start(stored), stored, stored["X"], stored["Y"])
    check(thetas, stored, prefix, 1e-11)
    slopes = [-float(record.coefficients[0]) / float(stored["lr"]) for record in records]
    np.testing.assert_allclose(slopes, stored[f"{prefix}projected_grad"], rtol=0, atol=1e-10)


@needs_golden
@pytest.mark.parametrize(
    ("case", "sides", "rule"),
    [
        ("two_side", "two", Rule()),
        ("one_side", "one", Rule()),
        ("sign", "two", Rule(signed=True)),
        ("conserv", "two", Rule(conservative=True)),
        ("conserv_biglr", "two", Rule(conservative=True)),
        ("forward_grad", "forward", Rule()),
    ],
)
def test_official_variants(case: str, sides: str, rule: Rule, x64: None) -> None:
    stored, prefix = golden("zo_bench"), f"{case}__"
    rate, how = float(stored[f"{prefix}lr"]), Options(eps=float(stored["eps"]), sides=sides)
    tx = engine.build(rate, how, rule, draw=looked_up(noise(stored, prefix)))
    thetas, _ = run(tx, start(stored), stored, stored["X"], stored["Y"])
    check(thetas, stored, prefix, 1e-10)


@needs_golden
@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_official_moments(rule: str, x64: None) -> None:
    stored, prefix = golden("zo_bench"), f"{rule}__"
    rate = optax.scale_by_learning_rate(float(stored[f"{prefix}lr"]))
    inner = optax.trace(0.9) if rule == "momentum" else optax.scale_by_adam()
    how, draw = Options(eps=float(stored["eps"])), looked_up(noise(stored, prefix))
    tx = engine.through(optax.chain(inner, rate), how, draw)
    thetas, _ = run(tx, start(stored), stored, stored["X"], stored["Y"])
    check(thetas, stored, prefix, 1e-10)


@needs_golden
def test_official_queries(x64: None) -> None:
    """The mean over as many queries as each step makes, at one theta."""
    stored, prefix = golden("adazeta"), "traj__"
    made = stored[f"{prefix}Q"]
    tx = engine.build(
        float(stored["lr"]),
        Options(eps=float(stored["eps"]), queries=4),
        Rule(queries=lambda count: jnp.asarray(made)[count]),
        Decay(0.1, lambda path: path != "W"),
        looked_up(noise(stored, prefix)),
    )
    thetas, records = run(tx, start(stored), stored, stored["X"], stored["Y"])
    check(thetas, stored, prefix, 1e-11)
    for record, count in zip(records, made, strict=True):
        assert np.count_nonzero(record.coefficients) == count


@needs_golden
@pytest.mark.parametrize("case", range(3))
def test_official_schedule(case: int) -> None:
    stored = {k.removeprefix(f"case{case}__"): v for k, v in golden("adazeta").items()}
    epochs = float(stored["total_epochs"])
    rate = exponent(epochs, float(stored["N"]), float(stored["alpha"]))
    np.testing.assert_allclose(rate, stored["beta"], rtol=1e-12)
    ours = [
        schedule(e, rate, float(stored["alpha"]), int(stored["Q_max"]))
        for e in range(len(stored["Q"]))
    ]
    np.testing.assert_array_equal(ours, stored["Q"])


# --------------------------------------------------------------------------------- properties


def problem() -> tuple[dict, Any]:
    rng = np.random.default_rng(0)
    theta = {
        "layers": {"kernel": jnp.asarray(rng.normal(size=(3, 5, 4)), jnp.float32)},
        "norm": {"scale": jnp.ones(4)},
    }

    def value(theta: Any) -> jax.Array:
        x = jnp.ones((1, 5))
        kernels = theta["layers"]["kernel"]
        if not isinstance(kernels, jax.Array):
            kernels = kernels.array()
        return jnp.sum((x @ jnp.sum(kernels, axis=0) * theta["norm"]["scale"][None] - 1.0) ** 2)

    return theta, value


@pytest.mark.parametrize("rule", ["sgd", "sign", "conservative", "momentum", "adam", "sign_full"])
def test_update_is_step(rule: str) -> None:
    """As optax has it, and in place."""
    theta, value = problem()
    tx = mezo(1e-3, rule=rule, weight_decay=0.1)
    state = tx.init(theta)
    updates, ours = tx.update(None, state, theta, value_fn=value)
    moved, theirs = tx.step(theta, state, value)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        optax.apply_updates(theta, updates),
        moved,
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert not np.array_equal(moved["layers"]["kernel"], theta["layers"]["kernel"])


@pytest.mark.parametrize("rule", ["sgd", "sign", "conservative", "momentum", "adam", "sign_full"])
def test_every_rule_descends(rule: str) -> None:
    theta, value = problem()
    rate = {"sgd": 3e-3, "conservative": 3e-3, "momentum": 3e-4}.get(rule, 1e-2)
    tx = mezo(rate, rule=rule)
    state, before = tx.init(theta), float(value(theta))
    step = jax.jit(lambda theta, state: tx.step(theta, state, value))
    for _ in range(100):
        theta, state = step(theta, state)
    assert float(value(theta)) < 0.5 * before


def test_it_chains_with_optax() -> None:
    theta, value = problem()
    tx = optax.chain(mezo(1e-3), optax.scale(0.0))
    updates, _ = tx.update(theta, tx.init(theta), theta, value_fn=value)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))


def test_what_has_no_gradient_can_be_lowered() -> None:
    """The error rate of a linear classifier."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(200, 3)), jnp.float32)
    label = x @ jnp.asarray([[1.0], [-2.0], [0.5]]) > 0

    def errors(w: jax.Array) -> jax.Array:
        return jnp.mean((x @ w[:, None] > 0) != label)

    tx, w = mezo(1.0, eps=0.5, queries=4), jnp.asarray([-1.0, 1.0, 1.0])
    state, step = tx.init(w), jax.jit(lambda w, state: tx.step(w, state, errors))
    before = float(errors(w))
    for _ in range(100):
        w, state = step(w, state)
    assert float(errors(w)) < 0.2 < before


def test_values_that_are_not_finite_change_nothing() -> None:
    theta, _ = problem()
    for rule in ("sgd", "adam"):
        tx = mezo(0.1, rule=rule, weight_decay=0.1)
        state = tx.init(theta)
        moved, state = tx.step(theta, state, lambda theta: jnp.asarray(jnp.nan))
        jax.tree.map(np.testing.assert_array_equal, moved, theta)
        own = engine.state_of(state)
        assert (int(own.skipped), int(own.count)) == (1, 1)


def test_eight_devices_are_one() -> None:
    theta, value = problem()
    theta["layers"]["kernel"] = jnp.tile(theta["layers"]["kernel"], (1, 1, 2))
    theta["norm"]["scale"] = jnp.ones(8)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "fsdp"))
    spread = {**theta, "layers": {"kernel": jax.device_put(theta["layers"]["kernel"], place)}}
    # Short steps would magnify how the devices round their sums.
    tx = mezo(1e-3, eps=0.5, queries=2, weight_decay=0.1)
    step = jax.jit(lambda theta, state: tx.step(theta, state, value))
    ours, one = spread, theta
    state, other = tx.init(spread), tx.init(theta)
    for _ in range(3):
        ours, state = step(ours, state)
        one, other = step(one, other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, one)


def test_nothing_compiles_again() -> None:
    theta, value = problem()
    tx = adazeta(1e-3, steps=6, epoch_steps=1, max_queries=3, final_queries=4)
    step = jax.jit(lambda theta, state: tx.step(theta, state, value))
    state, counts = tx.init(theta), []
    for _ in range(6):
        theta, state = step(theta, state)
        counts.append(int(np.count_nonzero(engine.state_of(state).last.coefficients)))
    assert step._cache_size() == 1
    assert counts[0] == 1 and counts[-1] == 3 and counts == sorted(counts)


def test_a_random_mask_is_drawn_once() -> None:
    theta = {"layers": {"kernel": jnp.ones((2, 50, 40))}, "w": jnp.ones((60, 50))}

    def value(theta: Any) -> jax.Array:
        return jnp.sum(deferred.arrays(theta)["layers"]["kernel"]) + jnp.sum(theta["w"])

    tx = mezo(1e-4, sparsity=0.75)
    state, start = tx.init(theta), theta
    step, moved = jax.jit(lambda theta, state: tx.step(theta, state, value)), []
    for _ in range(3):
        theta, state = step(theta, state)
        moved.append(jax.tree.map(lambda a, b: np.asarray(a != b), theta, start))
    for leaf in ("w", "layers"):
        first, *later = (np.ravel(jax.tree.leaves(tree[leaf])[0]) for tree in moved)
        assert abs(first.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / first.size)
        assert all((first == other).all() for other in later)
    kernel = moved[0]["layers"]["kernel"]
    assert (kernel[0] != kernel[1]).any()


# ------------------------------------------------------------------------------- sparse-mezo


def test_no_sparsity_is_mezo() -> None:
    theta, value = problem()
    plain, sparse = mezo(1e-3), sparse_mezo(1e-3, sparsity=0.0)
    ours, _ = sparse.step(theta, sparse.init(theta), value)
    theirs, _ = plain.step(theta, plain.init(theta), value)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("sparsity", [0.25, 0.8])
def test_small_weights_of_each_kernel_move(sparsity: float) -> None:
    theta, value = problem()
    tx = sparse_mezo(1e-3, sparsity=sparsity)
    state, start = tx.init(theta), theta
    step = jax.jit(lambda theta, state: tx.step(theta, state, value))
    for _ in range(3):
        theta, state = step(theta, state)
    before, after = (np.asarray(tree["layers"]["kernel"]) for tree in (start, theta))
    for layer in range(3):
        size = np.abs(before[layer])
        moved = before[layer] != after[layer]
        assert moved.sum() == round((1 - sparsity) * size.size)
        assert size[moved].max() <= size[~moved].min()


def test_the_mask_is_that_of_theta_unperturbed() -> None:
    """An entry at the threshold is perturbed to both sides, though one of them is above it."""
    theta = {"w": jnp.asarray([1.0, -2.0, 3.0, 4.0])}
    seen = []

    def value(theta: Any) -> jax.Array:
        seen.append(theta["w"])
        return jnp.sum(theta["w"])

    tx = sparse_mezo(0.0, sparsity=0.5, eps=0.5)
    with jax.disable_jit():
        tx.step(theta, tx.init(theta), value)
    plus, minus = seen
    np.testing.assert_allclose(plus[:2] + minus[:2], 2 * theta["w"][:2], rtol=1e-6)
    np.testing.assert_array_equal(plus[2:], theta["w"][2:])
    assert np.all(plus[:2] != theta["w"][:2])


def test_the_estimate_scales_with_what_moves() -> None:
    """E||g m z||^2 = (n + 2) ||m grad||^2, n the number of entries that take part."""
    theta = jnp.arange(1.0, 9.0)
    about = jnp.asarray(4.0)
    direction = directions.Direction(mask=lambda value, limit: jnp.abs(value) <= limit, about=about)

    def length(n: jax.Array) -> jax.Array:
        key = fold_in(run_key(0), n)
        found = estimator.estimate(jnp.sum, theta, key, Options(eps=0.1), direction)
        return jnp.sum(directions.total(theta, found.keys, found.slopes, direction) ** 2)

    lengths = np.asarray(jax.vmap(length)(jnp.arange(20_000)), np.float64)
    spread = lengths.std() / np.sqrt(len(lengths))
    assert abs(lengths.mean() - (4 + 2) * 4) < 4.5 * spread


# -------------------------------------------------------------------------------- the log


@pytest.fixture(scope="module")
def logged() -> Any:
    theta, value = problem()
    tx = mezo(1e-3, queries=2, weight_decay=0.1)
    state, start = tx.init(theta), theta
    step = jax.jit(lambda theta, state: tx.step(theta, state, value))
    thetas, records = [], []
    for _ in range(6):
        theta, state = step(theta, state)
        thetas.append(theta)
        records.append(state.last)
    log = seed_log.extended(seed_log.empty(start, state), records[:4])
    return tx, start, thetas, seed_log.extended(log, records[4:])


def test_a_log_makes_the_run_again(logged: Any) -> None:
    tx, start, thetas, log = logged
    for steps in (0, 3, None):
        made = seed_log.replay(tx, start, log, steps)
        expected = start if steps == 0 else thetas[(steps or 6) - 1]
        jax.tree.map(np.testing.assert_array_equal, made, expected)


def test_a_log_replays_on_another_mesh(logged: Any) -> None:
    tx, start, thetas, log = logged
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=auto, devices=jax.devices()[:4])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "fsdp"))
    spread = {**start, "layers": {"kernel": jax.device_put(start["layers"]["kernel"], place)}}
    made = seed_log.replay(tx, spread, log)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), made, thetas[-1])


def test_a_log_is_a_small_file(logged: Any, tmp_path: Path) -> None:
    tx, start, thetas, log = logged
    file = tmp_path / "seeds.safetensors"
    seed_log.write(file, log)
    again = seed_log.read(file)
    assert again.paths == ("layers/kernel", "norm/scale")
    jax.tree.map(np.testing.assert_array_equal, again[2:], log[2:])
    made = seed_log.replay(tx, start, again)
    jax.tree.map(np.testing.assert_array_equal, made, thetas[-1])
    assert file.stat().st_size < 2000


def test_logs_of_other_runs_are_refused(logged: Any, tmp_path: Path) -> None:
    tx, start, _, log = logged
    with pytest.raises(ValueError, match=r"moved 2 leaves, and these parameters have 1; 'norm/sc"):
        seed_log.replay(tx, {"layers": start["layers"]}, log)
    with pytest.raises(ValueError, match=r"'norm/scale' has shape 5 here and 4 in the log"):
        seed_log.replay(tx, {**start, "norm": {"scale": jnp.ones(5)}}, log)
    with pytest.raises(ValueError, match="another seed"):
        seed_log.replay(mezo(1e-3, queries=2, seed=1), start, log)
    with pytest.raises(ValueError, match="steps=7: the log has 6 updates"):
        seed_log.replay(tx, start, log, 7)
    with pytest.raises(ValueError, match="keeps moments"):
        seed_log.replay(mezo(1e-3, rule="adam"), start, log)
    file = tmp_path / "seeds.safetensors"
    seed_log.write(file, log)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        seed_log.read(file)
    with pytest.raises(ValueError, match="does not exist"):
        seed_log.read(tmp_path / "nothing")


def test_a_log_of_other_noise_is_refused(logged: Any, tmp_path: Path) -> None:
    file = tmp_path / "seeds.safetensors"
    seed_log.write(file, logged[3])
    with jax.threefry_partitionable(False):
        with pytest.raises(ValueError, match="jax_threefry_partitionable=True"):
            seed_log.read(file)


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mezo(0.1, rule="adamw"), "rule='adamw' is unknown"),
        (lambda: mezo(0.1, rule="conservative", queries=2), "one direction; queries=2"),
        (lambda: mezo(0.1, weight_decay=-1.0), r"weight_decay=-1\.0"),
        (lambda: mezo(0.1, eps=0), "eps=0"),
        (lambda: mezo(0.1, sparsity=-0.1), r"sparsity=-0\.1"),
        (lambda: mezo(0.1, sparsity=0.5, rule="adam"), "has no part in rule='adam'"),
        (lambda: sparse_mezo(0.1, sparsity=1.0), r"sparsity=1\.0"),
        (lambda: adazeta(0.1, steps=4, epoch_steps=4), "the run has 1 epochs"),
        (lambda: adazeta(0.1, steps=4, epoch_steps=1, growth=0.0), r"growth=0\.0"),
        (lambda: adazeta(0.1, steps=4, epoch_steps=0), "epoch_steps=0"),
        (lambda: adazeta(0.1, steps=4, epoch_steps=1, queries=3), "follow AdaZeta's schedule"),
        (lambda: mezo(0.1).init({"ids": jnp.arange(3)}), "no floating leaf"),
        (
            lambda: mezo(0.1).update(None, mezo(0.1).init(jnp.ones(2)), value_fn=jnp.sum),
            "made from the parameters",
        ),
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
