"""FedKSeed against the authors' numbers, its own local walks, and real processes."""

import doctest
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from benchmarks import fedkseed as demonstration
from pefts import deferred, io
from pefts.zeroth_order import directions
from pefts.zeroth_order import fedkseed as fed
from pefts.zeroth_order.fedkseed import Client, FedKSeed, History, Report, fedkseed

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "../shared/golden/official/fedkseed/golden.npz"
K, TAU = 6, 5
DEFAULTS = {"seeds": K, "local_steps": TAU, "participation": 1.0}


def setup_of(**changes: Any) -> FedKSeed:
    return fedkseed(0.05, **{**DEFAULTS, **changes})


def quadratic(theta: Any, batch: jax.Array) -> jax.Array:
    """Of every leaf, with stacked layers one after the other as in a model."""

    def layer(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
        return total + jnp.sum(jnp.square(deferred.arrays(part)["kernel"] - 1)), None

    stacked, _ = jax.lax.scan(layer, jnp.float32(0), theta["layers"])
    return (stacked + jnp.sum(jnp.square(theta["w"] - batch))) / 10


def params() -> dict[str, Any]:
    return {
        "count": jnp.arange(3),
        "layers": {"kernel": jnp.linspace(-1.0, 1.0, 24).reshape(3, 2, 4)},
        "w": jnp.linspace(0.0, 1.0, 4),
    }


def batches(number: int = 0) -> list[jax.Array]:
    return [jnp.full(4, float(number + step)) for step in range(TAU)]


def history(indices: list[int], slopes: list[float], skipped: int = 0) -> History:
    return History(np.asarray(indices, np.int32), np.asarray(slopes, np.float32), skipped)


def one_client(setup: FedKSeed, theta: Any) -> tuple[fed.LocalRun, Any]:
    """A client's walk, and what the server makes of it."""
    run = fed.client_update(setup, quadratic, theta, batches(), fed.choose_seeds(setup, 0, 0))
    state = fed.aggregate(setup, fed.start(setup), [run.history])
    return run, fed.rebuild(setup, theta, state.accumulator)


def z(setup: FedKSeed, theta: Any, index: int) -> Any:
    one = jnp.ones((1,), jnp.result_type(float))
    return directions.total(theta, fed.key_of(setup, index)[None], one)


def close(actual: Any, expected: Any, atol: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), actual, expected)


