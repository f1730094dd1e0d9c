"""What an update costs: its time as a ratio to Adam's, and the memory of its state.

    python -m benchmarks.optimizer_step --layers=4 --width=512

Each optimizer of configs/python_decoder_optimizers.py that trains all parameters by gradients
updates the kernels of a scanned decoder of the given size, with random gradients. Its updates and
Adam's run in turn in one process, from the first on, so that a refresh of projectors or a switch of
layers counts where it falls; --interval is the T between two. The ratio is that of the sums over
`--updates` of them; compilation is left out.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import pefts
from configs.base import plain
from configs.python_decoder_optimizers import ENTRIES, get_config
from pefts.optimizers import OPTIMIZERS, scale_by_adam8bit

VOCABULARY = 4096


def parameters(layers: int, width: int) -> dict[str, Any]:
    """The shapes of a Llama's parameters as `pefts.full` names them, filled with noise."""
    inner = 8 * width // 3 // 64 * 64
    kernels = {
        "mlp/gate_proj": (width, inner),
        "mlp/up_proj": (width, inner),
        "mlp/down_proj": (inner, width),
        **{f"self_attn/{name}_proj": (width, width) for name in "qkvo"},
    }
    shapes = {f"layers/{path}/kernel": (layers, *shape) for path, shape in kernels.items()}
    shapes |= {"embed_tokens/embedding": (VOCABULARY, width), "norm/scale": (width,)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        path: {"value": 0.02 * jax.random.normal(key, shape)}
        for key, (path, shape) in zip(keys, shapes.items(), strict=True)
    }


def transformation(name: str, layers: int, interval: int) -> optax.GradientTransformation:
    """An entry of the config, with its interval and what depends on the number of layers."""
    entry = ENTRIES[name]
    options = plain(get_config(name).optimizer.options)
    for option in ("update_interval", "interval"):
        if option in options:
            options[option] = interval
    if "probabilities" in options:
        options["probabilities"] = (1 / layers,) * layers
    if "inner" in options:
        options["inner"] = scale_by_adam8bit()
    name = entry.optimizer or name
    factory = optax.adamw if name == "adamw" else OPTIMIZERS[name]
    return factory(1e-3, **options)


def stepper(tx: optax.GradientTransformation, params: Any, gradients: Any) -> Callable[[], float]:
    """A function that makes one update and returns its seconds."""

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    fresh = jax.tree.map(jnp.copy, params)
    program = compiled.lower(fresh, tx.init(fresh), gradients).compile()
    held = [(fresh, tx.init(fresh))]

    def once() -> float:
        start = time.perf_counter()
        held[0] = jax.block_until_ready(program(*held[0], gradients))
        return time.perf_counter() - start

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, size in (("layers", 4), ("width", 512), ("interval", 200), ("updates", 200)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--only", nargs="*", default=None)
    arguments = parser.parse_args()
    params = parameters(arguments.layers, arguments.width)
    gradients = parameters(arguments.layers, arguments.width)
    print(f"{pefts.count(params):,} parameters, T = {arguments.interval}")
    print("| optimizer | step / Adam's | state, bytes a parameter |\n|---|---:|---:|")
    for name in arguments.only or filter(_by_gradients, ENTRIES):
        tx = transformation(name, arguments.layers, arguments.interval)
        size = _bytes(jax.eval_shape(tx.init, params))
        mine = stepper(tx, params, gradients)
        theirs = stepper(optax.adamw(1e-3), params, gradients)
        pairs = [(mine(), theirs()) for _ in range(arguments.updates)]
        ratio = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
        print(f"| {name} | {ratio:.2f} | {size / pefts.count(params):.2f} |", flush=True)


def _by_gradients(name: str) -> bool:
    entry = ENTRIES[name]
    return entry.method["method"] == "full" and "eps" not in entry.options


def _bytes(state: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


if __name__ == "__main__":
    main()
