"""FedKSeed: one model, tuned by many who keep their data and exchange a few kilobytes a round.

    z_j, j < K                                        the only directions that anyone may move in
    client  theta <- theta - eta g z_j,  g = (L(theta + eps z_j) - L(theta - eps z_j)) / (2 eps)
            tau times from the global model, j drawn anew each time; b_j = sum of the g of z_j
    server  a <- a + sum_c omega_c b^c,  omega_c = n_c / sum n
    anyone  theta = theta_0 - eta sum_j a_j z_j

FedKSeed-Pro draws j with probability p = softmax(minmax(v)), v_j = mean |clip(g, -1000, 1000)| of
all g that were ever seen of z_j, a first 0 among them.

Server and clients may be one process (`simulate_round`) or share a folder (`serve_round`,
`join_round`): one safetensors file for every message, which arrives whole or not at all.
"""

import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from pefts import fingerprint, io
from pefts.zeroth_order import directions, estimator

CLIP = 1000.0  # of a slope, where Pro compares their sizes
HEADER, VERSION = "fedkseed", 1
POLL = 0.05  # seconds between two looks into the folder
BatchValueFn = Callable[[Any, Any], jax.Array]  # (theta, with `Deferred` leaves, batch) -> a scalar


class FedKSeed(NamedTuple):
    """What server and clients agree on; `fedkseed` makes and checks it."""

    learning_rate: float
    seeds: int
    eps: float
    local_steps: int
    participation: float
    pro: bool
    distribution: str
    seed: int
    draw: directions.Draw


class History(NamedTuple):
    """What a client found, and sends."""

    indices: np.ndarray  # (n,), the j of every local step that moved, in their order
    slopes: np.ndarray  # (n,), its g
    skipped: int  # steps of which a value was not finite, and that moved nothing; n + skipped = tau


class LocalRun(NamedTuple):
    """A client's round."""

    theta: Any  # after the local steps; it stays with the client
    accumulator: np.ndarray  # b (K,), float64
    history: History  # what b was made of


class ServerState(NamedTuple):
    """What a server remembers: no array of theta's size."""

    round: int  # rounds done
    accumulator: np.ndarray  # a (K,), float64
    magnitudes: np.ndarray  # (K,), the sum of |clip(g)| over all that was seen of a seed
    counts: np.ndarray  # (K,), of how many, the first 0 included
    skipped: int  # local steps that moved nothing, of all clients


class Client(NamedTuple):
    """One who has data."""

    examples: int  # n_c, the client's weight
    batches: Callable[[int], Iterable[Any]]  # round -> tau batches, trees of the same shapes


