"""Classification tasks from files: TSV, CSV, JSON lines and `label sentence` lines.

Every error names the file and the line. Where a path does not exist but the same path with `.gz`
does, that is read instead. `data.public_sets` has the layouts of well-known data sets.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from data.task import Example, Task, make_task

KINDS = ("csv", "jsonl", "lines", "tsv")


class Layout(NamedTuple):
    """How a file holds its examples.

    Attributes:
        kind: one of `KINDS`; "lines" is one `label sentence` per line.
        text: column of the text: its name, or its index where there is no header.
        label: column of the label, likewise.
        pair: column of the second text, or None.
        header: the first line of a csv or tsv file names the columns.
        quoting: csv quotes are syntax. Off, a quote is a character like any other, as in the
            GLUE files.
        encoding: text encoding; a leading byte-order mark is dropped from utf-8.
        skip_empty: leave out rows without a text instead of raising.
    """

    kind: str
    text: str | int = "text"
    label: str | int = "label"
    pair: str | int | None = None
    header: bool = True
    quoting: bool = False
    encoding: str = "utf-8"
    skip_empty: bool = False


def load(
    files: Mapping[str, str | Path],
    layout: Layout,
    *,
    name: str = "files",
    labels: Mapping[str, str] | tuple[str, ...] | None = None,
) -> Task:
    """Return a task read from one file per split.

    Args:
        files: split name -> path.
        layout: how the files are written.
        name: what reports call the task.
        labels: class order, as names or as {written label: name}. None takes the labels of the
            "train" file (of the first file where there is none), sorted; a label that only
            another file has is then an error too.

    Returns:
        A checked task, its examples in file order.

    Raises:
        ValueError: an absent or empty file, an unknown kind or column, a malformed row or JSON
            line, bytes outside the encoding, an empty text or an unknown label; each with file
            and line.

    Example:
        task = load({"train": "train.tsv", "dev": "dev.tsv"}, Layout("tsv", text="sentence"))
    """
    if not files:
        raise ValueError("files is empty; give {'train': path} at least")
    splits = {split: list(read_examples(Path(path), layout)) for split, path in files.items()}
    if labels is None:
        source = splits.get("train", next(iter(splits.values())))
        labels = tuple(sorted({row.label for row in source}))
    names = dict(labels) if isinstance(labels, Mapping) else {label: label for label in labels}
    renamed = {split: [_rename(row, names) for row in rows] for split, rows in splits.items()}
    return make_task(name, names.values(), renamed)


def read_examples(path: Path, layout: Layout) -> Iterator[Example]:
    """Yield the examples of one file in order, labels as written in it.

    Args:
        path: the file; `path` + ".gz" is read where it exists and `path` does not.
        layout: how the file is written.

    Raises:
        ValueError: see `load`.
    """
    if layout.kind not in KINDS:
        raise ValueError(f"kind={layout.kind!r} is unknown; choose from {', '.join(KINDS)}")
    content = read_text(path, layout.encoding)
    if not content.strip():
        raise ValueError(f"{path}: the file is empty; every split needs examples")
    read = {"jsonl": _jsonl_rows, "lines": _line_rows}.get(layout.kind, _table_rows)
    count = 0
    for line, text, label, pair in read(path, content, layout):
        blank = not text.strip() or (pair is not None and not pair.strip())
        if blank and layout.skip_empty:
            continue
        if blank:
            raise ValueError(
                f"{path}:{line}: empty text; fill the row, remove it or set skip_empty=True"
            )
        count += 1
        yield Example(text.strip(), label.strip(), pair.strip() if pair else None, f"{path}:{line}")
    if not count:
        raise ValueError(f"{path}: no examples below the header; every split needs some")


Row = tuple[int, str, str, str | None]


def read_text(path: Path, encoding: str) -> str:
    """Return the content of a text file, plain or gzip, with errors that name it."""
    zipped = path.with_name(path.name + ".gz")
    found = path if path.is_file() or not zipped.is_file() else zipped
    if not found.is_file():
        raise ValueError(f"{path}: no such file, and none with .gz added; check the path")
    content = found.read_bytes()
    if found.suffix == ".gz":
        content = gzip.decompress(content)
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{found}:{line}: byte 0x{content[error.start]:02x} is not {encoding}; "
            "pass encoding= (older data sets are often 'latin-1')"
        ) from error


def lines(text: str) -> list[str]:
    """Split at line feeds alone: str.splitlines also splits at control characters in the text."""
    found = [line.removesuffix("\r") for line in text.split("\n")]
    return found[:-1] if not found[-1] else found


def _line_rows(path: Path, text: str, layout: Layout) -> Iterator[Row]:
    for number, line in enumerate(lines(text), start=1):
        label, space, sentence = line.partition(" ")
        if not label or not space and not layout.skip_empty:
            raise ValueError(
                f"{path}:{number}: {line[:60]!r} is not 'label sentence'; write the label, one "
                "space and the sentence"
            )
        yield number, sentence, label, None


def _jsonl_rows(path: Path, text: str, layout: Layout) -> Iterator[Row]:
    for number, line in enumerate(lines(text), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: malformed JSON ({error.msg} at column {error.colno}); "
                "write one object per line"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected an object, found {line[:60]!r}")
        columns = [layout.text, layout.label, *([] if layout.pair is None else [layout.pair])]
        for column in columns:
            if record.get(column) is None:
                raise ValueError(
                    f"{path}:{number}: no value for {column!r}; the object has "
                    f"{', '.join(map(str, record))}. Set the text=, label= and pair= columns"
                )
        values = [str(record[column]) for column in columns]
        yield number, values[0], values[1], values[2] if layout.pair is not None else None


def _table_rows(path: Path, text: str, layout: Layout) -> Iterator[Row]:
    rows = _split_table(path, text, layout)
    if layout.header:
        _, header = next(rows)
    else:
        header = None
    columns = [_column(path, header, c) for c in (layout.text, layout.label)]
    if layout.pair is not None:
        columns.append(_column(path, header, layout.pair))
    width = len(header) if header is not None else max(columns) + 1
    for number, cells in rows:
        if len(cells) < width or (header is not None and len(cells) != width):
            raise ValueError(
                f"{path}:{number}: {len(cells)} columns where {width} were expected; check the "
                "kind= of the layout and quoting= (quotes as characters, or as syntax)"
            )
        values = [cells[column] for column in columns]
        yield number, values[0], values[1], values[2] if layout.pair is not None else None


def _split_table(path: Path, text: str, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    delimiter = "\t" if layout.kind == "tsv" else ","
    if not layout.quoting:
        for number, line in enumerate(lines(text), start=1):
            if line.strip():
                yield number, line.split(delimiter)
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}:{line}: {error}; set quoting=False where quotes are plain characters"
        ) from error


def _column(path: Path, header: list[str] | None, column: str | int) -> int:
    if isinstance(column, int):
        if header is not None and not 0 <= column < len(header):
            raise ValueError(f"{path}:1: no column {column}; the header has {len(header)} columns")
        return column
    if header is None:
        raise ValueError(
            f"{path}: column {column!r} is a name but header=False; give the column's index"
        )
    if column not in header:
        raise ValueError(f"{path}:1: no column {column!r}; the header has {', '.join(header)}")
    return header.index(column)


def _rename(row: Example, names: dict[str, str]) -> Example:
    if row.label not in names:
        raise ValueError(
            f"{row.origin}: unknown label {row.label!r}; known labels are {', '.join(names)}. "
            "Correct the row, or pass labels= with every label"
        )
    return row._replace(label=names[row.label])
