"""What a run tells: the console, metrics.csv and TensorBoard, results.json and the figure."""

import csv
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tensorboardX import SummaryWriter

from data import metrics
from training.checkpoint import write_atomically
from training.objective import Scores
from training.plan import Plan

COLUMNS = ("step", "loss", "grad_norm", "penalty")  # of every run
console = Console(soft_wrap=True)


def show_plan(title: Mapping[str, str], plan: Plan) -> None:
    """Print what is about to be done."""
    table = Table(title="plan", show_header=False, title_justify="left")
    for name, value in title.items():
        table.add_row(name, value)
    share = plan.trainable_count / plan.base_count
    table.add_row("base", f"{plan.base_count:,} parameters, {mebibytes(plan.base_bytes)}")
    table.add_row("trainable", f"{plan.trainable_count:,} parameters ({share:.2%} of the base)")
    table.add_row("adapter", mebibytes(plan.adapter_bytes))
    table.add_row("optimizer", mebibytes(plan.optimizer_bytes))
    table.add_row(
        "activations", f"{mebibytes(plan.activation_bytes)} (compiled step, largest batch)"
    )
    table.add_row("memory in all", mebibytes(plan.total_bytes))
    table.add_row("steps", f"{plan.steps:,}")
    console.print(table)


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


class Clock:
    """Tokens per second since the first step, its compilation left out."""

    def __init__(self) -> None:
        self.start, self.tokens = 0.0, 0

    def rate(self, tokens: int) -> float:
        if not self.start:
            self.start = time.monotonic()
            return 0.0
        self.tokens += tokens
        return self.tokens / max(time.monotonic() - self.start, 1e-9)


class Meter(NamedTuple):
    """The progress bar of a run; a plain line now and then where there is no terminal."""

    bar: progress.Progress
    task: progress.TaskID

    def show(self, step: int, loss: float, tokens_per_second: float) -> None:
        text = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        self.bar.update(self.task, completed=step, text=text)
        if not self.bar.console.is_terminal and step % 25 == 0:
            total = self.bar.tasks[0].total or 0
            left = self.bar.tasks[0].time_remaining
            ending = "" if left is None else f"  {left:.0f} s left"
            self.bar.console.print(f"step {step}/{total:.0f}  {text}{ending}")


