"""Every method's accuracy, trainable parameters and step time on one task: a table and a picture.

    python -m benchmarks.methods --steps 216

The task is SST-2 (sentence level) where ../shared/data has it, else stdlib_docs. Each config of
configs/ is trained for the same number of steps on the same batches. A step time is a ratio to
LoRA's: both steps run in turn in one process on one batch, and the median of the pairwise ratios is
given. Finished methods are kept in runs/methods/*.json and not trained again (--retime measures
their step times anew); the table is printed, the picture written to runs/methods/methods.png.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pefts
import train
from configs.base import Config
from training import classification, evaluate
from training.checkpoint import write_atomically

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "runs" / "methods"
SHARED = ROOT.parent / "shared" / "data"
PREFIX = "minilm_stdlib_docs_"
REFERENCE = PREFIX + "lora"
LABEL = 0.0022  # height of a label of the picture, in accuracy


def names() -> list[str]:
    """The configs to compare."""
    return sorted(file.stem for file in (ROOT / "configs").glob(f"{PREFIX}*.py"))


def config_of(name: str, steps: int) -> Config:
    """A config on the benchmark's task and budget."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.train.steps = steps
    if SHARED.is_dir():
        with config.task.unlocked():
            config.task.name, config.task.root = "sst2", str(SHARED)
    return config


def run(name: str, steps: int, reference: train.Session) -> dict[str, Any]:
    """Train one config and score it."""
    session = train.prepare(config_of(name, steps))
    state = session.state
    start = time.monotonic()
    for step in range(session.steps):
        state, metrics = session.update(state, session.place(session.batches[step]))
    if not bool(metrics.finite):
        raise FloatingPointError(f"{name}: the loss is not finite")
    seconds = time.monotonic() - start
    forward = evaluate.adapted_forward(session.run)
    argument = (session.run.params, state.peft_state)
    scores = {s: evaluate.score(session.run, forward, argument, s) for s in ("dev", "test")}
    adapter = session.state.peft_state.trainable
    head = pefts.count(session.run.params["classifier"]) if session.run.config.head else 0
    return {
        "method": name.removeprefix(PREFIX),
        "trainable": pefts.count(adapter) - head,
        "dev": scores["dev"].summary()["accuracy"],
        "test": scores["test"].summary()["accuracy"],
        "seconds": seconds,
        "task": session.run.task.name,
        "steps": steps,
        **timing(session, state, reference),
    }


def timing(session: train.Session, state: Any, reference: train.Session) -> dict[str, float]:
    """Step time as a ratio to the reference's, and the step's temporary memory."""
    return {
        "ratio": step_ratio(session, state, reference),
        "temporary_mib": session.plan.activation_bytes / 2**20,
    }


def step_ratio(
    session: train.Session, state: Any, reference: train.Session, rounds: int = 9
) -> float:
    """The median ratio of step times, this method's to LoRA's, taken in turn on one batch."""
    batch = session.place(next(b for b in map(session.batches.__getitem__, range(99)) if _usual(b)))

    def stepper(of: train.Session, start: Any) -> Callable[[], float]:
        held = [jax.tree.map(jax.numpy.copy, start)]

        def once() -> float:
            begin = time.perf_counter()
            held[0], metrics = of.update(held[0], batch)
            metrics.loss.block_until_ready()
            return time.perf_counter() - begin

        return once

    mine, theirs = stepper(session, state), stepper(reference, reference.state)
    mine(), theirs()
    pairs = [(mine(), theirs()) for _ in range(rounds)]
    return statistics.median(a / b for a, b in pairs)


def _usual(batch: dict[str, np.ndarray]) -> bool:
    return batch["tokens"].shape[1] == 32


def probe(steps: int) -> dict[str, float]:
    """The linear probe on the frozen base, for the same splits."""
    session = train.prepare(config_of(REFERENCE, steps))
    scores = classification.linear_probe(session.run, ["dev", "test"])
    return {split: s.accuracy for split, s in scores.items()}


