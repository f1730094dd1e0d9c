"""Few-shot classification by values alone and by gradients: mean and spread over five samples.

    python -m benchmarks.kshot --root=FOLDER --dataset=SST-2 --steps=200

FOLDER holds the k-shot samples of LM-BFF, as MeZO uses them (../shared/data/kshot_mezo if it is
there). MiniLM with a fresh head learns the 16 examples of each class of every sample; its accuracy
is that of the test split. Rows with gradients take a fifth of the steps. Finished rows are kept in
runs/kshot/*.json. No learning rate was searched.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import train
from benchmarks.methods import ROOT, SHARED
from configs.base import Config, encoder_classification
from training import classification, evaluate
from training.checkpoint import write_atomically

OUT = ROOT / "runs" / "kshot"
SEEDS = (13, 21, 42, 87, 100)
FEWER = 5  # times fewer steps with gradients
BODY = r"^(?!.*embeddings/)"  # every leaf but the tables
LORA = {"method": "lora", "rank": 8, "alpha": 16.0, "targets": r"(query|value)/kernel"}
FULL = {"method": "full", "targets": BODY}
TRAIN = {"method": "tensor_train", "bottleneck": 64, "rank": 5}


class Entry(NamedTuple):
    """A method and an optimizer with its learning rate and options."""

    method: dict[str, Any]
    optimizer: str
    learning_rate: float
    options: dict[str, Any]


ENTRIES = {
    "LoRA": Entry(LORA, "adamw", 2e-3, {}),
    "full": Entry(FULL, "adamw", 1e-4, {}),
    "MeZO": Entry(FULL, "mezo", 1e-5, {"eps": 1e-3}),
    "Sparse-MeZO": Entry(FULL, "sparse_mezo", 2e-5, {"eps": 1e-3, "sparsity": 0.8}),
    "MeZO, LoRA": Entry(LORA, "mezo", 1e-3, {"eps": 1e-2}),
    "AdaZeta": Entry(TRAIN, "adazeta", 1e-3, {"eps": 1e-2, "max_queries": 4, "final_queries": 5}),
}


def config_of(entry: Entry, root: str, dataset: str, seed: int, steps: int) -> Config:
    """MiniLM on one sample."""
    config = encoder_classification("kshot")
    config.task = ConfigDict({"name": "kshot", "root": root, "dataset": dataset, "seed": seed})
    config.data.max_length, config.data.buckets, config.data.batch_size = 32, (32,), 16
    config.data.token_dropout, config.data.balance = 0.0, "none"
    config.method, config.head = ConfigDict(entry.method), entry.method is not FULL
    by_values = entry.optimizer != "adamw"
    config.train.steps = steps if by_values else max(1, steps // FEWER)
    config.optimizer.name, config.optimizer.learning_rate = entry.optimizer, entry.learning_rate
    config.optimizer.schedule = "constant" if by_values else "cosine"
    config.optimizer.options = ConfigDict(entry.options)
    return config


def run(entry: Entry, root: str, dataset: str, seed: int, steps: int) -> dict[str, float]:
    """Accuracies after training on one sample."""
    session = train.prepare(config_of(entry, root, dataset, seed, steps))
    state = session.state
    for step in range(session.steps):
        state, metrics = session.update(state, session.place(session.batches[step]))
    if not bool(metrics.finite):
        raise FloatingPointError(f"{entry.optimizer}: the loss is not finite")
    forward = evaluate.adapted_forward(session.run)
    argument = (session.run.params, state.peft_state)
    return {
        split: evaluate.score(session.run, forward, argument, split).summary()["accuracy"]
        for split in ("dev", "test")
    }


def probe(root: str, dataset: str, seed: int) -> dict[str, float]:
    """Logistic regression on the frozen base."""
    session = train.prepare(config_of(ENTRIES["LoRA"], root, dataset, seed, 1))
    scores = classification.linear_probe(session.run, ["dev", "test"])
    return {split: score.accuracy for split, score in scores.items()}


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean and standard deviation over the samples."""
    lines = ["| | test | dev |", "|---|---:|---:|"]
    for name, found in rows.items():
        cells = [
            f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}"
            for values in ([row[split] for row in found] for split in ("test", "dev"))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default=str(SHARED / "kshot_mezo"))
    parser.add_argument("--dataset", default="SST-2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--only", nargs="*", default=["linear probe", *ENTRIES])
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, float]]] = {}
    for name in arguments.only:
        for seed in arguments.seeds:
            file = _file(name, arguments.dataset, seed, arguments.steps)
            if not file.exists():
                place = (arguments.root, arguments.dataset, seed)
                known = name in ENTRIES
                found = run(ENTRIES[name], *place, arguments.steps) if known else probe(*place)
                write_atomically(file, json.dumps(found))
            rows.setdefault(name, []).append(json.loads(file.read_text()))
            print(name, seed, rows[name][-1], flush=True)
    print(table(rows))


def _file(name: str, dataset: str, seed: int, steps: int) -> Path:
    plain = name.replace(" ", "_").replace(",", "")
    return OUT / f"{dataset}_{plain}_{seed}_{steps}.json"


if __name__ == "__main__":
    main()