def same(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture
def golden(x64: None) -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("the authors' numbers are not on this machine")
    return dict(np.load(GOLDEN))


def given_noise(setup: FedKSeed, theta: Any, noise: dict[str, np.ndarray]) -> FedKSeed:
    """The setup with noise[path][j] in the place of z_j."""
    index = {leaf.path: leaf.index for leaf in directions.leaves_of(theta)}
    keys = [fed.key_of(setup, j) for j in range(setup.seeds)]

    def draw(key: jax.Array, shape: tuple[int, ...], path: str) -> jax.Array:
        known = jnp.stack([directions.fold_in(own, index[path]) for own in keys])
        is_j = jnp.all(known == jax.random.key_data(key)[None], axis=-1)
        return jnp.asarray(noise[path])[jnp.argmax(is_j)]

    return setup._replace(draw=draw)


def mean_square(theta: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x_BxI, y_BxO = batch
    p_BxO = x_BxI @ theta["kernel"] + theta["bias"][None]
    return jnp.mean(0.5 * (p_BxO - y_BxO) ** 2)


@pytest.mark.parametrize("run", ["plain", "pro"])
def test_the_authors_code(run: str, golden: dict[str, np.ndarray]) -> None:
    prefix = "pro__" if run == "pro" else ""
    expected = {name.removeprefix(prefix): golden[name] for name in golden if prefix in name}
    theta = {"kernel": jnp.asarray(golden["W0"].T), "bias": jnp.asarray(golden["b0"])}
    setup = fedkseed(
        float(golden["lr"]),
        seeds=int(golden["K"]),
        local_steps=int(golden["tau"]),
        eps=float(golden["eps"]),
        pro=run == "pro",
    )
    noise = {"kernel": golden["zW"].swapaxes(1, 2), "bias": golden["zb"]}
    setup, state = given_noise(setup, theta, noise), fed.start(setup)
    for turn in range(int(golden["n_rounds"])):
        model, histories = fed.rebuild(setup, theta, state.accumulator), []
        for client in range(2):
            at = turn, client
            data = zip(golden["X"][at], golden["Y"][at], strict=True)
            indices = expected["seed_index"][at]
            local = fed.client_update(setup, mean_square, model, data, indices)
            close(local.history.slopes, expected["projected_grad"][at], 1e-10)
            close(local.theta["kernel"].T, expected["local_W"][at][-1], 1e-10)
            close(local.accumulator, expected["client_accumulators"][at], 1e-10)
            histories.append(local.history)
        state = fed.aggregate(setup, state, histories, golden["client_data_sizes"].tolist())
        close(state.accumulator, expected["server_accumulator"][turn], 1e-10)
        model = fed.rebuild(setup, theta, state.accumulator)
        close(model["kernel"].T, expected["global_W"][turn], 1e-10)
        close(model["bias"], expected["global_b"][turn], 1e-10)
        if run == "pro":
            close(fed.probabilities(state), expected["probabilities"][turn], 1e-10)


def test_the_model_is_rebuilt_as_the_only_client_left_it() -> None:
    theta = params()
    run, rebuilt = one_client(setup_of(), theta)
    close(rebuilt, run.theta, 2e-6)
    same(theta, params())
    same(rebuilt["count"], theta["count"])
    moved = np.abs(rebuilt["layers"]["kernel"] - theta["layers"]["kernel"])
    assert moved.min() > 0 and np.abs(rebuilt["w"] - theta["w"]).min() > 0
    assert moved.max() > 1e-2


def test_a_model_of_low_precision_is_summed_in_float32() -> None:
    theta = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params()["layers"])
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), theta)
    a = np.random.default_rng(0).standard_normal(K)
    low = fed.rebuild(setup_of(), theta, a)
    high = fed.rebuild(setup_of(), wide, a)
    assert low["kernel"].dtype == jnp.bfloat16
    same(low, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), high))


def test_the_model_is_theta_0_and_a_sum_over_all_seeds_in_any_order() -> None:
    """Float64 from here on: theta_0 - eta sum_j a_j z_j; two seeds were never drawn."""
    setup, theta = setup_of(), params()
    a = np.array([0.7, 0.0, -1.5, 0.3, 0.0, 2.0])
    floating = {name: theta[name] for name in ("layers", "w")}
    noise = [z(setup, floating, j) for j in range(K)]
    expected = jax.tree.map(
        lambda leaf, *zs: np.float64(leaf) - 0.05 * np.tensordot(a, np.asarray(zs, np.float64), 1),
        floating,
        *noise,
    )
    close(fed.rebuild(setup, floating, a), expected, 1e-6)
    same(fed.rebuild(setup, theta, np.zeros(K)), theta)

    order = [3, 0, 5, 1, 4, 2]
    keys = jnp.stack([fed.key_of(setup, j) for j in order])
    permuted = directions.move(floating, keys, jnp.asarray(-0.05 * a[order], jnp.float32))
    close(fed.rebuild(setup, floating, a), permuted, 1e-6)


def test_a_slope_is_a_central_difference() -> None:
    setup, theta = setup_of(seeds=1, local_steps=1, eps=0.5), {"w": jnp.zeros(())}
    run = fed.client_update(setup, lambda tree, _: tree["w"] ** 3, theta, [0.0], [0])
    close(run.history.slopes, 0.25 * np.asarray(z(setup, theta, 0)["w"]) ** 3, 1e-6)


def test_one_seed_is_one_line() -> None:
    setup, theta = setup_of(seeds=1), params()
    run, rebuilt = one_client(setup, theta)
    line = z(setup, theta, 0)
    for model in (run.theta, rebuilt):
        way = (model["w"] - theta["w"]) / line["w"]
        assert abs(way[0]) > 1e-3
        close(way, np.full(4, way[0]), 1e-5)
        layers = model["layers"]["kernel"] - theta["layers"]["kernel"]
        close(layers, way[0] * line["layers"]["kernel"], 1e-5)