def fedkseed(
    learning_rate: float,
    *,
    seeds: int = 4096,
    eps: float = 5e-4,
    local_steps: int = 200,
    participation: float = 0.05,
    pro: bool = False,
    distribution: str = "normal",
    weight_decay: float = 0.0,
    seed: int = 0,
) -> FedKSeed:
    """theta = theta_0 - eta sum_j a_j z_j, with a (K,) from clients who walk tau steps each.

    Args:
      learning_rate: eta, a constant (paper's examples: 3e-7, of all parameters of an LLM).
      seeds: K (paper: 4096; 1024 in its examples).
      eps: the length of the step to each side (paper: 5e-4).
      local_steps: tau (paper: 200, of one example each).
      participation: m; floor(m N) of N clients take part in a round, at least one (paper: 0.05).
      pro: whether seeds with larger slopes are drawn more often.
      distribution: "normal" (paper) or "rademacher".
      weight_decay: has to be 0.
      seed: of the K directions and of all draws.

    Returns:
      A `FedKSeed`, the first argument of every function here.

    Raises:
      ValueError: a schedule, weight decay, an unknown name, a number out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.zeroth_order import fedkseed as fed
      >>> setup = fed.fedkseed(0.1, seeds=64, local_steps=20, participation=1.0)
      >>> theta = {"w": jnp.zeros(3)}
      >>> clients = [fed.Client(10, lambda round, y=y: [jnp.full(3, y)] * 20) for y in (1.0, 3.0)]
      >>> def loss(theta, batch):
      ...     return jnp.sum((theta["w"] - batch) ** 2)
      >>> state = fed.start(setup)
      >>> for _ in range(6):
      ...     state = fed.simulate_round(setup, state, theta, loss, clients)
      >>> bool(jnp.all(jnp.abs(fed.rebuild(setup, theta, state.accumulator)["w"] - 2) < 0.5))
      True

    Source: Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication
      Cost under 18 Kilobytes, arXiv 2312.06353; compared with the authors' code.
    """
    if callable(learning_rate):
        raise ValueError(
            "learning_rate is a schedule: a sums the slopes of all rounds and one eta multiplies "
            "the sum. Give a constant."
        )
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate={learning_rate!r}: give a number above 0.")
    if weight_decay != 0:
        raise ValueError(
            f"weight_decay={weight_decay!r}: a decayed model is no longer theta_0 and K numbers, "
            "so nobody could rebuild it. Leave it at 0."
        )
    estimator.check_count("seeds", seeds)
    estimator.check_count("local_steps", local_steps)
    if not 0 < participation <= 1:
        raise ValueError(f"participation={participation!r}: give a share above 0, up to 1.")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r}: give an integer from 0 below 2**32.")
    estimator.options({"eps": eps, "distribution": distribution})
    draw, eta = directions.DRAWS[distribution], float(learning_rate)
    return FedKSeed(
        eta, seeds, float(eps), local_steps, participation, bool(pro), distribution, seed, draw
    )


def start(setup: FedKSeed) -> ServerState:
    """A server before the first round."""
    zeros = np.zeros(setup.seeds)
    return ServerState(0, zeros, zeros, np.ones(setup.seeds, np.int64), 0)


def sample_clients(setup: FedKSeed, number: int, clients: int) -> list[int]:
    """Who takes part in round `number`: floor(m N) of N different clients, at least one, sorted."""
    estimator.check_count("clients", clients)
    # Nine digits: 0.29 * 100 is 28.999999999999996.
    wanted = max(1, math.floor(round(setup.participation * clients, 9)))
    generator = np.random.default_rng([0, setup.seed, number])
    return sorted(generator.choice(clients, wanted, replace=False).tolist())


def choose_seeds(
    setup: FedKSeed, number: int, client: int, probabilities: np.ndarray | None = None
) -> np.ndarray:
    """The tau seeds (j) of a client's local steps in round `number`.

    They travel with the slopes, so nothing rests on how they were drawn; without p, all alike.

    Raises:
      ValueError: `probabilities` are not p (K,).
    """
    if probabilities is not None:
        p = np.asarray(probabilities)
        if p.shape != (setup.seeds,) or not ((p >= 0).all() and abs(p.sum() - 1) < 1e-6):
            raise ValueError(
                f"probabilities of shape {p.shape} with sum {p.sum()}: give {setup.seeds} numbers "
                "from 0 that sum to 1, one for each seed."
            )
        probabilities = p.astype(np.float64) / p.sum(dtype=np.float64)
    generator = np.random.default_rng([1, setup.seed, number, client])
    return generator.choice(setup.seeds, setup.local_steps, p=probabilities).astype(np.int32)


