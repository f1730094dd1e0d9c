"""Score a finished run from its adapter file: python eval.py --run=runs/minilm_stdlib_docs_lora

The adapter is loaded onto the original base and scored twice: through the factored products, and
merged into the kernels where the method allows it. --analyse adds what it did to the kernels: their
spectra, and which of their singular vectors the base does not have. --write="Once upon a time"
continues a text instead; several of them are one batch. --grade lets the model answer the questions
of the split, where the task has answers, and grades them. --export=FOLDER writes the adapter as
Hugging Face PEFT opens it, --merge=FOLDER the whole merged model as transformers opens it.
"""

import sys
from pathlib import Path

import numpy as np
from absl import app, flags, logging

import models
import pefts
from training import analysis, evaluate, experiment, report, writing
from training.objective import Experiment, Opening, Scores, Writing

RUN = flags.DEFINE_string("run", None, "a run folder that train.py made", required=True)
SPLIT = flags.DEFINE_string("split", "test", "the split to score")
ANALYSE = flags.DEFINE_bool("analyse", False, "also compare the kernels before and after")
TEXTS = flags.DEFINE_multi_string("write", [], "a text to continue; may be given several times")
GRADE = flags.DEFINE_bool(
    "grade", False, "also let it answer the split's questions, and grade that"
)
LIMIT = flags.DEFINE_integer("limit", 0, "grade so many answers, the first ones; 0: all")
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "the most that a text is continued by")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "of sampling; 0 takes the likeliest token")
TOP_K = flags.DEFINE_integer("top_k", 0, "sample from so many likeliest tokens; 0: from all")
TOP_P = flags.DEFINE_float("top_p", 1.0, "sample from the tokens that together reach this")
SEED = flags.DEFINE_integer("seed", 0, "of sampling")
EXPORT = flags.DEFINE_string(
    "export", None, "write a folder that Hugging Face PEFT opens, and stop"
)
MERGE = flags.DEFINE_string("merge", None, "write a folder that transformers opens, and stop")
ADAPTER = flags.DEFINE_string("adapter", None, "an adapter file; RUN/adapter.safetensors if absent")


def evaluate_run(run: Experiment, state: pefts.PeftState, split: str) -> dict[str, Scores]:
    """Scores of the adapter on a split: "adapted", and "merged" if it can be."""
    predict = run.objective.predict
    forward = evaluate.adapted_forward(run)
    found = {"adapted": predict(run, forward, (run.params, state), split)}
    if run.peft.traits.mergeable:
        merged = run.peft.merge(run.params, state)
        found["merged"] = predict(run, evaluate.forward(run), merged, split)
        gap = np.abs(found["adapted"] - found["merged"]).max()
        report.console.print(f"largest difference of an output, merged or not: {gap:.1e}")
    return {name: run.objective.scores(run, values, split) for name, values in found.items()}


def how_to_write() -> Writing:
    """The options of sampling."""
    return Writing(NEW_TOKENS.value, TEMPERATURE.value, TOP_K.value, TOP_P.value, SEED.value)


def continue_texts(run: Experiment, state: pefts.PeftState) -> None:
    """Print a continuation of every text given.

    Raises:
      ValueError: the run's model writes nothing.
    """
    write = run.objective.write
    if write is None:
        raise ValueError(f"--write: a model of the task {run.task.name!r} writes no text.")
    given = [Opening(text) for text in TEXTS.value]
    for text, new in zip(
        given, write(run, (run.params, state), given, how_to_write()), strict=True
    ):
        report.show_text(text.text, new)


def score_run(run: Experiment, state: pefts.PeftState, adapter: Path, folder: Path) -> None:
    """Print and write the scores on a split."""
    split = SPLIT.value
    files = {"results": folder / f"eval_{split}.json"}
    results = evaluate_run(run, state, split)
    report.show_results(results, split)
    if GRADE.value:
        graded = writing.grade(run, (run.params, state), split, how_to_write(), LIMIT.value)
        report.show_scores(f"{len(graded.answers)} answers", split, graded)
        files["answers"] = folder / f"answers_{split}.jsonl"
        graded.save(files["answers"])
        results["answers"] = graded
    report.save_results(files["results"], results, split=split, adapter=str(adapter))
    report.show_files(files)


def write_model(run: Experiment, state: pefts.PeftState) -> bool:
    """Write the folders asked for; whether any was."""
    source = run.config.model.source
    written = {}
    if EXPORT.value:
        written["exported"] = Path(EXPORT.value)
        pefts.export_hf(
            EXPORT.value, run.peft, state, run.params, run.names, base_model_name_or_path=source
        )
    if MERGE.value:
        written["merged"] = Path(MERGE.value)
        merged = run.peft.merge(run.params, state)
        models.save(MERGE.value, source, run.model, merged, run.names)
    report.show_files(written)
    return bool(written)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; options start with --")
    logging.set_verbosity(logging.WARNING)
    folder = Path(RUN.value)
    adapter = Path(ADAPTER.value) if ADAPTER.value else folder / "adapter.safetensors"
    try:
        run, state = experiment.load_run(folder, adapter)
        if write_model(run, state):
            return
        if TEXTS.value:
            continue_texts(run, state)
            return
        score_run(run, state, adapter, folder)
        if ANALYSE.value:
            analysis.write(run, state, folder)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
