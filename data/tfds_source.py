"""Classification tasks from tensorflow-datasets, read as array_record files without TensorFlow.

Needs the packages tensorflow-datasets and importlib_resources. `load` takes the name of a data
set that is prepared in `data_dir`, or the folder of a builder that was written with
`file_format="array_record"` (the default format needs TensorFlow to be read).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from data.task import Example, Task, make_task

# GLUE's builder is registered only once its module is imported.
_LEGACY = {"glue": "tensorflow_datasets.text.glue"}


def load(
    source: str | Path,
    *,
    text: str = "sentence",
    label: str = "label",
    pair: str | None = None,
    data_dir: str | Path | None = None,
    splits: Mapping[str, str] | None = None,
) -> Task:
    """Return a task from a tensorflow-datasets builder.

    Args:
        source: data-set name such as "glue/sst2", or the folder of a prepared builder.
        text: feature that holds the text.
        label: feature that holds the class; a ClassLabel or a text feature.
        pair: feature of the second text of a pair, or None.
        data_dir: where named data sets are prepared; the package's default where None.
        splits: split of the task -> split expression, such as {"dev": "train[90%:]"}. None takes
            every labelled split, with "validation" called "dev"; a split whose labels are all -1
            (GLUE's hidden test sets) is left out.

    Returns:
        The checked task. A ClassLabel's names, in order, are the labels; otherwise the distinct
        labels of the first split, sorted.

    Raises:
        ImportError: tensorflow-datasets is not installed.
        ValueError: the builder is not there, was not prepared as array_record, or lacks a
            feature or a split.

    Example:
        task = load("glue/sst2", data_dir="datasets", splits={"train": "train[:1000]"})
    """
    tfds = _import_tfds()
    builder = _builder(tfds, source, data_dir)
    features = builder.info.features
    for argument, column in (("text", text), ("label", label), ("pair", pair)):
        if column is not None and column not in features:
            raise ValueError(
                f"{argument}={column!r}: data set {str(source)!r} has the features "
                f"{', '.join(features)}; choose one of them"
            )
    names = getattr(features[label], "names", None)
    wanted = dict(splits) if splits else _default_splits(builder, source)
    rows = {
        split: _examples(f"{source}[{expression}]", data, names, (text, label, pair))
        for split, expression in wanted.items()
        for data in [_data_source(builder, source, expression)]
    }
    if splits is None:
        rows = {split: found for split, found in rows.items() if found}
    if not rows:
        raise ValueError(f"{str(source)!r} has no labelled split; pass splits= or another label=")
    labels = names or sorted({row.label for row in next(iter(rows.values()))})
    return make_task(str(source), labels, rows)


def _import_tfds() -> ModuleType:
    try:
        return importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise ImportError(
            "reading tensorflow-datasets needs the packages tensorflow-datasets and "
            f"importlib_resources ({error}); run: pip install tensorflow-datasets "
            "importlib_resources"
        ) from error


def _builder(tfds: ModuleType, source: str | Path, data_dir: str | Path | None) -> Any:
    if Path(source).is_dir():
        try:
            return tfds.builder_from_directory(str(source))
        except Exception as error:
            raise ValueError(
                f"source={str(source)!r} is a folder without a prepared builder ({error}); pass "
                "the folder with dataset_info.json, usually <data_dir>/<name>/<version>"
            ) from error
    legacy = _LEGACY.get(str(source).split("/")[0])
    if legacy is not None:
        importlib.import_module(legacy)
    options = {} if data_dir is None else {"data_dir": str(data_dir)}
    try:
        return tfds.builder(str(source), file_format="array_record", **options)
    except Exception as error:
        # The package appends a list of every data set it knows: its first line says enough.
        reason = str(error).split("\n", 1)[0]
        raise ValueError(
            f"source={str(source)!r} is neither a folder nor a data set that tensorflow-datasets "
            f"can open ({reason}); check the name and data_dir={data_dir!r}"
        ) from error


def _default_splits(builder: Any, source: str | Path) -> dict[str, str]:
    names = list(builder.info.splits)
    if not names:
        raise ValueError(
            f"{str(source)!r} has no prepared split in {builder.data_dir}; run "
            "download_and_prepare() of its builder once with file_format='array_record', or pass "
            "splits="
        )
    return {"dev" if name == "validation" else name: name for name in names}


def _data_source(builder: Any, source: str | Path, expression: str) -> Any:
    try:
        return builder.as_data_source(split=expression)
    except Exception as error:
        raise ValueError(
            f"split {expression!r} of {str(source)!r} cannot be read ({error}); it must exist and "
            "be prepared with file_format='array_record'"
        ) from error


def _examples(
    place: str,
    records: Iterable[Mapping[str, Any]],
    names: list[str] | None,
    columns: tuple[str, str, str | None],
) -> list[Example]:
    """Read every record; an empty list where the whole split has hidden labels (-1)."""
    text, label, pair = columns
    found, hidden = [], 0
    for index, record in enumerate(records):
        value = record[label]
        if names is not None and int(value) < 0:
            hidden += 1
            continue
        found.append(
            Example(
                _decode(record[text]),
                _decode(value) if names is None else names[int(value)],
                None if pair is None else _decode(record[pair]),
                f"{place}:{index}",
            )
        )
    if hidden and found:
        raise ValueError(
            f"{place}: {hidden} of {hidden + len(found)} labels are -1 (hidden); pass splits= "
            "without them"
        )
    return found


def _decode(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
