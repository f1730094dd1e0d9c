"""The k-shot samples: the published files where they are, and small ones of every layout."""

import collections
import gzip
from pathlib import Path
from typing import Any

import pytest

import data
from data import kshot
from data.task import Example

ROOT = Path(__file__).parents[1] / "../shared/data/kshot_mezo"
SEEDS = (13, 21, 42, 87, 100)
SAMPLES = [(name, 16, seed) for name in kshot.KNOWN for seed in SEEDS] + [
    (name, 512, 42)
    for name in ("CoLA", "MRPC", "RTE", "SST-2", "cr", "mr", "sst-5", "subj", "trec")
]
# Of the samples with fewer than k rows in a class: rows of each class of train and dev. What cr
# lacks at k = 16 are rows without a text.
SHORT = {
    ("cr", 16, 13): ([16, 15], [16, 16]),
    ("cr", 16, 42): ([15, 16], [16, 16]),
    ("cr", 512, 42): ([367, 512], [0, 511]),
    ("trec", 512, 42): ([512, 512, 86, 512, 512, 512], [512, 512, 0, 512, 323, 384]),
}
# Texts that are in train and dev of one sample because the original data has them twice.
REPEATED = {("cr", 512, 42): 1, ("mpqa", 16, 42): 2, ("sst-5", 512, 42): 3, ("trec", 512, 42): 35}
# Rows of each class of the test files; CoLA's differ between seeds.
TEST_ROWS = {
    "MNLI": [349, 333, 318],
    "MNLI-mm": [334, 350, 316],
    "MRPC": [129, 279],
    "QNLI": [502, 498],
    "QQP": [617, 383],
    "RTE": [146, 131],
    "SNLI": [341, 347, 312],
    "SST-2": [428, 444],
    "cr": [507, 493],
    "mpqa": [507, 493],
    "mr": [507, 493],
    "sst-5": [133, 276, 192, 219, 180],
    "subj": [507, 493],
    "trec": [138, 94, 9, 65, 81, 113],
}


def load(name: str, **options):
    if not ROOT.is_dir():
        pytest.skip("../shared/data/kshot_mezo does not hold the k-shot data sets")
    return kshot.load(name, root=ROOT, **options)


def per_class(task: data.Task, split: str) -> list[int]:
    count = collections.Counter(row.label for row in task.splits[split])
    assert set(count) <= set(task.labels)
    return [count[label] for label in task.labels]


# --- the published files ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shots", "seed"), SAMPLES)
def test_every_class_has_k_rows(name, shots, seed):
    task = load(name, shots=shots, seed=seed)
    full = [shots] * len(task.labels)
    train, dev = SHORT.get((name, shots, seed), (full, full))
    assert list(task.splits) == ["train", "dev", "test"]
    assert (per_class(task, "train"), per_class(task, "dev")) == (train, dev)
    if name == "CoLA":
        assert sum(per_class(task, "test")) == 1000
    else:
        assert per_class(task, "test") == TEST_ROWS[name]
    texts = [{(row.text, row.pair) for row in task.splits[s]} for s in ("train", "dev")]
    assert len(texts[0] & texts[1]) == REPEATED.get((name, shots, seed), 0)
    origins = [row.origin for rows in task.splits.values() for row in rows]
    # The line of CoLA's test file with two rows on it is the origin of both.
    assert len(origins) - len(set(origins)) == (name == "CoLA")
    paired = {row.pair is not None for rows in task.splits.values() for row in rows}
    assert paired == {kshot.KNOWN[name].pair is not None}


def test_the_samples_in_the_folder_are_those_that_are_tested():
    names = {spec.folder or name for name, spec in kshot.KNOWN.items()}
    assert names == set(kshot.KNOWN) - {"MNLI-mm"} and len(names) == 14
    if not ROOT.is_dir():
        pytest.skip("../shared/data/kshot_mezo does not hold the k-shot data sets")
    found = {(path.parent.name, path.name) for path in ROOT.glob("*/*-*/")}
    tested = {(name, f"{k}-{seed}") for name, k, seed in SAMPLES if name != "MNLI-mm"}
    assert found - {("STS-B", f"16-{seed}") for seed in SEEDS} == tested