def client_update(
    setup: FedKSeed,
    value_fn: BatchValueFn,
    theta: Any,
    batches: Iterable[Any],
    indices: np.ndarray | Sequence[int],
) -> LocalRun:
    """tau steps theta <- theta - eta g z_j from the global model, which stays as it is.

    Args:
      setup: from `fedkseed`.
      value_fn: (theta, batch) -> a scalar; compiled once for one function. Its theta holds
        `Deferred` leaves where layers are stacked, which peft.bind and pefts.apply take.
      theta: the global model, of any dtypes.
      batches: at least tau of them, one for each step; later ones are left alone.
      indices: (tau,), the j of each step: see `choose_seeds`.

    Returns:
      `LocalRun`. A step of which a value is not finite moves nothing and is counted.

    Raises:
      ValueError: too few batches, indices that are not tau seeds, or nothing to move.
    """
    chosen = _checked_indices(setup, indices)
    if not any(leaf.index >= 0 for leaf in directions.leaves_of(theta)):
        raise ValueError("theta has no floating leaf to move: give the parameters to train.")
    # The walk is in place, and theta is not ours.
    theta = jax.tree.map(jnp.copy, theta)
    slopes, finite, rest = [], [], iter(batches)
    for step, index in enumerate(chosen):
        try:
            batch = next(rest)
        except StopIteration:
            raise ValueError(
                f"batches ended after {step} of {setup.local_steps} local steps: give one a step."
            ) from None
        theta, slope, good = _local_step(setup, value_fn, theta, index, batch)
        slopes.append(slope)
        finite.append(good)
    used = np.asarray(jax.device_get(finite))
    found = np.asarray(jax.device_get(slopes))[used]
    history = History(chosen[used], found, int(np.sum(~used)))
    return LocalRun(theta, accumulated(setup, history), history)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _local_step(
    setup: FedKSeed, value_fn: BatchValueFn, theta: Any, index: jax.Array, batch: Any
) -> tuple[Any, jax.Array, jax.Array]:
    """(theta - eta g z_j, g, whether it could be used)."""
    direction = directions.Direction(setup.draw)
    how = estimator.Options(eps=setup.eps)
    key = directions.fold_in(directions.run_key(setup.seed), index)
    found = estimator.estimate(lambda tree: value_fn(tree, batch), theta, key, how, direction)
    moved = directions.move(theta, found.keys, -setup.learning_rate * found.slopes, direction)
    return moved, found.slopes[0], found.finite


def accumulated(setup: FedKSeed, history: History) -> np.ndarray:
    """b (K,), float64: b_j = the sum of the slopes of z_j."""
    return np.bincount(history.indices, history.slopes.astype(np.float64), setup.seeds)


def aggregate(
    setup: FedKSeed,
    state: ServerState,
    histories: Sequence[History],
    examples: Sequence[int] | None = None,
) -> ServerState:
    """a + sum_c omega_c b^c, and what Pro remembers of the slopes.

    Args:
      setup, state: before the round.
      histories: of the clients that took part.
      examples: n_c, omega_c = n_c / sum n; None: all clients alike.

    Raises:
      ValueError: no client, or not one size from 0 for each, some above 0.
    """
    sizes = np.ones(len(histories)) if examples is None else np.asarray(examples, np.float64)
    usable = np.isfinite(sizes).all() and (sizes >= 0).all() and sizes.sum() > 0
    if not histories or sizes.shape != (len(histories),) or not usable:
        raise ValueError(
            f"examples={examples!r} for {len(histories)} clients: give each client's number of "
            "examples, not all of them 0, and at least one client."
        )
    total = state.accumulator.copy()
    magnitudes, counts = state.magnitudes.copy(), state.counts.copy()
    for weight, history in zip(sizes / sizes.sum(), histories, strict=True):
        total += weight * accumulated(setup, history)
        clipped = np.minimum(np.abs(history.slopes.astype(np.float64)), CLIP)
        magnitudes += np.bincount(history.indices, clipped, setup.seeds)
        counts += np.bincount(history.indices, minlength=setup.seeds)
    skipped = state.skipped + sum(history.skipped for history in histories)
    return ServerState(state.round + 1, total, magnitudes, counts, skipped)


def probabilities(state: ServerState) -> np.ndarray:
    """p (K,) of FedKSeed-Pro: softmax(minmax(v)), so no two differ by more than a factor of e.

    v_j = mean |clip(g, -1000, 1000)|, minmax(v) = (v - min v) / (max v - min v + 1e-10).
    """
    v = state.magnitudes / state.counts
    grown = np.exp((v - v.min()) / (v.max() - v.min() + 1e-10))
    return grown / grown.sum()


