"""What a run changed in the kernels: a table, analysis.json and analysis.png."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import models
import pefts
from pefts import analysis
from pefts.analysis import Row
from training import report
from training.checkpoint import write_atomically
from training.experiment import Experiment

TOP, THRESHOLD = 10, 0.5
COLUMNS = ("kernel", "layer", "shape", "intruders", "before", "after", "diff.", "change")


def write(run: Experiment, state: pefts.PeftState, folder: Path) -> None:
    """Compare the base with the merged kernels; print a table and write the two files.

    Raises:
      ValueError: the method cannot be merged.
    """
    if not run.peft.traits.mergeable:
        raise ValueError(
            f"--analyse compares kernels, and {run.config.method.method} cannot be merged into "
            "them: it changes none that could be looked at."
        )
    axes = pefts.infer_axes(run.model.apply, run.params, *models.example(run.model))
    merged = run.peft.merge(run.params, state)
    rows = analysis.report(run.params, merged, top=TOP, threshold=THRESHOLD, axes=axes)
    show(rows)
    files = {"analysis": folder / "analysis.json", "figure": folder / "analysis.png"}
    write_atomically(files["analysis"], json.dumps(content(rows), indent=2) + "\n")
    analysis.figure(rows, files["figure"], top=TOP, threshold=THRESHOLD)
    report.show_files(files)


def show(rows: Sequence[Row]) -> None:
    """Print one line for every slice of every kernel."""
    report.console.print(_table(rows), highlight=False)
    report.console.print(
        f"{sum(row.intruders for row in rows)} intruders: of the {TOP} leading output directions "
        f"of each kernel, those with a cosine below {THRESHOLD} to all of the original's.",
        highlight=False,
    )
    if not all(row.spans for row in rows):
        report.console.print(
            "* d_out > d_in: the original's directions do not span the outputs, so that low cosines"
            " come easier; compare these kernels with each other alone.",
            highlight=False,
        )


def content(rows: Sequence[Row]) -> dict[str, Any]:
    """What analysis.json holds: the table's numbers, and the counts for other settings."""
    return {
        "top": TOP,
        "threshold": THRESHOLD,
        "intruders": sum(row.intruders for row in rows),
        "kernels": [_plain(row) for row in rows],
        "curve": {
            "tops": list(analysis.TOPS),
            "thresholds": list(analysis.THRESHOLDS),
            "intruders": analysis.curve(rows).tolist(),
        },
    }


def _table(rows: Sequence[Row]) -> Table:
    title = (
        "intruders; effective rank before, after, of the difference; ||difference|| / ||before||"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "kernel" else "right", no_wrap=True)
    for kind, members in analysis.kinds_of(rows).items():
        for row in members:
            before, after, difference = row.effective_rank
            table.add_row(
                kind,
                analysis.layer_of(row),
                f"{row.shape[0]}x{row.shape[1]}{' ' if row.spans else '*'}",
                str(row.intruders),
                f"{before:.1f}",
                f"{after:.1f}",
                f"{difference:.1f}",
                f"{row.relative_change:.2%}",
            )
        table.add_section()
    return table


def _plain(row: Row) -> dict[str, Any]:
    before, after, difference = row.effective_rank
    return {
        "path": row.path,
        "layer": list(row.layer),
        "d_in": row.shape[0],
        "d_out": row.shape[1],
        "spans": row.spans,
        "intruders": row.intruders,
        "effective_rank": {"before": before, "after": after, "difference": difference},
        "relative_change": row.relative_change,
        "similarity": [round(float(m), 4) for m in row.similarity[:TOP]],
    }
