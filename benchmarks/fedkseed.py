"""FedKSeed on label-skewed clients: what a round costs and brings, in one process or in several.

    python -m benchmarks.fedkseed                                  # 20 clients, simulated
    python -m benchmarks.fedkseed --pro

    python -m benchmarks.fedkseed --role=server --folder=/shared/run --clients=2
    python -m benchmarks.fedkseed --role=client --client=0 --folder=/shared/run --clients=2
    python -m benchmarks.fedkseed --role=client --client=1 --folder=/shared/run --clients=2

The last three belong into a shell each. A residual network of 820 parameters, with stacked layers,
learns four overlapping classes, of which each client has two.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pefts import deferred, fingerprint
from pefts.zeroth_order import fedkseed as fed

WIDTH, LAYERS, CLASSES, INPUTS, BATCH = 16, 2, 4, 12, 32
Data = tuple[np.ndarray, np.ndarray]


def network(seed: int = 0) -> dict[str, Any]:
    """theta_0."""
    draw = np.random.default_rng(seed).standard_normal

    def kernel(*shape: int) -> jax.Array:
        return jnp.asarray(draw(shape) / shape[-2] ** 0.5, jnp.float32)

    return {
        "entry": {"kernel": kernel(INPUTS, WIDTH), "bias": jnp.zeros(WIDTH)},
        "layers": {"kernel": kernel(LAYERS, WIDTH, WIDTH), "bias": jnp.zeros((LAYERS, WIDTH))},
        "head": {"kernel": kernel(WIDTH, CLASSES), "bias": jnp.zeros(CLASSES)},
    }


def logits(theta: dict[str, Any], x_BxI: jax.Array) -> jax.Array:
    """Of the network; each layer's perturbation exists inside it alone."""

    def layer(h_BxD: jax.Array, part: dict[str, Any]) -> tuple[jax.Array, None]:
        return h_BxD + jax.nn.relu(_affine(deferred.arrays(part), h_BxD)), None

    h_BxD, _ = jax.lax.scan(layer, jax.nn.relu(_affine(theta["entry"], x_BxI)), theta["layers"])
    return _affine(theta["head"], h_BxD)


def _affine(part: dict[str, jax.Array], x_BxI: jax.Array) -> jax.Array:
    return x_BxI @ part["kernel"] + part["bias"][None]


def loss(theta: dict[str, Any], batch: Data) -> jax.Array:
    """Mean cross-entropy."""
    x_BxI, y_B = batch
    scores = jax.nn.log_softmax(logits(theta, jnp.asarray(x_BxI)))
    return -jnp.mean(jnp.take_along_axis(scores, jnp.asarray(y_B)[:, None], axis=-1))


def examples(seed: int, classes: list[int], count: int) -> Data:
    """Points around the centres of some classes."""
    centres = np.random.default_rng(0).standard_normal((CLASSES, INPUTS))
    generator = np.random.default_rng([1, seed])
    y_N = generator.choice(classes, count).astype(np.int32)
    noise = generator.standard_normal((count, INPUTS))
    return (centres[y_N] + noise).astype(np.float32), y_N


def client(number: int, local_steps: int) -> fed.Client:
    """Two classes, and more examples than the client before."""
    count = 40 + 8 * number
    x, y = examples(1 + number, [number % CLASSES, (number + 1) % CLASSES], count)

    def batches(round_number: int) -> Iterator[Data]:
        generator = np.random.default_rng([2, round_number, number])
        for _ in range(local_steps):
            rows = generator.integers(0, count, BATCH)
            yield x[rows], y[rows]

    return fed.Client(count, batches)


def report(setup: fed.FedKSeed, theta: Any, number: int, accumulator: np.ndarray) -> None:
    """Print the loss, the accuracy and the fingerprint of the global model."""
    model = fed.rebuild(setup, theta, accumulator)
    value, right = _measured(model, examples(0, list(range(CLASSES)), 500))
    mark = fingerprint.checksum(model["head"]["kernel"])
    print(f"round {number}: loss {float(value):.3f}, accuracy {float(right):.3f}, {mark}")


@jax.jit
def _measured(theta: dict[str, Any], batch: Data) -> tuple[jax.Array, jax.Array]:
    right = jnp.argmax(logits(theta, jnp.asarray(batch[0])), axis=-1) == batch[1]
    return loss(theta, batch), jnp.mean(right, dtype=jnp.float32)


def simulate(setup: fed.FedKSeed, clients: int, rounds: int) -> None:
    """All in this process."""
    theta, state = network(), fed.start(setup)
    members = [client(number, setup.local_steps) for number in range(clients)]
    report(setup, theta, 0, state.accumulator)
    for number in range(1, rounds + 1):
        state = fed.simulate_round(setup, state, theta, loss, members)
        report(setup, theta, number, state.accumulator)
    down, up = fed.communication_bytes(setup)
    print(f"a client's round: {down:,} bytes down, {up:,} up; theta: {_bytes(theta):,}")


def serve(shared: fed.Exchange, clients: int, rounds: int, timeout: float) -> None:
    """The server; after the last round it tells everyone the model."""
    theta, state = network(), fed.start(shared.setup)
    for number in range(1, rounds + 1):
        state = fed.serve_round(shared, state, clients, timeout)
        report(shared.setup, theta, number, state.accumulator)
    fed.send_task(shared, state, [])


def join(shared: fed.Exchange, number: int, rounds: int, timeout: float) -> None:
    """One client."""
    theta, data = network(), client(number, shared.setup.local_steps)
    for turn in range(rounds):
        fed.join_round(shared, turn, number, theta, loss, data, timeout)
    final = fed.receive_task(shared, rounds, timeout)
    report(shared.setup, theta, rounds, final.accumulator)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=("simulation", "server", "client"), default="simulation")
    parser.add_argument("--folder", help="of server and clients")
    parser.add_argument("--client", type=int, default=0)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=512)
    parser.add_argument("--local-steps", type=int, default=100)
    parser.add_argument("--participation", type=float, default=0.25)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--pro", action="store_true")
    given = parser.parse_args()
    setup = fed.fedkseed(
        given.learning_rate,
        seeds=given.seeds,
        local_steps=given.local_steps,
        participation=given.participation,
        pro=given.pro,
    )
    if given.role == "simulation":
        simulate(setup, given.clients, given.rounds)
        return
    if given.folder is None:
        parser.error("give --folder, where server and clients meet.")
    shared = fed.exchange(given.folder, setup, network())
    if given.role == "server":
        serve(shared, given.clients, given.rounds, given.timeout)
    else:
        join(shared, given.client, given.rounds, given.timeout)


if __name__ == "__main__":
    main()