def rebuild(setup: FedKSeed, theta: Any, accumulator: np.ndarray) -> Any:
    """theta_0 - eta sum_j a_j z_j, summed in float32 or better, one layer after the other.

    In float32 it is a client's own walk up to rounding; in bfloat16 it is better than the walk,
    which rounds theta at every step.

    Args:
      setup: as it was for the clients.
      theta: theta_0, what the first round began with; it stays as it is.
      accumulator: a (K,), in any float type.

    Raises:
      ValueError: not K finite numbers.
    """
    a = np.asarray(accumulator, np.float64)
    if a.shape != (setup.seeds,) or not np.isfinite(a).all():
        raise ValueError(
            f"accumulator of shape {a.shape}: give {setup.seeds} finite numbers, one for each seed."
        )
    # Noise that is multiplied by 0 need not be drawn; few lengths mean few programs.
    used = np.flatnonzero(a)
    if not used.size:
        return jax.tree.map(jnp.copy, theta)
    padding = (0, (1 << (len(used) - 1).bit_length()) - len(used))
    coefficients = np.pad(-setup.learning_rate * a[used], padding)
    return _rebuilt(setup, theta, jnp.asarray(np.pad(used, padding)), jnp.asarray(coefficients))


@functools.partial(jax.jit, static_argnums=0)
def _rebuilt(setup: FedKSeed, theta: Any, indices: jax.Array, coefficients: jax.Array) -> Any:
    keys = jax.vmap(functools.partial(key_of, setup))(indices)
    return directions.move(theta, keys, coefficients, directions.Direction(setup.draw))


def key_of(setup: FedKSeed, index: Any) -> jax.Array:
    """The key of z_j, uint32 (2,): that of the only query which the estimator makes with seed j."""
    return directions.fold_in(directions.fold_in(directions.run_key(setup.seed), index), 0)


def communication_bytes(setup: FedKSeed) -> tuple[int, int]:
    """(down, up) of a client's round as the paper counts them: 4 K and the root key, 4 K.

    Pro's probabilities are 4 K more on the way down. The files here hold float64 downwards, and
    upwards j and g of every local step, 8 tau bytes, of which the server makes b.

    >>> communication_bytes(fedkseed(1e-6))
    (16392, 16384)
    """
    scalars = 4 * setup.seeds
    return scalars * (2 if setup.pro else 1) + 8, scalars


def simulate_round(
    setup: FedKSeed,
    state: ServerState,
    theta: Any,
    value_fn: BatchValueFn,
    clients: Sequence[Client],
) -> ServerState:
    """A round of all N clients in this process, from theta_0; value_fn: see `client_update`."""
    model = rebuild(setup, theta, state.accumulator)
    p = probabilities(state) if setup.pro else None
    chosen = sample_clients(setup, state.round, len(clients))
    histories = []
    for number in chosen:
        indices = choose_seeds(setup, state.round, number, p)
        batches = clients[number].batches(state.round)
        histories.append(client_update(setup, value_fn, model, batches, indices).history)
    return aggregate(setup, state, histories, [clients[number].examples for number in chosen])


# ---- Messages as files ----


class Exchange(NamedTuple):
    """A folder that the server and its clients share; `exchange` makes it."""

    folder: Path
    setup: FedKSeed
    agreement: dict[str, Any]  # the setup and theta_0's leaves, as the header of every file says it


class Task(NamedTuple):
    """What a server sends at the beginning of a round."""

    round: int
    clients: list[int]  # who takes part
    accumulator: np.ndarray  # a (K,)
    probabilities: np.ndarray | None  # p (K,) of Pro


class Report(NamedTuple):
    """What a client sends at the end of it."""

    examples: int
    history: History


def exchange(folder: str | Path, setup: FedKSeed, theta: Any) -> Exchange:
    """The folder, for those who have the same setup and theta_0 (known by pefts.fingerprint)."""
    agreed = {name: value for name, value in setup._asdict().items() if name != "draw"}
    agreed["noise"] = directions.IMPL
    agreed["partitionable"] = jax.config.values["jax_threefry_partitionable"]
    for leaf, value in zip(directions.leaves_of(theta), jax.tree.leaves(theta), strict=True):
        shape, dtype = list(jnp.shape(value)), jnp.result_type(value).name
        agreed[f"leaf {leaf.path}"] = [shape, dtype, fingerprint.checksum(value)]
    return Exchange(Path(folder), setup, agreed)