def test_a_step_without_a_finite_value_moves_nothing() -> None:
    """Nor does it enter the histories, and the others are as if it had not been."""
    setup, theta, indices = setup_of(), params(), np.array([2, 0, 4, 0, 1])
    data = batches()
    spoiled = [*data[:3], jnp.full(4, jnp.nan), *data[4:]]
    run = fed.client_update(setup, quadratic, theta, spoiled, indices)
    assert run.history.skipped == 1 and run.history.indices.tolist() == [2, 0, 4, 1]
    shorter = setup._replace(local_steps=TAU - 1)
    without = fed.client_update(
        shorter, quadratic, theta, [*data[:3], data[4]], np.delete(indices, 3)
    )
    same(run.theta, without.theta)
    same(run.history.slopes, without.history.slopes)
    state = fed.aggregate(setup, fed.start(setup), [run.history, run.history])
    assert state.skipped == 2 and state.counts.tolist() == [3, 3, 3, 1, 3, 1]
    assert np.isfinite(state.accumulator).all()


def test_steps_of_nothing_but_nan_leave_the_model() -> None:
    setup, theta = setup_of(), params()
    run = fed.client_update(setup, quadratic, theta, [jnp.full(4, jnp.nan)] * TAU, [0] * TAU)
    same(run.theta, theta)
    assert run.history.skipped == TAU and run.accumulator.tolist() == [0.0] * K


def test_another_client_and_round_need_no_other_program() -> None:
    setup, theta, traced = setup_of(), params(), []

    def counted(tree: Any, batch: jax.Array) -> jax.Array:
        traced.append(1)
        return quadratic(tree, batch)

    fed.client_update(setup, counted, theta, batches(), fed.choose_seeds(setup, 0, 0))
    before = len(traced)
    fed.client_update(setup, counted, theta, batches(1), fed.choose_seeds(setup, 1, 1))
    assert len(traced) == before


def test_sharded_parameters_move_alike() -> None:
    # A long step to each side, lest the rounding of sums in another order is divided by little.
    setup, theta = setup_of(eps=0.5), {**params(), "w": jnp.linspace(0.0, 1.0, 16)}
    theta["layers"] = {"kernel": jnp.linspace(-1.0, 1.0, 96).reshape(3, 2, 16)}
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("fsdp",))
    specs = {"count": (), "layers": {"kernel": (None, None, "fsdp")}, "w": ("fsdp",)}
    placed = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec))),
        theta,
        specs,
    )
    data, indices = [jnp.full(16, 2.0)] * TAU, fed.choose_seeds(setup, 0, 0)
    runs = [fed.client_update(setup, quadratic, tree, data, indices) for tree in (theta, placed)]
    close(runs[1].theta, runs[0].theta, 2e-6)
    a = runs[0].accumulator
    rebuilt = fed.rebuild(setup, placed, a)
    close(rebuilt, fed.rebuild(setup, theta, a), 2e-6)
    assert rebuilt["w"].sharding.spec == PartitionSpec("fsdp")


# ---- Server ----


def test_a_is_linear_in_the_clients_weights() -> None:
    setup = setup_of()
    one = history([0, 2, 2, 5, 0], [1.0, 2.0, 0.5, -1.0, 3.0])
    two = history([1, 2, 3, 3, 1], [0.25, -4.0, 1.0, 1.0, 2.0])
    b1, b2 = np.array([4, 0, 2.5, 0, 0, -1]), np.array([0, 2.25, -4, 2, 0, 0])
    same(fed.accumulated(setup, one), b1)
    begun = fed.start(setup)._replace(accumulator=np.arange(6.0))
    weighted = fed.aggregate(setup, begun, [one, two], [3, 5])
    close(weighted.accumulator, np.arange(6.0) + 3 / 8 * b1 + 5 / 8 * b2, 1e-12)
    equal = fed.aggregate(setup, begun, [one, two])
    close(equal.accumulator, np.arange(6.0) + (b1 + b2) / 2, 1e-12)
    alone = fed.aggregate(setup, begun, [one, two], [0, 7])
    close(alone.accumulator, np.arange(6.0) + b2, 1e-12)
    assert weighted.round == 1
    same(begun.accumulator, np.arange(6.0))