@contextmanager
def meter(steps: int, start: int) -> Iterator[Meter]:
    """A progress bar with loss, tokens per second and time left."""
    columns = (
        progress.TextColumn("training"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[text]}"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield Meter(bar, bar.add_task("train", total=steps, completed=start, text=""))


class Log:
    """metrics.csv and TensorBoard events of one run folder; rows after `start` are dropped.

    A class, because it holds two open files.
    """

    def __init__(self, folder: Path, start: int, columns: tuple[str, ...]):
        self.columns = [*COLUMNS, *columns]
        self.file = folder / "metrics.csv"
        self.rows = [row for row in read_rows(self.file) if int(row["step"]) <= start]
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one row; values of no column are refused by the CSV writer."""
        self.rows.append({"step": step, **values})
        for name, value in values.items():
            self.events.add_scalar(name, value, step)

    def flush(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.file, text.getvalue())

    def close(self) -> None:
        self.flush()
        self.events.close()


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.csv; none if there is no such file."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def show_scores(of: str, split: str, scores: Scores) -> None:
    """Print one line of scores."""
    text = ", ".join(f"{name} {value:.3f}" for name, value in scores.summary().items())
    console.print(f"{of}: {split} {text}", highlight=False)


def columns(split: str, scores: Scores) -> dict[str, float]:
    """The scores under their names in metrics.csv."""
    named = scores.summary().items()
    return {f"{split}_{name.lower().replace('-', '_')}": value for name, value in named}


def show_results(results: Mapping[str, Scores], split: str) -> None:
    """Print a table of scores, one row per system."""
    table = Table(title=f"results on {split}", title_justify="left")
    names = next(iter(results.values())).summary()
    for column in ("", *names):
        table.add_column(column, justify="left" if not column else "right")
    for name, scores in results.items():
        table.add_row(name, *[f"{value:.3f}" for value in scores.summary().values()])
    console.print(table)


def show_text(prompt: str, text: str) -> None:
    """Print a prompt and, behind it in bold, how a model continues it."""
    console.print(Text(prompt) + Text(text, style="bold"), highlight=False)


def show_files(files: Mapping[str, Path]) -> None:
    """Print where the run's files are."""
    for name, path in files.items():
        console.print(f"{name:<12}{path}", highlight=False)


def save_results(file: Path, results: Mapping[str, Scores], **facts: Any) -> None:
    """Write the scores of every system, all that they hold, as JSON."""
    systems = {name: scores.record() for name, scores in results.items()}
    write_atomically(file, json.dumps({**facts, "systems": systems}, indent=2) + "\n")


def figure(
    file: Path,
    rows: list[dict[str, Any]],
    floors: Mapping[str, metrics.Scores],
    adapted: metrics.Scores,
    labels: tuple[str, ...],
) -> None:
    """Draw the loss, the scores on dev over their floors, and the confusion matrix on test.

    Args:
      file: a PNG.
      rows: of metrics.csv.
      floors: the baselines' scores on dev, by name.
      adapted: the adapted model's scores on test.
      labels: class names.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, (left, middle, right) = plt.subplots(
        1, 3, figsize=(17, 5.2), width_ratios=(1, 1, 1.25), layout="constrained"
    )
    _draw_loss(left, rows)
    _draw_scores(middle, rows, floors)
    _draw_confusion(right, adapted, labels)
    _write(fig, file)


def language_figure(file: Path, rows: list[dict[str, Any]], floor: float) -> None:
    """Draw the training loss, and the loss on dev over that of the base.

    Args:
      file: a PNG.
      rows: of metrics.csv.
      floor: the base's loss on dev.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    _draw_loss(left, rows)
    right.plot(*_curve(rows, "dev_loss"), marker="o", markersize=3, label="adapted")
    right.axhline(floor, color="gray", linestyle="--", label="base")
    right.set(title="loss on dev during training", xlabel="step", ylabel="cross-entropy")
    right.legend(frameon=False)
    _write(fig, file)


def sweep_figure(
    file: Path, curves: Mapping[str, list[dict[str, Any]]], best: int, column: str
) -> None:
    """Draw every member's training loss and one score on dev, the best member's in front.

    Args:
      file: a PNG.
      curves: rows of metrics.csv by member.
      best: which of them is drawn bold.
      column: the score's name in metrics.csv.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(curves)))
    for k, ((name, rows), color) in enumerate(zip(curves.items(), colors, strict=True)):
        style = {"color": "tab:red" if k == best else color, "linewidth": 2.2 if k == best else 1}
        order = 3 if k == best else 2
        steps, losses = _curve(rows, "loss")
        window = max(1, len(losses) // 40)
        smooth = np.convolve(losses, np.ones(window) / window, "valid") if losses else []
        left.plot(steps[window - 1 :], smooth, zorder=order, **style)
        label = f"{name} (best)" if k == best else name
        right.plot(*_curve(rows, column), marker="o", ms=3, label=label, zorder=order, **style)
    left.set(title="training loss", xlabel="step", ylabel="cross-entropy")
    right.set(title=f"{column.replace('_', ' ')} during training", xlabel="step")
    right.legend(frameon=False, fontsize=7, bbox_to_anchor=(1, 1), loc="upper left")
    _write(fig, file)


def show_sweep(rows: list[dict[str, Any]], best: int) -> None:
    """Print a table of a sweep's members, the best one marked."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title="sweep, on dev", title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    for k, row in enumerate(rows):
        cells = [_cell(row.get(name, "")) for name in names]
        table.add_row(*cells, style="bold" if k == best else None)
    console.print(table)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(fig: Any, file: Path) -> None:
    from matplotlib import pyplot as plt

    temporary = file.with_name("figure.tmp.png")
    fig.savefig(temporary, dpi=120)
    plt.close(fig)
    os.replace(temporary, file)


def _curve(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    kept = [row for row in rows if row.get(name) not in ("", None)]
    return [int(row["step"]) for row in kept], [float(row[name]) for row in kept]


def _draw_loss(axes: Any, rows: list[dict[str, Any]]) -> None:
    steps, losses = _curve(rows, "loss")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="every step")
    window = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    axes.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"mean of {window} steps")
    axes.set(title="training loss", xlabel="step", ylabel="cross-entropy")
    axes.legend(frameon=False)


def _draw_scores(
    axes: Any, rows: list[dict[str, Any]], floors: Mapping[str, metrics.Scores]
) -> None:
    for name, column in (("accuracy", "dev_accuracy"), ("macro-F1", "dev_macro_f1")):
        axes.plot(*_curve(rows, column), marker="o", markersize=3, label=name)
    for (name, scores), style in zip(floors.items(), (":", "--"), strict=True):
        axes.axhline(scores.accuracy, color="tab:blue", linestyle=style, label=f"accuracy, {name}")
    axes.set(title="scores on dev during training", xlabel="step", ylim=(0, 1))
    axes.legend(frameon=False)


def _draw_confusion(axes: Any, scores: metrics.Scores, labels: tuple[str, ...]) -> None:
    counts = np.asarray(scores.confusion, float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005:
            color = "white" if share > 0.5 else "black"
            text = f"{share:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=7)
    short = [label if len(label) <= 24 else label[:22] + "…" for label in labels]
    axes.set_xticks(range(len(labels)), short, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), short, fontsize=8)
    title = f"adapted, on test (accuracy {scores.accuracy:.3f}): share of each true class"
    axes.set(title=title, xlabel="predicted", ylabel="true")