def table(rows: list[dict[str, Any]], floor: dict[str, float]) -> str:
    """Markdown, best test accuracy first."""
    lines = [
        "| method | trainable beside the head | dev | test | step / LoRA's | temporary memory |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: -row["test"]):
        lines.append(
            f"| {row['method']} | {row['trainable']:,} | {row['dev']:.3f} | {row['test']:.3f} "
            f"| {row['ratio']:.2f} | {row['temporary_mib']:,.0f} MiB |"
        )
    lines.append(f"| *linear probe* | 0 | {floor['dev']:.3f} | {floor['test']:.3f} | | |")
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]], floor: dict[str, float], file: Path) -> None:
    """Test accuracy against trainable parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    points = sorted((row["trainable"], row["test"], row["method"]) for row in rows)
    for crowd in _crowds(points):
        for point, (x, y) in _places(crowd):
            axes.scatter(*point[:2], color="tab:blue", zorder=3)
            line = {"arrowstyle": "-", "color": "gray", "linewidth": 0.6}
            side = "right" if x < point[0] else "left"
            axes.annotate(point[2], point[:2], (x, y), ha=side, va="center", arrowprops=line)
    axes.axhline(floor["test"], color="gray", linestyle="--", label="linear probe")
    axes.set(
        xscale="log",
        xlim=(min(row["trainable"] for row in rows) / 8, 3e8),
        xlabel="trainable parameters beside the head",
        ylabel="test accuracy",
        title=f"MiniLM on {rows[0]['task']}, {rows[0]['steps']} steps of 32",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    fig.savefig(file, dpi=120)


Point = tuple[float, float, str]


def _crowds(points: list[Point]) -> list[list[Point]]:
    """Points, by size, cut where one is more than 1.6 times the one before."""
    crowds: list[list[Point]] = []
    for point in points:
        if not crowds or point[0] > 1.6 * crowds[-1][-1][0]:
            crowds.append([])
        crowds[-1].append(point)
    return crowds


def _places(crowd: list[Point]) -> list[tuple[Point, tuple[float, float]]]:
    """Where labels go: left of a small crowd, on both sides of a large one, none over another."""
    placed = []
    ranked = sorted(crowd, key=lambda point: point[1])
    sides = 1 if len(crowd) < 8 else 2
    for half, left in ((ranked[side::sides], side == 0) for side in range(sides)):
        heights = np.asarray([point[1] for point in half])
        for n in range(1, len(half)):
            heights[n] = max(heights[n], heights[n - 1] + LABEL)
        heights -= np.mean(heights - [point[1] for point in half])
        factor = 1 / 1.35 if left else 1.35
        x = (min if left else max)(point[0] for point in crowd) * factor
        placed += [(point, (x, y)) for point, y in zip(half, heights, strict=True)]
    return placed


def main() -> None:
    parser = argparse.ArgumentParser(description="accuracy and step time of every method")
    parser.add_argument("--steps", type=int, default=216)
    parser.add_argument("--retime", action="store_true", help="measure step times again")
    parser.add_argument("--methods", nargs="*", help="only these, for instance lora vera")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    chosen = [n for n in names() if not arguments.methods or n[len(PREFIX) :] in arguments.methods]
    reference = None
    for name in chosen:
        file = OUT / f"{name}.json"
        row = json.loads(file.read_text()) if file.exists() else {}
        done = row.get("steps") == arguments.steps
        if done and not arguments.retime:
            continue
        reference = reference or train.prepare(config_of(REFERENCE, arguments.steps))
        if done:
            session = train.prepare(config_of(name, arguments.steps))
            row |= timing(session, session.state, reference)
        else:
            row = run(name, arguments.steps, reference)
        write_atomically(file, json.dumps(row, indent=2) + "\n")
        print(json.dumps(row), flush=True)
    floor_file = OUT / "linear_probe.json"
    if not floor_file.exists():
        write_atomically(floor_file, json.dumps(probe(arguments.steps)) + "\n")
    floor = json.loads(floor_file.read_text())
    rows = [json.loads((OUT / f"{name}.json").read_text()) for name in chosen]
    print(table(rows, floor))
    picture(rows, floor, OUT / "methods.png")
    print(f"picture: {OUT / 'methods.png'}")


if __name__ == "__main__":
    main()