def test_the_accumulator_keeps_what_float32_would_lose() -> None:
    setup, state = setup_of(), fed.start(setup_of())
    for slope in (2.0**30, 0.25, 0.25):
        state = fed.aggregate(setup, state, [history([1] * TAU, [slope] * TAU)])
    assert state.accumulator[1] == 5 * 2.0**30 + 2.5


def test_probabilities_by_hand() -> None:
    """v = means with a first 0: of 3000 as 1000 and 0, of -10 and 20 with 0, and so on."""
    state = fed.aggregate(
        setup_of(), fed.start(setup_of()), [history([0, 1, 1, 3, 4], [-3000, -10, 20, 6, 0])]
    )
    v = np.array([500.0, 10.0, 0.0, 3.0, 0.0, 0.0])
    expected = np.exp(v / 500.0)
    close(fed.probabilities(state), expected / expected.sum(), 1e-12)


def test_probabilities_sum_to_one_and_differ_by_at_most_e() -> None:
    uniform = fed.probabilities(fed.start(setup_of()))
    same(uniform, np.full(K, uniform[0]))
    state = fed.start(setup_of(seeds=300))
    generator = np.random.default_rng(0)
    for scale in (1e-9, 1.0, 1e8):
        state = state._replace(magnitudes=scale * generator.random(300))
        p = fed.probabilities(state)
        assert math.isclose(p.sum(), 1, abs_tol=1e-12)
        assert 1.5 < p.max() / p.min() <= math.e + 1e-12


@pytest.mark.parametrize(
    ("share", "clients", "wanted"),
    [(0.05, 200, 10), (0.05, 10, 1), (0.29, 100, 29), (0.5, 5, 2), (1.0, 7, 7)],
)
def test_floor_of_m_n_clients_take_part(share: float, clients: int, wanted: int) -> None:
    setup = setup_of(participation=share)
    rounds = [fed.sample_clients(setup, number, clients) for number in range(30)]
    for chosen in rounds:
        assert len(set(chosen)) == len(chosen) == wanted and chosen == sorted(chosen)
        assert 0 <= chosen[0] and chosen[-1] < clients
    assert rounds == [fed.sample_clients(setup, number, clients) for number in range(30)]
    assert wanted == clients or len({tuple(chosen) for chosen in rounds}) > 3