def serve_round(
    shared: Exchange, state: ServerState, clients: int, timeout: float = 600.0
) -> ServerState:
    """A server's round: send a, wait (seconds) for those of N clients who take part, aggregate.

    Raises:
      ValueError: the folder has files of this round already, or a report is damaged or foreign.
      TimeoutError: some clients sent nothing; they are named.
    """
    chosen = sample_clients(shared.setup, state.round, clients)
    send_task(shared, state, chosen)
    reports = receive_reports(shared, state.round, chosen, timeout)
    histories = [report.history for report in reports]
    return aggregate(shared.setup, state, histories, [report.examples for report in reports])


def join_round(
    shared: Exchange,
    number: int,
    client: int,
    theta: Any,
    value_fn: BatchValueFn,
    data: Client,
    timeout: float = 600.0,
) -> Task:
    """A client's round: wait (seconds) for the task; who takes part walks and reports.

    Args:
      shared: from `exchange`, with the same theta.
      number, client: the round's and its own, from 0.
      theta: theta_0.
      value_fn, data, timeout: see `client_update`, `Client`; seconds.

    Returns:
      The task; `rebuild(setup, theta, task.accumulator)` is the model that the round began with.

    Raises:
      ValueError: the task is damaged or foreign, or what `client_update` refuses.
      TimeoutError: no task.
    """
    task = receive_task(shared, number, timeout)
    if client in task.clients:
        indices = choose_seeds(shared.setup, number, client, task.probabilities)
        batches = data.batches(number)
        model = rebuild(shared.setup, theta, task.accumulator)
        run = client_update(shared.setup, value_fn, model, batches, indices)
        send_report(shared, number, client, Report(data.examples, run.history))
    return task


def send_task(shared: Exchange, state: ServerState, clients: Sequence[int]) -> Path:
    """Write what a round begins with, in a folder without files of this round.

    After the last round, a task of no clients tells everyone the model.
    """
    file = _file(shared, state.round)
    if shared.folder.is_dir() and (old := sorted(shared.folder.glob(f"{file.stem}*.safetensors"))):
        raise ValueError(f"{old[0]} is of another run: give a folder of this run alone.")
    tensors = {"accumulator": state.accumulator}
    if shared.setup.pro:
        tensors["probabilities"] = probabilities(state)
    return _send(shared, file, tensors, {"round": state.round, "clients": list(clients)})


def receive_task(shared: Exchange, number: int, timeout: float = 600.0) -> Task:
    """Wait for what round `number` begins with; errors as in `join_round`."""
    file = _file(shared, number)
    _wait({"the server": file}, number, timeout)
    header, arrays = _received(shared, file, {"round": number}, ("clients",))
    clients, a, p = header["clients"], arrays.get("accumulator"), arrays.get("probabilities")
    whole = (shared.setup.seeds,)
    _check(_is_numbers(a, whole), file, "its accumulator is not K finite numbers")
    _check(isinstance(clients, list) and all(map(_is_count, clients)), file, f"clients={clients!r}")
    _check(p is None or _is_numbers(p, whole), file, "its probabilities are not K finite numbers")
    _check((p is not None) == shared.setup.pro, file, "only Pro sends probabilities, and always")
    return Task(number, clients, arrays["accumulator"], p)


def send_report(shared: Exchange, number: int, client: int, report: Report) -> Path:
    """Write what a client found in round `number`."""
    history = report.history
    tensors = {"indices": history.indices, "slopes": history.slopes}
    own = {"examples": report.examples, "skipped": history.skipped}
    file = _file(shared, number, client)
    return _send(shared, file, tensors, {"round": number, "client": client, **own})


def receive_reports(
    shared: Exchange, number: int, clients: Sequence[int], timeout: float = 600.0
) -> list[Report]:
    """Wait for the reports of these clients, in their order; errors as in `serve_round`."""
    files = {f"client {client}": _file(shared, number, client) for client in clients}
    _wait(files, number, timeout)
    return [_report(shared, number, client) for client in clients]