FIRST = {
    "CoLA": ("Bill seems to be obnoxious, but I don't think that Sam tends.", "0", None),
    "QQP": (
        "Can I develope mobile apps with c++?",
        "1",
        "How can I develop mobile apps with C++?",
    ),
    "RTE": (
        "Reagan was seriously wounded by a bullet fired by John Hinckley Jr. in an attempted "
        "assassination, but made a remarkably speedy recovery.",
        "entailment",
        "Reagan survived an attempted assassin's bullets.",
    ),
    "SNLI": (
        "The girl sitting by a rock is wearing a black coat, black hat, black gloves but is "
        "covered by a pink blanket.",
        "entailment",
        "a girl wears black",
    ),
    "SST-2": ("well worth revisiting as many times", "1", None),
    "cr": (
        "the touch buttons are textured so that your finger sdon 't slip which was very "
        "thoughtful .",
        "1",
        None,
    ),
    "sst-5": (
        "what 's surprising about this traditional thriller , moderately successful but not "
        "completely satisfying , is exactly how genteel and unsurprising the execution turns "
        "out to be .",
        "3",
        None,
    ),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_train_row(name):
    first = load(name).splits["train"][0]
    assert (first.text, first.label, first.pair) == FIRST[name]
    assert first.origin.endswith((":1", ":2"))


def test_a_seed_gives_the_same_rows_every_time_and_other_seeds_others():
    assert load("trec") == load("trec")
    one, other = load("trec"), load("trec", seed=21)
    assert one.splits["test"] == other.splits["test"]
    assert one.name == "trec 16-13" and other.name == "trec 16-21"
    for split in ("train", "dev"):
        texts = [{row.text for row in task.splits[split]} for task in (one, other)]
        assert len(texts[0] & texts[1]) < 10
    assert load("MNLI").splits["train"] == load("MNLI-mm").splits["train"]


def test_two_rows_on_one_line_of_cola_are_parted():
    rows = load("CoLA", seed=13).splits["test"]
    place = next(i for i, row in enumerate(rows) if "talked to Bill" in row.text)
    assert [row[:2] for row in rows[place : place + 2]] == [
        ("John talked to Bill about himself.", "1"),
        (
            "Each candidate who has interest in semantics will be admitted to the department.",
            "1",
        ),
    ]


# --- small files -----------------------------------------------------------------------------

GLUED = "a_1\t1\t\tAll is well.bc01\t0\t*\tWell is not all.\n"
NLI_HEAD = "sentence1\tgenre\tsentence2\tgold_label\n"
SNLI_HEAD = "0\t1\t2\t3\t4\t5\t6\tsentence1\tsentence2\tlabel1\tgold_label\n"
SNLI_ROW = "0\t1\t2\t3\t4\t5\t6\tA man runs.\tHe moves."
# Data set -> (train file, its content, the examples: text, label, pair, line).
SMALL = {
    "CoLA": (
        "train.tsv",
        'bc01\t0\t*\tNot "well.\r\n\nks08\t1\t\tIt is, well.\n',
        [('Not "well.', "0", None, 1), ("It is, well.", "1", None, 3)],
    ),
    "MNLI": (
        "train.tsv",
        NLI_HEAD + "a\tslate\tb\tneutral\nc\ttravel\td\tcontradiction\n",
        [("a", "neutral", "b", 2), ("c", "contradiction", "d", 3)],
    ),
    "MRPC": (
        "train.tsv",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t5\t6\ta\tb\n0\t7\t8\tc\td\n",
        [("a", "1", "b", 2), ("c", "0", "d", 3)],
    ),
    "QNLI": (
        "train.tsv",
        "index\tquestion\tsentence\tlabel\n5\tWho?\tI.\tnot_entailment\n",
        [("Who?", "not_entailment", "I.", 2)],
    ),
    "SNLI": (
        "train.tsv",
        SNLI_HEAD + SNLI_ROW + "\tneutral" * 2 + "\n" + SNLI_ROW + "\tneutral" * 5 + "\tentailment",
        [
            ("A man runs.", "neutral", "He moves.", 2),
            ("A man runs.", "entailment", "He moves.", 3),
        ],
    ),
    "SST-2": (
        "train.tsv",
        'sentence\tlabel\nan "odd , film \t0\ngood\t1\n',
        [('an "odd , film', "0", None, 2), ("good", "1", None, 3)],
    ),
    "cr": (
        "train.csv",
        '1,"a ""fine"" one , really"\n\n1, \n0,bad\n',
        [('a "fine" one , really', "1", None, 1), ("bad", "0", None, 4)],
    ),
    "sst-5": (
        "train.csv",
        '4,"two\nlines"\n0,bad\n',
        [("two\nlines", "4", None, 1), ("bad", "0", None, 3)],
    ),
}


def write(root: Path, name: str, content: str, *, shots: int = 2, seed: int = 7) -> Path:
    """Write `content` as train, dev and test; the test file is beside the sample."""
    spec = kshot.KNOWN[name]
    folder = root / (spec.folder or name)
    sample = folder / f"{shots}-{seed}"
    sample.mkdir(parents=True, exist_ok=True)
    train, dev, test = spec.files
    for path in (sample / train, sample / dev, folder / test):
        path.write_bytes(content.encode())
    return sample


@pytest.mark.parametrize("name", SMALL)
def test_small_files_of_every_layout(name, tmp_path):
    file, content, expected = SMALL[name]
    sample = write(tmp_path, name, content)
    task = kshot.load(name, root=str(tmp_path), shots=2, seed=7)
    assert task.labels == kshot.KNOWN[name].labels and task.name == f"{name} 2-7"
    rows = [Example(text, label, pair, f"{sample / file}:{n}") for text, label, pair, n in expected]
    assert task.splits["train"] == rows
    for split in ("dev", "test"):
        assert [row[:3] for row in task.splits[split]] == [row[:3] for row in rows]
    assert sample not in Path(task.splits["test"][0].origin).parents


def test_compressed_files_and_a_test_file_of_the_sample(tmp_path):
    sample = write(tmp_path, "mr", "0,bad\n1,good\n")
    (sample / "train.csv").unlink()
    (sample / "train.csv.gz").write_bytes(gzip.compress(b"0,worse\n1,better\n"))
    (sample / "test.csv.gz").write_bytes(gzip.compress(b"0,worst\n1,best\n"))
    task = kshot.load("mr", root=tmp_path, shots=2, seed=7)
    texts = {split: [row.text for row in rows] for split, rows in task.splits.items()}
    assert texts == {
        "train": ["worse", "better"],
        "dev": ["bad", "good"],
        "test": ["worst", "best"],
    }


def test_the_mismatched_rows_of_mnli(tmp_path):
    sample = write(tmp_path, "MNLI", NLI_HEAD + "a\tslate\tb\tneutral\n")
    (tmp_path / "MNLI" / "test_mismatched.tsv").write_text(NLI_HEAD + "e\tverbatim\tf\tneutral\n")
    tasks = [kshot.load(name, root=tmp_path, shots=2, seed=7) for name in ("MNLI", "MNLI-mm")]
    assert [task.splits["test"][0].text for task in tasks] == ["a", "e"]
    assert [task.splits["dev"][0].origin for task in tasks] == [f"{sample}/dev_matched.tsv:2"] * 2


def test_glued_rows_are_of_cola_alone(tmp_path):
    write(tmp_path, "CoLA", GLUED)
    rows = kshot.load("CoLA", root=tmp_path, shots=2, seed=7).splits["test"]
    origin = f"{tmp_path / 'CoLA' / 'test.tsv'}:1"
    assert rows == [
        Example("All is well.", "1", None, origin),
        Example("Well is not all.", "0", None, origin),
    ]


# Data set, content, message.
BAD_FILES = {
    "too many fields": ("mr", "0,bad\n1,good , really\n", r"train.csv:2: 3 fields where 2 were"),
    "too few fields": ("mr", "0\n", r"train.csv:1: 1 fields where 2 were"),
    "header of 2": ("SST-2", "sentence\tlabel\na\t1\nb\n", r"train.tsv:3: 1 fields where 2 were"),
    "wide row": ("SST-2", "sentence\tlabel\na\t1\t1\n", r"train.tsv:2: 3 fields where 2 were"),
    "CoLA of 5": ("CoLA", "a\t1\t\tb\tc\n", r"train.tsv:1: 5 fields where 4 were"),
    "CoLA of 7": ("CoLA", "a\t1\t\tb\tc\td\te\n", r"train.tsv:1: 7 fields where 4 were"),
    "SNLI of 10": ("SNLI", SNLI_HEAD + SNLI_ROW + "\tneutral\n", r"train.tsv:2: 10 fields.*11 or"),
    "SNLI of 16": ("SNLI", SNLI_HEAD + SNLI_ROW + "\tneutral" * 7, r"train.tsv:2: 16 fields.*15"),
    "empty text": ("mr", "0,bad\n1, \n", r"train.csv:2: empty text"),
    "empty tsv text": ("SST-2", "sentence\tlabel\na\t1\n \t0\n", r"train.tsv:3: empty text"),
    "empty pair": ("MNLI", NLI_HEAD + "a\tslate\t \tneutral\n", r"train.tsv:2: empty text"),
    "only blanks": ("cr", "0, \n1, \n", r"train.csv: no examples"),
    "empty file": ("mr", "", r"train.csv: no examples"),
    "empty tsv": ("SST-2", "", r"train.tsv: no examples"),
    "header alone": ("SST-2", "sentence\tlabel\n", r"train.tsv: no examples"),
    "no column": (
        "SST-2",
        "text\tlabel\na\t1\n",
        r"train.tsv:1: no column 'sentence'.*text, label",
    ),
    "unknown label": ("mr", "0,bad\n2,good\n", r"train.csv:2: unknown label '2'; known.* 0, 1"),
    "no gold label": ("MNLI", NLI_HEAD + "a\tslate\tb\t-\n", r"train.tsv:2: unknown label '-'"),
    "open quote": ("mr", '0,bad\n1,"good\n', r"train.csv:2: .*double those inside it"),
    "text after quote": ("mr", '0,bad\n1,"good" film\n', r"train.csv:2: .*double those inside"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_rows_are_named_with_file_and_line(case, tmp_path):
    name, content, message = BAD_FILES[case]
    write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        kshot.load(name, root=tmp_path, shots=2, seed=7)


def test_a_byte_outside_utf8_is_named(tmp_path):
    sample = write(tmp_path, "mr", "0,bad\n")
    (sample / "dev.csv").write_bytes(b"0,bad\n1,caf\xe9\n")
    with pytest.raises(ValueError, match=r"dev.csv:2: byte 0xe9 is not utf-8"):
        kshot.load("mr", root=tmp_path, shots=2, seed=7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sst2", r"dataset='sst2' is not a k-shot data set; did you mean SST-2 or sst-5\?"),
        ("COLA", r"did you mean CoLA"),
        ("imdb", r"dataset='imdb' is not a k-shot data set; Choose from CoLA, MNLI, MNLI-mm"),
        (None, r"dataset=None is not a k-shot data set"),
        ("STS-B", r"dataset='STS-B' has scores from 0 to 5, not classes.*choose from CoLA"),
    ],
)
def test_data_sets_that_are_not_in_the_table(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        kshot.load(name, root=tmp_path)


def test_absent_folders_and_files(tmp_path):
    with pytest.raises(ValueError, match=r"root=None: pass the folder"):
        kshot.load("SST-2")
    with pytest.raises(ValueError, match=r"'MNLI-mm' expects the folder '.*MNLI' with.*root="):
        kshot.load("MNLI-mm", root=tmp_path)
    sample = write(tmp_path, "mr", "0,bad\n1,good\n")
    (tmp_path / "mr" / "test.csv").unlink()
    with pytest.raises(ValueError, match=r"2-7/test.csv: no such file nor .*mr/test.csv.*the test"):
        kshot.load("mr", root=tmp_path, shots=2, seed=7)
    (sample / "dev.csv").rename(tmp_path / "mr" / "dev.csv")
    with pytest.raises(ValueError, match=r"2-7/dev.csv: no such file \(nor with .gz"):
        kshot.load("mr", root=tmp_path, shots=2, seed=7)


def test_shots_and_seeds_that_are_not_there_list_those_that_are(tmp_path):
    for shots, seed in ((16, 100), (16, 21), (512, 42)):
        write(tmp_path, "mr", "0,bad\n1,good\n", shots=shots, seed=seed)
    (tmp_path / "mr" / "16-13").write_text("a file")
    (tmp_path / "mr" / "16-x").mkdir()
    there = r"choose from shots=16 with seed=\[21, 100\], shots=512 with seed=\[42\]$"
    absent: list[tuple[Any, int]] = [(16, 13), (16, 42), (8, 21), (512, 21), ("../mr/16", 21)]
    for shots, seed in absent:
        with pytest.raises(ValueError, match=rf"shots={shots!r}, seed={seed}: .*{there}"):
            kshot.load("mr", root=tmp_path, shots=shots, seed=seed)
    (tmp_path / "subj").mkdir()
    with pytest.raises(ValueError, match=r"none: it has no folder named as 16-13"):
        kshot.load("subj", root=tmp_path)
