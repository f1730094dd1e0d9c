"""What it costs to start each method: seconds and memory on MiniLM, memory on a 1.2B Llama.

    python -m benchmarks.init_cost

On MiniLM every config of configs/ is started by `peft.init` in a process of its own, compilation
included; "calibration" is the time that `pefts.calibrate` took on the config's batches before that,
and "peak" what the process grew by. The Llama (16 layers of 2048, 8192 hidden) exists as shapes
alone: its column is the temporary memory of the compiled init, beside the state that it returns,
for the kernels of all layers. Methods whose shapes depend on the weights have none.
"""

import argparse
import importlib
import json
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

import pefts
from benchmarks.methods import PREFIX, names
from configs.base import plain
from pefts import core
from training import experiment

LLAMA = {
    "query": (16, 2048, 2048),
    "key": (16, 2048, 512),
    "value": (16, 2048, 512),
    "out": (16, 2048, 2048),
    "gate": (16, 2048, 8192),
    "up": (16, 2048, 8192),
    "down": (16, 8192, 2048),
}
MIB = 2**20


def measure(name: str) -> dict[str, Any]:
    """Start one config's method on MiniLM, in this process."""
    run = experiment.build(importlib.import_module(f"configs.{name}").get_config())
    batches = run.objective.train_batches(run)
    first = [batches[n] for n in range(run.config.calibrate.batches)]
    jax.block_until_ready(run.params)
    before = _peak_bytes()
    begin = time.perf_counter()
    stats = jax.block_until_ready(experiment.statistics(run, first))
    calibrated = time.perf_counter()
    state = jax.block_until_ready(run.peft.init(jax.random.key(0), run.params, stats))
    return {
        "method": name.removeprefix(PREFIX),
        "calibration": calibrated - begin if stats is not None else None,
        "seconds": time.perf_counter() - calibrated,
        "peak_mib": (_peak_bytes() - before) / MIB,
        "trainable": pefts.count(state.trainable),
        "llama": llama(plain(run.config.method)),
    }


def llama(config: dict[str, Any]) -> dict[str, float] | None:
    """Temporary memory and state of init on the Llama's shapes; None if it needs the values."""
    config = {name: value for name, value in config.items() if name not in ("targets", "exclude")}
    peft = pefts.from_config({**config, "axes": {"kernel": "lio"}})
    if peft.traits.shapes_from_values:
        return None
    params = {"layers": {name: {"kernel": _abstract(shape)} for name, shape in LLAMA.items()}}
    needs = set(peft.traits.needs) - {core.CONTEXT}
    stats = _abstract_stats(peft.traits.components) if needs else None
    try:
        compiled = jax.jit(peft.init).lower(jax.random.key(0), params, stats).compile()
    except ValueError:  # a method of other leaves than linear kernels
        return None
    memory = compiled.memory_analysis()
    if memory is None:  # a backend that does not tell
        return None
    return {
        "temporary_mib": memory.temp_size_in_bytes / MIB,
        "state_mib": memory.output_size_in_bytes / MIB,
    }


def _abstract(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _abstract_stats(components: int) -> dict[str, Any]:
    return {
        f"layers/{name}/kernel": {
            "gradient": _abstract((layers, d_in, d_out)),
            "second_moment": _abstract((layers, d_in, d_in)),
            "sample_moment": _abstract((layers, d_in, d_in)),
            "components": _abstract((layers, components, d_in)),
            "explained_variance_ratio": _abstract((layers, components)),
        }
        for name, (layers, d_in, d_out) in LLAMA.items()
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the slowest first."""
    lines = [
        "| method | init, s | calibration, s | peak, MiB | Llama: temporary, MiB | state, MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: -row["seconds"]):
        calibration = "" if row["calibration"] is None else f"{row['calibration']:.1f}"
        shapes = row["llama"]
        memory = (
            " | "
            if shapes is None
            else f"{shapes['temporary_mib']:,.0f} | {shapes['state_mib']:,.0f}"
        )
        lines.append(
            f"| {row['method']} | {row['seconds']:.1f} | {calibration} | {row['peak_mib']:,.0f} "
            f"| {memory} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="what it costs to start each method")
    parser.add_argument("--methods", nargs="*", help="only these, for instance pissa eva")
    parser.add_argument("--child", help="measure this config in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    rows = []
    for name in names():
        if arguments.methods and name.removeprefix(PREFIX) not in arguments.methods:
            continue
        command = [sys.executable, "-m", "benchmarks.init_cost", "--child", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr}")
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