def test_seeds_are_drawn_with_their_probabilities() -> None:
    setup = setup_of(local_steps=6000)
    drawn = [fed.choose_seeds(setup, n // 2, n % 2) for n in range(4)]
    same(drawn[0], fed.choose_seeds(setup, 0, 0))
    assert len({tuple(chosen.tolist()) for chosen in drawn}) == 4
    p = np.array([0.3, 0.1, 0.0, 0.2, 0.35, 0.05])
    for found, wanted in ((drawn[0], np.full(K, 1 / 6)), (fed.choose_seeds(setup, 0, 0, p), p)):
        assert found.shape == (6000,) and found.dtype == np.int32
        frequencies = np.bincount(found, minlength=K) / 6000
        assert (np.abs(frequencies - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / 6000)).all()


def test_a_round_with_the_papers_defaults_is_less_than_18_kilobytes() -> None:
    defaults = 3e-7, 4096, 5e-4, 200, 0.05, False, "normal", 0, directions.normal
    assert fedkseed(3e-7) == defaults
    assert fed.communication_bytes(fedkseed(3e-7)) == (4 * 4096 + 8, 4 * 4096)
    assert max(fed.communication_bytes(fedkseed(3e-7))) < 18_000
    assert fed.communication_bytes(fedkseed(3e-7, pro=True)) == (8 * 4096 + 8, 4 * 4096)


def test_the_examples_of_the_documentation() -> None:
    """One of them: two clients with different wishes meet."""
    failed, tried = doctest.testmod(fed)
    assert tried >= 8 and not failed


# ---- Files ----


def shared_in(folder: Path, **changes: Any) -> fed.Exchange:
    return fed.exchange(folder, setup_of(**changes), params())


def members() -> list[Client]:
    return [Client(3 + 2 * n, lambda turn, n=n: batches(turn + n)) for n in range(3)]


@pytest.mark.parametrize("pro", [False, True])
def test_files_carry_what_a_simulation_knows(pro: bool, tmp_path: Path) -> None:
    shared, theta = shared_in(tmp_path / "new", pro=pro, participation=0.7), params()
    setup, clients = shared.setup, members()
    expected = state = fed.start(setup)
    for number in range(3):
        expected = fed.simulate_round(setup, expected, theta, quadratic, clients)
        chosen = fed.sample_clients(setup, number, 3)
        assert len(chosen) == 2
        fed.send_task(shared, state, chosen)
        for client in range(3):
            task = fed.join_round(shared, number, client, theta, quadratic, clients[client], 0)
            assert task.clients == chosen
            same(task.accumulator, state.accumulator)
        reports = fed.receive_reports(shared, number, chosen, 0)
        sizes = [report.examples for report in reports]
        assert sizes == [3 + 2 * client for client in chosen]
        state = fed.aggregate(setup, state, [report.history for report in reports], sizes)
        same(state, expected)
    assert len(list((tmp_path / "new").iterdir())) == 3 * (1 + 2)
    stored = load_file(sorted((tmp_path / "new").glob("*client*"))[0])
    assert sum(array.nbytes for array in stored.values()) == 8 * TAU


def test_two_processes_and_a_server_agree_with_the_simulation(tmp_path: Path) -> None:
    sizes = ["--clients=2", "--rounds=2", "--seeds=16", "--local-steps=4", "--participation=1"]
    common = [*sizes, f"--folder={tmp_path}", "--timeout=200"]
    roles = [["server"], ["client", "--client=0"], ["client", "--client=1"]]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fedkseed", f"--role={role[0]}", *role[1:], *common],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for role in roles
    ]
    try:
        written = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0, 0], written
    lines = [out.splitlines()[-1] for out, _ in written]
    assert lines[0].startswith("round 2: loss") and lines == lines[:1] * 3

    setup = fedkseed(3e-3, seeds=16, local_steps=4, participation=1.0)
    theta, state = demonstration.network(), fed.start(setup)
    clients = [demonstration.client(number, 4) for number in range(2)]
    for _ in range(2):
        state = fed.simulate_round(setup, state, theta, demonstration.loss, clients)
    final = fed.receive_task(fed.exchange(tmp_path, setup, theta), 2, 0)
    assert np.count_nonzero(final.accumulator) > 4
    close(final.accumulator, state.accumulator, 1e-6 * np.abs(state.accumulator).max())
    model, expected = (fed.rebuild(setup, theta, x.accumulator) for x in (final, state))
    close(model, expected, 1e-6)


# ---- Errors ----

SETUP, NONE = setup_of(), np.zeros(0)


def settled(given: dict[str, Any]) -> Any:
    return fedkseed(**{"learning_rate": 0.1, **given})


def rebuilt_from(a: np.ndarray) -> Any:
    return fed.rebuild(setup_of(), params(), a)


def aggregated(clients: int, examples: list | None) -> Any:
    histories = [history([0], [1.0])] * clients
    return fed.aggregate(setup_of(), fed.start(setup_of()), histories, examples)


def walked(indices: list, data: int = TAU, theta: Any = None) -> Any:
    theta = theta or params()
    return fed.client_update(setup_of(), quadratic, theta, batches()[:data], indices)


