"""Optimizers from random weights on equal tokens: the loss, and the memory of what they keep.

    python -m models.create python_decoder --task=python_sources --characters=4000000
    python -m benchmarks.pretraining --base=python_decoder --steps=300

The config python_decoder_pretrain with each optimizer in turn: the same small Llama, batches and
schedule. State memory is counted in the optimizer's pytree. Every optimizer is run with each of its
learning rates, and the run with the lowest dev loss counts. Finished runs are kept in
runs/pretraining/*.json; the table is printed, the pictures written beside them: the loss against
steps, and the last loss against state memory.
"""

import argparse
import json
import math
from typing import Any, NamedTuple

import jax
import numpy as np

import train
from benchmarks.methods import ROOT
from configs.base import Config
from configs.python_decoder_pretrain import get_config
from training import evaluate
from training.checkpoint import write_atomically

OUT = ROOT / "runs" / "pretraining"
RANK, INTERVAL = 48, 50
DEV = 160  # rows of the dev split
LOW_RANK = {"rank": RANK, "update_interval": INTERVAL}


class Entry(NamedTuple):
    """An optimizer by its name in a config, its options, and learning rates to choose from."""

    optimizer: str
    options: dict[str, Any]
    rates: tuple[float, ...]


ENTRIES = {
    "Adam": Entry("adamw", {}, (5e-4, 1e-3, 3e-3)),
    "8-bit Adam": Entry("adam8bit", {}, (1e-3, 3e-3)),
    "GaLore": Entry("galore", {**LOW_RANK, "scale": 1.0}, (3e-3, 1e-2)),
    "8-bit GaLore": Entry(
        "galore", {**LOW_RANK, "scale": 1.0, "inner": "scale_by_adam8bit"}, (3e-3, 1e-2)
    ),
    "GaLore, exact SVD": Entry(
        "galore", {**LOW_RANK, "scale": 1.0, "decomposition": "svd"}, (3e-3, 1e-2)
    ),
    "Fira": Entry("fira", {**LOW_RANK, "scale": 1.0}, (3e-3, 1e-2)),
    "FRUGAL": Entry("frugal", {"density": 0.25, "update_interval": INTERVAL}, (1e-3, 3e-3)),
    "APOLLO": Entry("apollo", LOW_RANK, (3e-3, 1e-2)),
}


def config_of(entry: Entry, base: str, steps: int, rate: float, rows: int) -> Config:
    """The pretraining config with another optimizer and budget."""
    config = get_config()
    config.model.source, config.train.steps = base, steps
    config.data.batch_size = rows
    config.optimizer.name, config.optimizer.learning_rate = entry.optimizer, rate
    config.optimizer.weight_decay = 0.0
    config.optimizer = {**config.optimizer.to_dict(), "options": dict(entry.options)}
    return config


def trained(entry: Entry, base: str, steps: int, rate: float, rows: int) -> dict[str, Any]:
    """The losses of every step, and the dev loss behind the last."""
    session = train.prepare(config_of(entry, base, steps, rate, rows))
    state, losses = session.state, []
    for step in range(session.steps):
        state, metrics = session.update(state, session.place(session.batches[step]))
        losses.append(float(metrics.loss))
        if not math.isfinite(losses[-1]):
            return {"losses": losses, "dev": math.inf, "rate": rate, "bytes": 0}
    forward = evaluate.adapted_forward(session.run)
    held_out = session.run.rows["dev"]
    held_out = held_out._replace(ids=held_out.ids[:DEV], learned=held_out.learned[:DEV])
    run = session.run._replace(rows={**session.run.rows, "dev": held_out})
    scores = evaluate.score(run, forward, (run.params, state.peft_state), "dev")
    leaves = [leaf for leaf in jax.tree.leaves(state.opt_state) if hasattr(leaf, "nbytes")]
    return {
        "losses": losses,
        "dev": scores.summary()["loss"],
        "rate": rate,
        "bytes": sum(leaf.nbytes for leaf in leaves),
    }


def best(name: str, base: str, steps: int, rows: int) -> dict[str, Any]:
    """The best run of an optimizer."""
    found = []
    for rate in ENTRIES[name].rates:
        file = OUT / f"{name.replace(' ', '_').replace(',', '')}_{rate:g}_{steps}.json"
        if not file.exists():
            row = {"name": name, **trained(ENTRIES[name], base, steps, rate, rows)}
            write_atomically(file, json.dumps(row))
        found.append(json.loads(file.read_text()))
        print(f"{name} at {rate:g}: dev {found[-1]['dev']:.3f}", flush=True)
    return min(found, key=lambda row: row["dev"])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, lowest dev loss first."""
    lines = ["| optimizer | learning rate | dev loss | state, MiB |", "|---|---:|---:|---:|"]
    for row in sorted(rows, key=lambda row: row["dev"]):
        size = row["bytes"] / 2**20
        lines.append(f"| {row['name']} | {row['rate']:g} | {row['dev']:.3f} | {size:.1f} |")
    return "\n".join(lines)


def pictures(rows: list[dict[str, Any]]) -> None:
    """Loss against steps, and the last loss against state memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for row in sorted(rows, key=lambda row: row["dev"]):
        width = max(1, len(row["losses"]) // 30)
        smooth = np.convolve(row["losses"], np.ones(width) / width, "valid")
        left.plot(np.arange(len(smooth)) + width, smooth, label=row["name"], linewidth=1.2)
        right.scatter(row["bytes"] / 2**20, row["dev"], s=28)
        right.annotate(
            row["name"],
            (row["bytes"] / 2**20, row["dev"]),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
        )
    left.set(xlabel="step", ylabel="training loss, mean of the last steps")
    left.legend(fontsize=8)
    right.set(xlabel="optimizer state, MiB", ylabel="dev loss at the end")
    right.margins(x=0.18, y=0.1)
    figure.savefig(OUT / "pretraining.png", dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="python_decoder")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8, help="rows of 256 tokens in a batch")
    parser.add_argument("--only", nargs="*", default=list(ENTRIES))
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    done = [best(name, arguments.base, arguments.steps, arguments.rows) for name in arguments.only]
    print(table(done))
    pictures(done)


if __name__ == "__main__":
    main()