def _report(shared: Exchange, number: int, client: int) -> Report:
    file, setup = _file(shared, number, client), shared.setup
    wanted = {"round": number, "client": client}
    header, arrays = _received(shared, file, wanted, ("examples", "skipped"))
    examples, skipped = header["examples"], header["skipped"]
    _check(_is_count(examples) and _is_count(skipped), file, f"{examples=}, {skipped=}")
    _check({"indices", "slopes"} <= set(arrays), file, f"it holds {sorted(arrays)} alone")
    indices, slopes = arrays["indices"], arrays["slopes"]
    steps = (setup.local_steps - skipped,)
    _check(indices.dtype == np.int32 and indices.shape == steps, file, "its indices are not tau")
    in_range = bool(((indices >= 0) & (indices < setup.seeds)).all())
    _check(in_range, file, f"an index is not below K={setup.seeds}")
    _check(_is_numbers(slopes, steps), file, "its slopes are not tau finite numbers")
    return Report(examples, History(indices, slopes, skipped))


def _file(shared: Exchange, number: int, client: int | None = None) -> Path:
    end = "" if client is None else f"_client_{client:05d}"
    return shared.folder / f"round_{number:05d}{end}.safetensors"


def _send(shared: Exchange, file: Path, tensors: dict[str, Any], own: dict[str, Any]) -> Path:
    header = {"version": VERSION, "agreement": shared.agreement, **own}
    metadata = {HEADER: json.dumps(header, sort_keys=True)}
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    io.write(file, lambda name: save_file(arrays, name, metadata))
    return file


def _wait(files: dict[str, Path], number: int, timeout: float) -> None:
    """Until all files are there: a file that has its name is whole."""
    end = time.monotonic() + timeout
    while missing := {who: file for who, file in files.items() if not file.is_file()}:
        if time.monotonic() >= end:
            raise TimeoutError(
                f"round {number}: nothing from {', '.join(missing)} after {timeout:g} s; "
                f"{next(iter(missing.values()))} does not exist. Look whether they still run, and "
                "whether all were given the same folder, or wait longer (timeout)."
            )
        time.sleep(POLL)


def _received(
    shared: Exchange, file: Path, wanted: dict[str, int], fields: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(header, arrays) of a message that says of itself what it should."""
    metadata, arrays = io.open_tensors(file)
    try:
        header = json.loads(metadata[HEADER])
        version, agreement = header["version"], dict(header["agreement"])
        said = {name: header[name] for name in (*wanted, *fields)}
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is no message of FedKSeed, or a damaged one: {error!r} in its header."
        ) from error
    _check(version == VERSION, file, f"its version is {version!r}, here it is {VERSION}")
    for name in sorted(set(agreement) | set(shared.agreement)):
        theirs, ours = agreement.get(name), shared.agreement.get(name)
        _check(theirs == ours, file, f"{name} is {theirs!r} there and {ours!r} here")
    for name, value in wanted.items():
        _check(said[name] == value, file, f"it says {name}={said[name]!r}, its name {value}")
    return said, arrays


def _check(fine: bool, file: Path, fault: str) -> None:
    if not fine:
        raise ValueError(
            f"{file} cannot be used: {fault}. All who share a folder need the same setup and "
            "theta_0, and a folder of this run alone."
        )


def _is_numbers(array: Any, shape: tuple[int, ...]) -> bool:
    if array is None or array.dtype not in (np.float32, np.float64):
        return False
    return array.shape == shape and bool(np.isfinite(array).all())


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _checked_indices(setup: FedKSeed, indices: Any) -> np.ndarray:
    chosen = np.asarray(indices)
    steps = (setup.local_steps,)
    if chosen.shape != steps or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(
            f"indices of shape {chosen.shape} and type {chosen.dtype}: give the seed of each of "
            f"the {setup.local_steps} local steps, integers."
        )
    if ((chosen < 0) | (chosen >= setup.seeds)).any():
        raise ValueError(f"indices from {chosen.min()} to {chosen.max()}: seeds are 0 to K - 1.")
    return chosen.astype(np.int32)