@pytest.mark.parametrize(
    ("fn", "given", "message"),
    [
        (settled, [{"learning_rate": lambda step: 0.1}], "learning_rate is a schedule"),
        (settled, [{"learning_rate": 0.0}], "learning_rate=0.0: give a number above 0"),
        (settled, [{"learning_rate": math.inf}], "learning_rate=inf"),
        (settled, [{"learning_rate": math.nan}], "learning_rate=nan"),
        (settled, [{"weight_decay": 0.1}], "weight_decay=0.1: a decayed model"),
        (settled, [{"seeds": 0}], "seeds=0: give an integer"),
        (settled, [{"seeds": 4.0}], "seeds=4.0: give an integer"),
        (settled, [{"local_steps": 0}], "local_steps=0"),
        (settled, [{"participation": 0.0}], "participation=0.0: give a share above 0"),
        (settled, [{"participation": 1.5}], "participation=1.5"),
        (settled, [{"eps": 0.0}], "eps=0.0"),
        (settled, [{"distribution": "uniform"}], "distribution='uniform' is unknown"),
        (settled, [{"seed": -1}], "seed=-1: give an integer from 0"),
        (settled, [{"seed": 0.5}], "seed=0.5"),
        (walked, [[0] * TAU, TAU, {"n": jnp.arange(3)}], "theta has no floating leaf to move"),
        (walked, [[0] * TAU, 3], "batches ended after 3 of 5 local steps"),
        (walked, [[0] * 4], r"shape \(4,\) and type int64: .* each of the 5 local steps"),
        (walked, [[0.0] * TAU], "and type float64"),
        (walked, [[0, 1, K, 0, 0]], "indices from 0 to 6: seeds are 0 to K - 1"),
        (walked, [[0, 1, -1, 0, 0]], "indices from -1 to 1"),
        (rebuilt_from, [np.zeros(K - 1)], r"accumulator of shape \(5,\): give 6 finite numbers"),
        (rebuilt_from, [np.zeros((K, 1))], r"accumulator of shape \(6, 1\)"),
        (rebuilt_from, [np.full(K, np.nan)], "give 6 finite numbers"),
        (aggregated, [0, None], "examples=None for 0 clients: give each client's number"),
        (aggregated, [0, []], "for 0 clients"),
        (aggregated, [2, [1]], r"examples=\[1\] for 2 clients"),
        (aggregated, [2, [0, 0]], "not all of them 0"),
        (aggregated, [2, [-1, 3]], r"examples=\[-1, 3\] for 2 clients"),
        (aggregated, [2, [1, math.inf]], "for 2 clients"),
        (fed.choose_seeds, [SETUP, 0, 0, np.ones(K)], "sum 6.0: give 6 numbers from 0"),
        (fed.choose_seeds, [SETUP, 0, 0, np.full(5, 0.2)], r"probabilities of shape \(5,\)"),
        (fed.choose_seeds, [SETUP, 0, 0, np.array([2, -1, 0, 0, 0, 0])], "that sum to 1"),
        (fed.choose_seeds, [SETUP, 0, 0, np.full(K, np.nan)], "with sum nan"),
        (fed.sample_clients, [SETUP, 0, 0], "clients=0: give an integer"),
    ],
)
def test_arguments_are_refused(fn: Callable[..., Any], given: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fn(*given)


def test_the_missing_are_named(tmp_path: Path) -> None:
    shared = shared_in(tmp_path)
    with pytest.raises(TimeoutError, match=r"round 4: nothing from the server after 0 s; .*00004"):
        fed.receive_task(shared, 4, 0)
    fed.send_report(shared, 0, 1, Report(5, history([0] * TAU, [1.0] * TAU)))
    with pytest.raises(TimeoutError, match="round 0: nothing from client 0, client 2 after 0.1 s"):
        fed.receive_reports(shared, 0, [0, 1, 2], 0.1)


@pytest.mark.parametrize(
    ("changes", "theta", "message"),
    [
        ({"seeds": 7}, params, "seeds is 6 there and 7 here"),
        ({"seed": 3}, params, "seed is 0 there and 3 here"),
        ({"eps": 1e-3}, params, "eps is 0.0005 there and 0.001 here"),
        ({"distribution": "rademacher"}, params, "distribution is 'normal' there"),
        (
            {},
            lambda: {**params(), "w": jnp.ones(4)},
            r"leaf w is \[\[4\], 'float32', '.*'\] there and \[\[4\]",
        ),
        ({}, lambda: {**params(), "v": jnp.ones(2)}, r"leaf v is None there and \[\[2\]"),
        ({}, lambda: {"w": params()["w"]}, r"leaf count is \[\[3\], .* there and None here"),
        ({}, lambda: {**params(), "w": jnp.ones((4, 1))}, r"leaf w is \[\[4\], .* and \[\[4, 1\]"),
    ],
)
def test_others_must_agree(
    changes: dict, theta: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    sent(shared_in(tmp_path), "task")
    client = fed.exchange(tmp_path, setup_of(**changes), theta())
    with pytest.raises(ValueError, match=rf"round_00000.safetensors cannot be used: {message}"):
        fed.receive_task(client, 0, 0)


@pytest.mark.parametrize("kind", ["task", "report"])
def test_a_folder_of_another_run_is_refused(kind: str, tmp_path: Path) -> None:
    shared = shared_in(tmp_path)
    sent(shared, kind)
    with pytest.raises(ValueError, match="round_00000.* is of another run: give a folder"):
        fed.serve_round(shared, fed.start(shared.setup), 2, 0)


def rewritten(file: Path, **changes: Any) -> None:
    """The file with other tensors, or other fields in its header (None: without the field)."""
    metadata, arrays = io.open_tensors(file)
    fields = json.loads(metadata[fed.HEADER])
    for name, value in changes.items():
        (arrays if isinstance(value, np.ndarray) else fields)[name] = value
    kept = {name: value for name, value in fields.items() if value is not None}
    arrays = {name: array for name, array in arrays.items() if array.size}
    save_file(arrays, file, {fed.HEADER: json.dumps(kept)})


def sent(shared: fed.Exchange, kind: str) -> tuple[Path, Callable[[], Any]]:
    """A file, and what reads it."""
    if kind == "task":
        file = fed.send_task(shared, fed.start(shared.setup), [0])
        return file, lambda: fed.receive_task(shared, 0, 0)
    file = fed.send_report(shared, 0, 0, Report(5, history([0] * TAU, [1.0] * TAU)))
    return file, lambda: fed.receive_reports(shared, 0, [0], 0)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("report", {"version": 2}, "its version is 2, here it is 1"),
        ("report", {"client": 1}, "it says client=1, its name 0"),
        ("report", {"round": 3}, "it says round=3, its name 0"),
        ("report", {"agreement": None}, "no message of FedKSeed, or a damaged one: KeyError"),
        ("report", {"agreement": 5}, "no message of FedKSeed, or a damaged one: TypeError"),
        ("report", {"skipped": None}, "a damaged one: KeyError"),
        ("report", {"skipped": 1}, "its indices are not tau"),
        ("report", {"skipped": -1}, "skipped=-1"),
        ("report", {"examples": 2.5}, "examples=2.5"),
        ("report", {"examples": 10**400}, "examples=1000"),
        ("report", {"slopes": NONE}, r"it holds \['indices'\] alone"),
        ("report", {"slopes": np.full(TAU, np.nan)}, "its slopes are not tau finite"),
        ("report", {"slopes": np.ones(TAU, np.int32)}, "its slopes are not tau finite"),
        ("report", {"slopes": np.ones(TAU + 1)}, "its slopes are not tau finite"),
        ("report", {"indices": np.zeros(TAU)}, "its indices are not tau"),
        ("report", {"indices": np.zeros(TAU - 1, np.int32)}, "its indices are not tau"),
        ("report", {"indices": np.full(TAU, K, np.int32)}, "an index is not below K=6"),
        ("report", {"indices": np.full(TAU, -1, np.int32)}, "an index is not below K=6"),
        ("task", {"clients": "01"}, "clients='01'"),
        ("task", {"clients": [0, -1]}, r"clients=\[0, -1\]"),
        ("task", {"clients": None}, "a damaged one: KeyError"),
        ("task", {"accumulator": NONE}, "its accumulator is not K finite"),
        ("task", {"accumulator": np.full(K, np.inf)}, "its accumulator is not K finite"),
        ("task", {"accumulator": np.zeros(K + 1)}, "its accumulator is not K finite"),
        ("task", {"probabilities": np.zeros(K + 1)}, "its probabilities are not K finite"),
        ("task", {"probabilities": np.zeros(K)}, "only Pro sends probabilities"),
    ],
)
def test_damaged_files_are_refused(kind: str, changes: dict, message: str, tmp_path: Path) -> None:
    file, receive = sent(shared_in(tmp_path), kind)
    receive()
    rewritten(file, **changes)
    with pytest.raises(ValueError, match=f"{file.name} .*{message}"):
        receive()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    file, receive = sent(shared_in(tmp_path), "report")
    whole = file.read_bytes()
    for content, message in ((whole[:-3], "truncated"), (b"", "truncated"), (b"PK" * 99, "format")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"not a complete safetensors file.*{message}"):
            receive()
    for header in (None, "{", "[" * 100_000, "3"):
        save_file({"x": np.zeros(3)}, file, None if header is None else {fed.HEADER: header})
        with pytest.raises(ValueError, match="is no message of FedKSeed, or a damaged one"):
            receive()
