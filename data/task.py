"""The record every data source returns: a named classification task with its splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Example(NamedTuple):
    """One labelled text, or a labelled pair of texts.

    Attributes:
        text: the sentence to classify; never empty.
        label: one of the task's label names.
        pair: the second sentence of a pair task, else None.
        origin: where the example was read, as "file:line" or a module name; used in errors.
    """

    text: str
    label: str
    pair: str | None = None
    origin: str = ""


class Task(NamedTuple):
    """A classification task; build it with `make_task`, which checks it.

    Attributes:
        name: what reports call the task.
        labels: label names; the class index is the position in this tuple.
        splits: split name -> examples.
    """

    name: str
    labels: tuple[str, ...]
    splits: dict[str, list[Example]]


def make_task(name: str, labels: Iterable[str], splits: Mapping[str, Iterable[Example]]) -> Task:
    """Return a checked `Task`.

    Args:
        name: what reports call the task.
        labels: distinct label names, at least two.
        splits: split name -> examples, at least one split and one example in each.

    Returns:
        A `Task` whose splits are lists.

    Raises:
        ValueError: fewer than two labels, a repeated label, no split, an empty split, an empty
            text, a label outside `labels`, or a split that mixes single texts and pairs. The
            message names the example's origin.

    Example:
        >>> task = make_task("toy", ("no", "yes"), {"train": [Example("fine", "yes")]})
        >>> task.labels.index(task.splits["train"][0].label)
        1
    """
    labels = tuple(labels)
    if len(set(labels)) != len(labels) or len(labels) <= 1:
        raise ValueError(
            f"labels={labels!r} of task {name!r}: expected at least two distinct names; "
            "give every class one name"
        )
    if not splits:
        raise ValueError(f"splits of task {name!r} is empty; give at least a 'train' split")
    checked = {split: _check_split(name, labels, split, rows) for split, rows in splits.items()}
    return Task(name, labels, checked)


def limit(task: Task, count: int) -> Task:
    """Keep at most `count` examples of each split, labels in turn, the same ones every time.

    Args:
        task: the task to shorten.
        count: examples to keep per split; at least the number of labels.

    Returns:
        A task with the same labels. Within a label, the examples with the smallest hash stay,
        so the choice does not depend on the order in which they were read.

    Raises:
        ValueError: `count` is smaller than the number of labels.
    """
    if count < len(task.labels):
        raise ValueError(
            f"limit={count} is smaller than the {len(task.labels)} labels of task {task.name!r}: "
            "some class would be lost; raise it"
        )
    return task._replace(
        splits={split: _in_turn(rows, count) for split, rows in task.splits.items()}
    )


def carve(
    rows: list[Example], share: float, *, name: str = "split"
) -> tuple[list[Example], list[Example]]:
    """Divide examples into (rest, held out), by the hash of the text.

    Equal texts stay together, so no text is on both sides. The result depends on neither the
    order of `rows` nor the hash seed.

    Args:
        rows: examples to divide.
        share: fraction of the distinct texts to hold out, in (0, 1).
        name: salt of the hash: two names give two independent divisions.

    Returns:
        Two lists in the order of `rows`.

    Raises:
        ValueError: `share` is outside (0, 1), or one side would be empty.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share={share} is outside (0, 1); give the fraction to hold out")
    keys = {(row.text, row.pair) for row in rows}
    ordered = sorted(keys, key=lambda key: text_hash(name, *map(str, key)))
    held = set(ordered[: round(len(ordered) * share)])
    rest = [row for row in rows if (row.text, row.pair) not in held]
    out = [row for row in rows if (row.text, row.pair) in held]
    if not rest or not out:
        raise ValueError(
            f"share={share} of {len(keys)} distinct texts leaves one side empty; "
            "give more examples or another share"
        )
    return rest, out


def text_hash(*parts: str) -> str:
    """Return a hexadecimal digest of the parts; unlike `hash`, equal in every process."""
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _check_split(
    name: str, labels: tuple[str, ...], split: str, rows: Iterable[Example]
) -> list[Example]:
    rows = list(rows)
    if not rows:
        raise ValueError(f"split {split!r} of task {name!r} has no examples; drop it or fill it")
    known, paired = set(labels), rows[0].pair is not None
    for index, row in enumerate(rows):
        place = row.origin or f"task {name!r}, split {split!r}, example {index}"
        if row.label not in known:
            raise ValueError(
                f"{place}: unknown label {row.label!r}; known labels are {', '.join(labels)}. "
                "Add it to `labels` or correct the row"
            )
        if (row.pair is not None) != paired:
            raise ValueError(
                f"{place}: split {split!r} mixes single texts and pairs; give every row a pair "
                "or none"
            )
        if not row.text.strip() or (row.pair is not None and not row.pair.strip()):
            raise ValueError(f"{place}: empty text; remove the row or fill it")
    return rows


def _in_turn(rows: list[Example], count: int) -> list[Example]:
    groups: dict[str, list[Example]] = {}
    for row in sorted(rows, key=lambda row: text_hash(row.text, row.pair or "", row.label)):
        groups.setdefault(row.label, []).append(row)
    longest = max(map(len, groups.values()))
    turns = [groups[label][turn : turn + 1] for turn in range(longest) for label in sorted(groups)]
    return [row for turn in turns for row in turn][:count]
