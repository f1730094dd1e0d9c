"""Tasks, their splits, and the errors of reading them."""

import collections
import csv
import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

import data
from data import files, public_sets, stdlib_docs
from data.files import Layout
from data.task import Example, carve, limit, make_task

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path("../shared/data")


@pytest.fixture(scope="module")
def docs():
    return data.load("stdlib_docs")


# --- task.py ---------------------------------------------------------------------------------


def test_a_task_names_the_place_of_a_bad_example():
    rows = [Example("fine", "yes"), Example("bad", "maybe", origin="reviews.tsv:7")]
    with pytest.raises(ValueError, match="reviews.tsv:7: unknown label 'maybe'.*no, yes.*`labels`"):
        make_task("t", ("no", "yes"), {"train": rows})
    with pytest.raises(ValueError, match="split 'train', example 0: empty text"):
        make_task("t", ("no", "yes"), {"train": [Example("  ", "yes")]})
    with pytest.raises(ValueError, match="m.py: empty text"):
        make_task("t", ("no", "yes"), {"train": [Example("a", "yes", "", "m.py")]})
    with pytest.raises(ValueError, match="mixes single texts and pairs"):
        make_task("t", ("no", "yes"), {"train": [Example("a", "yes"), Example("a", "yes", "b")]})


@pytest.mark.parametrize(
    ("labels", "splits", "message"),
    [
        (("a",), {"train": [Example("x", "a")]}, "at least two distinct"),
        (("a", "a"), {"train": [Example("x", "a")]}, "at least two distinct"),
        (("a", "b"), {}, "give at least a 'train' split"),
        (("a", "b"), {"dev": []}, "split 'dev' of task 't' has no examples"),
    ],
)
def test_a_task_needs_labels_and_examples(labels, splits, message):
    with pytest.raises(ValueError, match=message):
        make_task("t", labels, splits)


def test_limit_takes_labels_in_turn_whatever_the_order():
    rows = [Example(f"text {i}", "ab"[i % 10 == 0]) for i in range(100)]
    small = limit(make_task("t", "ab", {"train": rows}), 12).splits["train"]
    other = limit(make_task("t", "ab", {"train": rows[::-1]}), 12).splits["train"]
    assert small == other
    assert collections.Counter(row.label for row in small) == {"a": 6, "b": 6}
    with pytest.raises(ValueError, match="limit=1 is smaller than the 2 labels"):
        limit(make_task("t", "ab", {"train": rows}), 1)


def test_carve_keeps_equal_texts_together_whatever_the_order():
    rows = [Example(f"text {i % 50}", "a", origin=str(i)) for i in range(100)]
    rest, held = carve(rows, 0.2)
    assert sorted(rest + held, key=str) == sorted(rows, key=str)
    assert len({row.text for row in held}) == 10
    assert not {row.text for row in rest} & {row.text for row in held}
    assert {row.text for row in carve(rows[::-1], 0.2)[1]} == {row.text for row in held}
    assert {row.text for row in carve(rows, 0.2, name="x")[1]} != {row.text for row in held}
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="outside"):
            carve(rows, share)
    with pytest.raises(ValueError, match="leaves one side empty"):
        carve(rows[:2], 0.1)


# --- stdlib_docs.py --------------------------------------------------------------------------


def test_no_module_and_no_text_is_in_two_splits(docs):
    modules = {s: {row.origin for row in rows} for s, rows in docs.splits.items()}
    texts = {
        s: [stdlib_docs.normalise(row.text) for row in rows] for s, rows in docs.splits.items()
    }
    assert list(modules) == ["train", "dev", "test"]
    for one, two in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not modules[one] & modules[two]
        assert not set(texts[one]) & set(texts[two])
    for split, found in texts.items():
        assert len(found) == len(set(found)), split
    plain = stdlib_docs.load(names=False)
    found = [stdlib_docs.normalise(row.text) for rows in plain.splits.values() for row in rows]
    assert len(found) == len(set(found)) == sum(map(len, texts.values()))
    assert all(len(row.text.split()) >= 5 for rows in plain.splits.values() for row in rows)


def test_every_split_has_a_share_of_every_area(docs):
    counts = {s: collections.Counter(row.label for row in r) for s, r in docs.splits.items()}
    assert len(docs.labels) >= 8
    for label in docs.labels:
        total = sum(count[label] for count in counts.values())
        for split, share in stdlib_docs.SHARES.items():
            assert abs(counts[split][label] / total - share) < 0.06, (label, split)


def test_labels_are_areas_of_the_modules(docs):
    assert set(docs.labels) <= set(stdlib_docs.AREAS)
    for rows in docs.splits.values():
        assert all(stdlib_docs.area_of(row.origin) == row.label for row in rows)
    assert stdlib_docs.area_of("asyncio.locks") == "concurrency"
    assert stdlib_docs.area_of("email") == "mail, markup and encodings"
    assert stdlib_docs.area_of("emails") is None
    listed = [module for modules in stdlib_docs.AREAS.values() for module in modules.split()]
    assert len(listed) == len(set(listed))


