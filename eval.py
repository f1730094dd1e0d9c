"""Score a finished run from its adapter file: python eval.py --run=runs/minilm_stdlib_docs_lora

The adapter is loaded onto the original base and scored twice: through the factored products, and
merged into the kernels where the method allows it. --analyse adds what it did to the kernels: their
spectra, and which of their singular vectors the base does not have.
"""

import sys
from pathlib import Path

import numpy as np
from absl import app, flags, logging

import pefts
from data import metrics
from training import analysis, checkpoint, evaluate, experiment, report
from training.experiment import Experiment

RUN = flags.DEFINE_string("run", None, "a run folder that train.py made", required=True)
SPLIT = flags.DEFINE_string("split", "test", "the split to score")
ANALYSE = flags.DEFINE_bool("analyse", False, "also compare the kernels before and after")
ADAPTER = flags.DEFINE_string("adapter", None, "an adapter file; RUN/adapter.safetensors if absent")


def load_run(folder: Path, adapter: Path) -> tuple[Experiment, pefts.PeftState]:
    """The run's experiment with the method of the adapter file, and the adapter."""
    run = experiment.build(checkpoint.read_config(folder))
    peft, state = pefts.load(adapter, run.params)
    return run._replace(peft=peft), state


def evaluate_run(run: Experiment, state: pefts.PeftState, split: str) -> dict[str, metrics.Scores]:
    """Scores of the adapter on a split: "adapted", and "merged" if it can be."""
    labels, classes = evaluate.rows_of(run, split).labels, len(run.task.labels)
    forward = evaluate.adapted_forward(run)
    logits = {"adapted": evaluate.predict(run, forward, (run.params, state), split)}
    if run.peft.traits.mergeable:
        merged = run.peft.merge(run.params, state)
        logits["merged"] = evaluate.predict(run, evaluate.forward(run), merged, split)
        gap = np.abs(logits["adapted"] - logits["merged"]).max()
        report.console.print(f"largest difference of a logit, merged or not: {gap:.1e}")
    return {n: metrics.score(labels, x.argmax(-1), classes=classes) for n, x in logits.items()}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; options start with --")
    logging.set_verbosity(logging.WARNING)
    folder, split = Path(RUN.value), SPLIT.value
    adapter = Path(ADAPTER.value) if ADAPTER.value else folder / "adapter.safetensors"
    try:
        run, state = load_run(folder, adapter)
        results = evaluate_run(run, state, split)
        report.show_results(results, split)
        file = folder / f"eval_{split}.json"
        report.save_results(file, results, run.task.labels, split=split, adapter=str(adapter))
        report.show_files({"results": file})
        if ANALYSE.value:
            analysis.write(run, state, folder)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
