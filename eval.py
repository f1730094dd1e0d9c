"""Score a finished run from its adapter file: python eval.py --run=runs/minilm_stdlib_docs_lora

The adapter is loaded onto the original base and scored twice: through the factored products, and
merged into the kernels where the method allows it.
"""

import sys
from pathlib import Path

import numpy as np
from absl import app, flags, logging

import pefts
from data import metrics
from training import checkpoint, evaluate, experiment, report

RUN = flags.DEFINE_string("run", None, "a run folder that train.py made", required=True)
SPLIT = flags.DEFINE_string("split", "test", "the split to score")
ADAPTER = flags.DEFINE_string("adapter", None, "an adapter file; RUN/adapter.safetensors if absent")


def evaluate_run(
    folder: Path, split: str, adapter: Path
) -> tuple[dict[str, metrics.Scores], tuple[str, ...]]:
    """Scores of the adapter on a split ("adapted", and "merged" if it can be), and the labels."""
    run = experiment.build(checkpoint.read_config(folder))
    labels, classes = evaluate.rows_of(run, split).labels, len(run.task.labels)
    peft, state = pefts.load(adapter, run.params)
    run = run._replace(peft=peft)
    forward = evaluate.adapted_forward(run)
    logits = {"adapted": evaluate.predict(run, forward, (run.params, state), split)}
    if peft.traits.mergeable:
        merged = peft.merge(run.params, state)
        logits["merged"] = evaluate.predict(run, evaluate.forward(run), merged, split)
        gap = np.abs(logits["adapted"] - logits["merged"]).max()
        report.console.print(f"largest difference of a logit, merged or not: {gap:.1e}")
    scores = {n: metrics.score(labels, x.argmax(-1), classes=classes) for n, x in logits.items()}
    return scores, run.task.labels


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; options start with --")
    logging.set_verbosity(logging.WARNING)
    folder, split = Path(RUN.value), SPLIT.value
    adapter = Path(ADAPTER.value) if ADAPTER.value else folder / "adapter.safetensors"
    try:
        results, labels = evaluate_run(folder, split, adapter)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    report.show_results(results, split)
    file = folder / f"eval_{split}.json"
    report.save_results(file, results, labels, split=split, adapter=str(adapter))
    report.show_files({"results": file})


if __name__ == "__main__":
    app.run(main)