def test_the_object_name_leads_the_text_without_its_module(docs):
    rows = [row for split in docs.splits.values() for row in split if row.origin == "threading"]
    texts = [row.text for row in rows]
    assert any(text.startswith("Event.wait: Block until") for text in texts)
    assert not any(text.startswith("threading.") for text in texts)


def test_docstrings_do_not_depend_on_the_hash_seed():
    code = (
        "import data, hashlib; t = data.load('stdlib_docs');"
        "print(hashlib.sha256(repr((t.labels, list(t.splits.items()))).encode()).hexdigest())"
    )
    digests = set()
    for seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(result.stdout)
    assert len(digests) == 1


def small_library(folder: Path) -> Path:
    """Write a library of nine modules in three areas, with traps."""
    same = '"""One sentence that several modules share here."""\n'
    for area in ("asyncio", "tkinter", "email"):
        (folder / area).mkdir(parents=True)
        for i in range(3):
            body = f'class C{i}:\n    def go(self):\n        """{area} words number {i} of it."""\n'
            (folder / area / f"m{i}.py").write_text(same + body)
    (folder / "ast.py").write_text('"""Short docstring."""\n')
    (folder / "site-packages" / "asyncio").mkdir(parents=True)
    (folder / "site-packages" / "asyncio" / "m.py").write_text('"""This is not of the library."""')
    (folder / "tkinter" / "test").mkdir()
    (folder / "tkinter" / "test" / "m.py").write_text('"""This is only a test of it."""')
    return folder


def test_shared_texts_tests_and_small_areas_are_left_out(tmp_path):
    task = stdlib_docs.load(root=small_library(tmp_path))
    assert task.labels == ("concurrency", "graphical interfaces", "mail, markup and encodings")
    texts = sorted(row.text for rows in task.splits.values() for row in rows)
    assert len(texts) == 9
    assert texts[0] == "C0.go: asyncio words number 0 of it."
    with pytest.raises(ValueError, match="has no ast.py"):
        stdlib_docs.load(root=tmp_path / "asyncio")
    with pytest.raises(ValueError, match="min_words=0"):
        stdlib_docs.load(min_words=0)


def test_divide_comes_near_the_shares_and_fills_every_split():
    sizes = {f"m{i}": 1 + i for i in range(40)}
    assigned = stdlib_docs.divide(sizes)
    assert assigned == stdlib_docs.divide(dict(reversed(sizes.items())))
    for split, share in stdlib_docs.SHARES.items():
        got = sum(sizes[m] for m, s in assigned.items() if s == split) / sum(sizes.values())
        assert abs(got - share) < 0.01
    assert set(stdlib_docs.divide({"big": 900, "b": 1, "c": 1}).values()) == {
        "train",
        "dev",
        "test",
    }
    with pytest.raises(ValueError, match="2 modules for 3 splits"):
        stdlib_docs.divide({"a": 1, "b": 2})


# --- files.py, public_sets.py ----------------------------------------------------------------


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_tsv_with_quotes_mark_and_pairs(tmp_path):
    path = write(tmp_path / "a.tsv", '\ufeffq\ts1\ts2\r\n1\tsay "no\tb\r\n0\tc\td "e"\r\n')
    layout = Layout("tsv", text="s1", label="q", pair="s2")
    task = data.load("files", files={"train": path}, layout=layout)
    assert task.labels == ("0", "1")
    assert task.splits["train"][0] == Example('say "no', "1", "b", f"{path}:2")
    assert task.splits["train"][1][:3] == ("c", "0", 'd "e"')


def test_csv_with_quoted_line_breaks(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["a, b\nc", "x"], ['d "e"', "y"], ["f", "z"]])
    layout = Layout("csv", text=0, label=1, header=False, quoting=True)
    rows = files.load({"train": path}, layout).splits["train"]
    assert [row.text for row in rows] == ["a, b\nc", 'd "e"', "f"]
    assert [row.origin for row in rows] == [f"{path}:{line}" for line in (1, 3, 4)]


def test_jsonl_and_compressed_latin_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"t": "x", "y": 1}\n\n{"t": "z", "y": 0}\n')
    rows = files.load({"train": path}, Layout("jsonl", text="t", label="y")).splits["train"]
    assert rows == [Example("x", "1", None, f"{path}:1"), Example("z", "0", None, f"{path}:3")]
    content = "0 caf\xe9 \x85 au lait\n1 th\xe9\n".encode("latin-1")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(content))
    names = {"1": "tea", "0": "coffee"}
    task = files.load(
        {"train": tmp_path / "b.txt"}, Layout("lines", encoding="latin-1"), labels=names
    )
    assert task.labels == ("tea", "coffee")
    assert [row[:2] for row in task.splits["train"]] == [
        ("caf\xe9 \x85 au lait", "coffee"),
        ("th\xe9", "tea"),
    ]
    with pytest.raises(ValueError, match=r"b.txt.gz:1: byte 0xe9 is not utf-8.*latin-1"):
        files.load({"train": tmp_path / "b.txt"}, Layout("lines"))


