"""Public text-classification data sets, read from a folder that holds their published files.

The table `KNOWN` says where each file is below the root and how it is written; `load` reads one.
The data itself is not part of this project: several of the licences allow research use only.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from data import files
from data.files import Layout
from data.task import Task, carve


class Known(NamedTuple):
    """A public data set: its files below a root, their layout, and the splits to make.

    Attributes:
        files: split -> path below the root.
        layout: how the files are written.
        labels: label as written in the file -> label name, in class order.
        carved: new split -> (split to take it from, share of the original file), in this order.
    """

    files: dict[str, str]
    layout: Layout
    labels: dict[str, str]
    carved: dict[str, tuple[str, float]] = {}


_LINES = Layout("lines")
_LATIN_LINES = Layout("lines", encoding="latin-1")
_SENTIMENT = {"0": "negative", "1": "positive"}
_DEV_AND_TEST = {"test": ("train", 0.1), "dev": ("train", 0.1)}
_DEV = {"dev": ("train", 0.1)}

# Tasks whose publishers give no labelled dev or test split have one carved from train by the
# hash of the text. RTE's public dev set is its test set here, since GLUE's test labels are not
# public; CoLA's test is the out-of-domain half of GLUE's dev set.
KNOWN: dict[str, Known] = {
    "cola": Known(
        {
            "train": "cola/in_domain_train.tsv",
            "dev": "cola/in_domain_dev.tsv",
            "test": "cola/out_of_domain_dev.tsv",
        },
        Layout("tsv", text=3, label=1, header=False),
        {"0": "unacceptable", "1": "acceptable"},
    ),
    "mpqa": Known(
        {"train": "text_small/mpqa.all"},
        # Three lines of the published file have a label and no phrase.
        Layout("lines", skip_empty=True),
        _SENTIMENT,
        _DEV_AND_TEST,
    ),
    "mr": Known({"train": "text_small/rt-polarity.all"}, _LATIN_LINES, _SENTIMENT, _DEV_AND_TEST),
    "mrpc": Known(
        {"train": "mrpc/msr_paraphrase_train.txt", "test": "mrpc/msr_paraphrase_test.txt"},
        Layout("tsv", text="#1 String", label="Quality", pair="#2 String"),
        {"0": "not_equivalent", "1": "equivalent"},
        _DEV,
    ),
    "rte": Known(
        {"train": "rte/train.tsv", "test": "rte/dev.tsv"},
        Layout("tsv", text="sentence1", label="label", pair="sentence2"),
        {"entailment": "entailment", "not_entailment": "not_entailment"},
        _DEV,
    ),
    "sick": Known(
        {
            "train": "sick/SICK_train.txt",
            "dev": "sick/SICK_trial.txt",
            "test": "sick/SICK_test_annotated.txt",
        },
        Layout("tsv", text="sentence_A", label="entailment_judgment", pair="sentence_B"),
        {"CONTRADICTION": "contradiction", "NEUTRAL": "neutral", "ENTAILMENT": "entailment"},
    ),
    "sst2": Known(
        {
            "train": "sst/stsa.binary.train",
            "dev": "sst/stsa.binary.dev",
            "test": "sst/stsa.binary.test",
        },
        _LINES,
        _SENTIMENT,
    ),
    "sst5": Known(
        {
            "train": "sst/stsa.fine.train",
            "dev": "sst/stsa.fine.dev",
            "test": "sst/stsa.fine.test",
        },
        _LINES,
        {
            "0": "very negative",
            "1": "negative",
            "2": "neutral",
            "3": "positive",
            "4": "very positive",
        },
    ),
    "subj": Known(
        {"train": "text_small/subj.all"},
        _LATIN_LINES,
        {"0": "subjective", "1": "objective"},
        _DEV_AND_TEST,
    ),
    "trec": Known(
        {"train": "text_small/TREC.train.all", "test": "text_small/TREC.test.all"},
        _LATIN_LINES,
        {
            "0": "description",
            "1": "entity",
            "2": "abbreviation",
            "3": "human",
            "4": "location",
            "5": "number",
        },
        _DEV,
    ),
}


def load(name: str, *, root: str | Path) -> Task:
    """Return a data set of the table `KNOWN`, with splits "train", "dev" and "test".

    Args:
        name: a key of `KNOWN`.
        root: folder that holds the data sets' own folders (`sst`, `text_small`, ...).

    Returns:
        The task. Splits that the data set does not have are carved from train, the same for
        everyone, with equal texts kept together.

    Raises:
        ValueError: an unknown name, or the data set's folder is absent below `root`.

    Example:
        task = load("sst2", root="../shared/data")
    """
    if name not in KNOWN:
        raise ValueError(f"name={name!r} is not in the table; choose from {', '.join(KNOWN)}")
    spec, root = KNOWN[name], Path(root)
    expected = sorted({root / Path(path).parent for path in spec.files.values()})
    for folder in expected:
        if not folder.is_dir():
            raise ValueError(
                f"root={str(root)!r}: data set {name!r} expects the folder {str(folder)!r} with "
                f"{', '.join(Path(path).name for path in spec.files.values())} (or .gz); "
                "pass the folder that contains it as root="
            )
    task = files.load(
        {split: root / path for split, path in spec.files.items()},
        spec.layout,
        name=name,
        labels=spec.labels,
    )
    splits = dict(task.splits)
    total = len(splits["train"])
    for split, (source, share) in spec.carved.items():
        splits[source], splits[split] = carve(
            splits[source], share * total / len(splits[source]), name=split
        )
    return task._replace(splits={split: splits[split] for split in ("train", "dev", "test")})
