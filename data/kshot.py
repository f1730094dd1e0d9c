"""Few-shot classification: LM-BFF's k-shot samples of 15 public data sets, as MeZO uses them.

For every data set, k and seed there is one train and one dev file with k rows of each class, and
a test file of at most 1,000 rows: `SST-2/16-13/train.tsv`, `SST-2/16-13/dev.tsv`, and
`SST-2/16-13/test.tsv` or, where all seeds share it, `SST-2/test.tsv`. The rows are kept as they
were drawn. Where the original data repeats a text, both train and dev may have it; and of a class
with fewer than 2k rows train takes up to k and dev the rest, which can be none. There are no
prompts or label words here: the texts are for a sentence encoder with a classification head.

Sources: Making Pre-trained Language Models Better Few-shot Learners (arXiv 2012.15723);
Fine-Tuning Language Models with Just Forward Passes (arXiv 2305.17333).
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data import files
from data.task import Example, Task, make_task


class Known(NamedTuple):
    """How the files of a data set are written.

    Attributes:
        labels: class labels as written, in class order.
        text: column of the text: its name, or its index where the files have no header.
        label: column of the label, likewise.
        pair: column of the second text, or None.
        files: the train, dev and test files.
        folder: the data set's folder, where it is not named as the data set.
        widths: how many fields a row may have; empty for as many as the header has.
        skip_empty: leave out rows without a text instead of raising.
        glued: a line may hold two rows, see `_parted`.
    """

    labels: tuple[str, ...]
    text: str | int
    label: str | int
    pair: str | int | None = None
    files: tuple[str, str, str] = ("train.tsv", "dev.tsv", "test.tsv")
    folder: str = ""
    widths: tuple[int, ...] = ()
    skip_empty: bool = False
    glued: bool = False


_SPLITS = ("train", "dev", "test")
_BINARY = ("0", "1")
_NLI = ("contradiction", "entailment", "neutral")
_ENTAILMENT = ("entailment", "not_entailment")
_SCORED = ("STS-B",)
_SINGLE = Known(_BINARY, 1, 0, files=("train.csv", "dev.csv", "test.csv"), widths=(2,))
_MNLI = Known(
    _NLI,
    "sentence1",
    "gold_label",
    "sentence2",
    files=("train.tsv", "dev_matched.tsv", "test_matched.tsv"),
)

KNOWN: dict[str, Known] = {
    "CoLA": Known(_BINARY, 3, 1, widths=(4,), glued=True),
    "MNLI": _MNLI,
    # The mismatched test rows come from genres that train does not have.
    "MNLI-mm": _MNLI._replace(
        files=("train.tsv", "dev_matched.tsv", "test_mismatched.tsv"), folder="MNLI"
    ),
    "MRPC": Known(_BINARY, "#1 String", "Quality", "#2 String"),
    "QNLI": Known(_ENTAILMENT, "question", "label", "sentence"),
    "QQP": Known(_BINARY, "question1", "is_duplicate", "question2"),
    "RTE": Known(_ENTAILMENT, "sentence1", "label", "sentence2"),
    # One to five annotators' labels stand before the gold label, whatever the header says.
    "SNLI": Known(_NLI, "sentence1", -1, "sentence2", widths=(11, 12, 13, 14, 15)),
    "SST-2": Known(_BINARY, "sentence", "label"),
    # A few of its published rows are a label and a blank, and were drawn like any other.
    "cr": _SINGLE._replace(skip_empty=True),
    "mpqa": _SINGLE,
    "mr": _SINGLE,
    "sst-5": _SINGLE._replace(labels=("0", "1", "2", "3", "4")),
    "subj": _SINGLE,
    "trec": _SINGLE._replace(labels=("0", "1", "2", "3", "4", "5")),
}


def load(
    dataset: str = "SST-2", *, root: str | Path | None = None, shots: int = 16, seed: int = 13
) -> Task:
    """Return the k-shot sample of a data set, with splits "train", "dev" and "test".

    Args:
        dataset: a key of `KNOWN`; "MNLI-mm" is MNLI with the mismatched test rows.
        root: folder that holds the data sets' own folders (`SST-2`, `cr`, ...).
        shots: k, the rows of each class; LM-BFF has 16, MeZO also 512.
        seed: of the sample; LM-BFF has 13, 21, 42, 87 and 100.

    Returns:
        The task, its examples in file order and its labels as the files have them. "0" and "1"
        are unacceptable and acceptable (CoLA), different and equivalent (MRPC, QQP), subjective
        and objective (subj), negative and positive (the rest); sst-5 goes from very negative to
        very positive; trec's are description, entity, abbreviation, human, location and number.
        A row without a text, which some samples of cr have, is left out.

    Raises:
        ValueError: an unknown data set, one whose labels are scores, an absent folder or file,
            shots or a seed that are not there (the message lists those that are), a row with the
            wrong number of fields, an unknown label or an empty text, each with file and line.

    Example:
        task = load("SST-2", root="k-shot-1k-test", shots=16, seed=13)
    """
    spec = _known(dataset)
    if root is None:
        raise ValueError("root=None: pass the folder that holds the k-shot data sets as root=")
    folder = Path(root) / (spec.folder or dataset)
    sample = _sample(Path(root), folder, dataset, shots, seed)
    splits: dict[str, list[Example]] = {}
    for split, file in zip(_SPLITS, spec.files, strict=True):
        own, shared = sample / file, folder / file
        path = shared if split == "test" and not _exists(own) else own
        if not _exists(path):
            also = f" nor {shared}" if split == "test" else ""
            raise ValueError(
                f"{own}: no such file{also} (nor with .gz added); the {split} split of {dataset!r} "
                "is read from it, check root="
            )
        splits[split] = list(_read(path, spec))
        if spec.skip_empty:
            splits[split] = [row for row in splits[split] if row.text]
        if not splits[split]:
            raise ValueError(f"{path}: no examples; every split needs some")
    return make_task(f"{dataset} {shots}-{seed}", spec.labels, splits)


def _known(dataset: str) -> Known:
    if dataset in _SCORED:
        raise ValueError(
            f"dataset={dataset!r} has scores from 0 to 5, not classes, and a classification task "
            f"cannot learn them; choose from {', '.join(KNOWN)}"
        )
    if dataset not in KNOWN:
        lower = {name.lower(): name for name in KNOWN}
        close = difflib.get_close_matches(str(dataset).lower(), lower, n=3)
        hint = f"did you mean {' or '.join(lower[name] for name in close)}? " if close else ""
        raise ValueError(
            f"dataset={dataset!r} is not a k-shot data set; {hint}Choose from {', '.join(KNOWN)}"
        )
    return KNOWN[dataset]


def _sample(root: Path, folder: Path, dataset: str, shots: int, seed: int) -> Path:
    """Return the folder of one sample, which is named k-seed."""
    if not folder.is_dir():
        raise ValueError(
            f"root={str(root)!r}: data set {dataset!r} expects the folder {str(folder)!r} with "
            "folders such as 16-13 in it; pass the folder that contains it as root="
        )
    found: dict[int, dict[int, Path]] = defaultdict(dict)
    for path in folder.iterdir():
        if path.is_dir() and re.fullmatch(r"[0-9]+-[0-9]+", path.name):
            k, s = map(int, path.name.split("-"))
            found[k][s] = path
    if seed not in found.get(shots, {}):
        there = [f"shots={k} with seed={sorted(seeds)}" for k, seeds in sorted(found.items())]
        raise ValueError(
            f"shots={shots!r}, seed={seed!r}: {str(folder)!r} has no such sample; choose from "
            f"{', '.join(there) or 'none: it has no folder named as 16-13'}"
        )
    return found[shots][seed]


def _exists(path: Path) -> bool:
    return path.is_file() or path.with_name(path.name + ".gz").is_file()


def _read(path: Path, spec: Known) -> Iterator[Example]:
    rows, header = _cells(path), list[str]()
    if isinstance(spec.text, str):
        _, header = next(rows, (1, header))
        if not header:
            return
    named = [spec.text, spec.label, *([] if spec.pair is None else [spec.pair])]
    columns = [_column(path, header, column) for column in named]
    widths = spec.widths or (len(header),)
    for number, line in rows:
        for cells in _parted(line) if spec.glued else [line]:
            if len(cells) not in widths:
                raise ValueError(
                    f"{path}:{number}: {len(cells)} fields where "
                    f"{' or '.join(map(str, widths))} were expected; check the row for stray "
                    "separators and quotes"
                )
            text, label, *pair = (cells[column].strip() for column in columns)
            yield Example(text, label, pair[0] if pair else None, f"{path}:{number}")


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, fields); in csv files alone are quotes syntax."""
    content = files.read_text(path, "utf-8")
    if path.suffix == ".tsv":
        for number, line in enumerate(files.lines(content), start=1):
            if line.strip():
                yield number, line.split("\t")
        return
    reader, number = csv.reader(io.StringIO(content, newline=""), strict=True), 1
    try:
        for cells in reader:
            if cells:
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}:{number}: {error}; put the whole text in quotes and double those inside it"
        ) from error


def _parted(cells: list[str]) -> list[list[str]]:
    """Undo what shuffling CoLA's test lines did to the one that has no line feed.

    NOTE(paper): LM-BFF reads the two rows on that line as one, its text ending in the next row's
    source code ("himself.kl93"), and so has one test row less.
    """
    both = re.fullmatch(r"(.*\W)([a-z]+[-_]?[0-9]+)", cells[3]) if len(cells) == 7 else None
    return [[*cells[:3], both[1]], [both[2], *cells[4:]]] if both else [cells]


def _column(path: Path, header: list[str], column: str | int) -> int:
    if isinstance(column, int):
        return column
    if column not in header:
        raise ValueError(f"{path}:1: no column {column!r}; the header has {', '.join(header)}")
    return header.index(column)