NAMED = Layout("tsv", text="s", label="y")
QUOTED = Layout("csv", text=0, label=1, header=False, quoting=True)
BAD_FILES = {
    "empty text": (NAMED, "s\ty\na\t1\n \t0\n", r"f:3: empty text.*skip_empty"),
    "empty file": (NAMED, "\n", r"f: the file is empty"),
    "header alone": (NAMED, "s\ty\n", r"f: no examples below the header"),
    "few columns": (NAMED, "s\ty\na\n", r"f:2: 1 columns where 2 were expected"),
    "many columns": (NAMED, "s\ty\na\tb\tc\n", r"f:2: 3 columns where 2"),
    "no column": (NAMED, "t\ty\na\t1\n", r"f:1: no column 's'; the header has t, y"),
    "no index": (NAMED._replace(text=5), "s\ty\na\t1\n", r"f:1: no column 5"),
    "name without header": (NAMED._replace(header=False), "a\t1\n", "is a name but header=False"),
    "short row by index": (QUOTED, "a,1\nb\n", r"f:2: 1 columns where 2"),
    "open quote": (QUOTED, 'a,1\n"b,0\n', r"f:2: .*quoting=False"),
    "bad json": (Layout("jsonl"), '{"text": "a", "label": 1}\n{"text"\n', r"f:2: malformed JSON"),
    "json list": (Layout("jsonl"), "[1]\n", r"f:1: expected an object"),
    "json key": (Layout("jsonl"), '{"text": "a", "y": 1}\n', r"f:1: no value for 'label'.*text, y"),
    "no sentence": (Layout("lines"), "1 fine\nbad\n", r"f:2: 'bad' is not 'label sentence'"),
    "one label": (Layout("lines"), "1 fine\n", "at least two distinct"),
    "kind": (Layout("xml"), "a", "kind='xml' is unknown; choose from csv, jsonl, lines, tsv"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named_with_the_line(case, tmp_path):
    layout, content, message = BAD_FILES[case]
    with pytest.raises(ValueError, match=message):
        files.load({"train": write(tmp_path / "f", content)}, layout)


def test_unknown_labels_absent_files_and_skipped_rows(tmp_path):
    train = write(tmp_path / "train", "a one\nb two\n")
    dev = write(tmp_path / "dev", "a one\nc two\n")
    with pytest.raises(ValueError, match=r"dev:2: unknown label 'c'; known labels are a, b"):
        files.load({"train": train, "dev": dev}, Layout("lines"))
    with pytest.raises(ValueError, match=r"train:1: unknown label 'a'; known labels are x, b"):
        files.load({"train": train}, Layout("lines"), labels=("x", "b"))
    with pytest.raises(ValueError, match="nowhere: no such file"):
        files.load({"train": tmp_path / "nowhere"}, Layout("lines"))
    with pytest.raises(ValueError, match="files is empty"):
        files.load({}, Layout("lines"))
    holes = write(tmp_path / "holes", "a one\nb \nb\nb two\n")
    rows = files.load({"train": holes}, Layout("lines", skip_empty=True)).splits["train"]
    assert [row.origin for row in rows] == [f"{holes}:1", f"{holes}:4"]


def test_a_public_set_says_which_folder_it_expects(tmp_path):
    with pytest.raises(ValueError, match=r"expects the folder '.*sst'.*stsa.binary.train.*root="):
        data.load("sst2", root=tmp_path)
    with pytest.raises(ValueError, match="name='nope' is not in the table"):
        public_sets.load("nope", root=tmp_path)


# Rows of the published files, and (train, dev, test) after carving.
PUBLIC_ROWS = {
    "cola": (8551, 527, 516),
    "mpqa": (8433, 1061, 1109),
    "mr": (8530, 1066, 1066),
    "mrpc": (3668, 408, 1725),
    "rte": (2241, 249, 277),
    "sick": (4500, 500, 4927),
    "sst2": (6920, 872, 1821),
    "sst5": (8544, 1101, 2210),
    "subj": (8000, 1000, 1000),
    "trec": (4905, 547, 500),
}


@pytest.mark.parametrize("name", public_sets.KNOWN)
def test_public_sets_have_their_published_rows(name):
    spec = public_sets.KNOWN[name]
    folders = {(SHARED / path).parent for path in spec.files.values()}
    if not all(folder.is_dir() for folder in folders):
        pytest.skip(f"{SHARED} does not hold the data set {name}")
    task = data.load(name, root=SHARED)
    assert tuple(map(len, task.splits.values())) == PUBLIC_ROWS[name]
    for rows in task.splits.values():
        assert {row.label for row in rows} == set(task.labels)
    for split, (source, _) in spec.carved.items():
        texts = [{(row.text, row.pair) for row in task.splits[s]} for s in (split, source)]
        assert not texts[0] & texts[1]


def test_unknown_tasks_list_near_names():
    with pytest.raises(ValueError, match=r"name='sst' is not a task; did you mean sst\d or sst\d"):
        data.load("sst")
    assert list(data.TASKS) == sorted(data.TASKS)
    assert set(public_sets.KNOWN) < set(data.TASKS) and set(PUBLIC_ROWS) == set(public_sets.KNOWN)
