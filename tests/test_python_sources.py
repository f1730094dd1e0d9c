"""The sources of the standard library and of packages, and the docstrings of functions."""

import ast
import doctest
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import data
from data import python_sources
from data.python_sources import MARKER, load_docstrings, load_sources, split_of
from data.written import LanguageTask, Written, sentence_scores

SPLITS = ("train", "dev", "test")
BODY = "\n\n\ndef own_{0}(first, second):\n    return [first + {0}, second * {0}, first - second]\n"


def files_of(task: LanguageTask, split: str) -> set[str]:
    return {text.origin.rpartition(":")[0] for text in task.splits[split]}


def names(split: str) -> Iterator[str]:
    """Module files of one split, one after another."""
    return (n for i in itertools.count() if split_of(n := f"module{i}.py") == split)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library with one file in each split and an ast.py; no packages."""
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "ast.py").write_text("# The folder is known by this file." + BODY.format(0))
    for number, split in enumerate(SPLITS, start=1):
        (folder / next(names(split))).write_text(f"# A file of {split}." + BODY.format(number))
    return folder


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    folders = [folder, tmp_path / "packages"]
    monkeypatch.setattr(python_sources, "_package_folders", lambda: folders)
    return folder


def put(folder: Path, path: str, text: str | bytes) -> None:
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


def trained(library: Path) -> set[str]:
    return files_of(load_sources(root=library), "train")


# ------------------------------------------------------------------------- this machine's library


@pytest.fixture(scope="module")
def sources() -> LanguageTask:
    return load_sources(packages=False)


@pytest.fixture(scope="module")
def docstrings() -> LanguageTask:
    return load_docstrings()


def test_no_file_is_in_two_splits_and_both_tasks_divide_alike(sources, docstrings) -> None:
    for task in (sources, docstrings):
        assert tuple(task.splits) == SPLITS
        for split, texts in task.splits.items():
            found = files_of(task, split)
            assert {split_of(path) for path in found} == {split}
            assert not any(Path(path).is_absolute() or ".." in path for path in found)
            paths = [text.origin.rpartition(":")[0] for text in texts]
            assert paths == sorted(paths)
    sizes = {split: len(files_of(sources, split)) for split in SPLITS}
    assert sum(sizes.values()) > 300 and min(sizes["dev"], sizes["test"]) > 25
    assert not [p for s in SPLITS for p in files_of(sources, s) if "test" in p.split("/")[:-1]]
    least = {"train": 2000, "dev": 200, "test": 200}
    assert all(len(docstrings.splits[split]) > least[split] for split in SPLITS)


def test_what_is_held_out_is_in_no_training_text(sources, docstrings) -> None:
    """Not with the docstring's first paragraph, however it is spaced: read here from the files."""
    library = python_sources._library(None)

    def squeezed(text: str) -> str:
        return "".join(text.split())

    learned = {
        "sources": squeezed("".join(text.text for text in sources.splits["train"])),
        "docstrings": squeezed("".join(text.text for text in docstrings.splits["train"])),
    }
    answers = {squeezed(text.references[0]).casefold() for text in docstrings.splits["train"]}
    checked = 0
    for text in docstrings.splits["dev"] + docstrings.splits["test"]:
        (answer,) = text.references
        assert squeezed(answer).casefold() not in answers
        assert squeezed(text.prompt.removesuffix(MARKER)) not in learned["docstrings"]
        path, _, line = text.origin.rpartition(":")
        lines = (library / path).read_text("utf-8").split("\n")
        written = squeezed("\n".join(lines[int(line) - 1 :]))
        end = written.find(squeezed(answer)) + len(squeezed(answer))
        head = written[written.index("def") : end]
        # An escape is written otherwise than it reads, and then there is nothing to look for.
        if squeezed(answer) in written and "@" not in head:
            checked += 1
            assert head not in learned["sources"], text.origin
    assert checked > 0.9 * len(docstrings.splits["dev"] + docstrings.splits["test"])


def test_blocks_are_the_files(sources) -> None:
    library = python_sources._library(None)
    for path in ("argparse.py", "asyncio/locks.py", "tokenize.py"):
        lines = (library / path).read_text("utf-8").split("\n")
        blocks = [t for s in SPLITS for t in sources.splits[s] if t.origin.startswith(path + ":")]
        assert len(blocks) > 2
        for block in blocks:
            start = int(block.origin.rpartition(":")[2]) - 1
            text = "\n".join(lines[start:]) if start else "\n".join(lines)
            assert text.startswith(block.text) and block.references == ()
            rest = text[len(block.text) :]
            assert not rest or block.text.endswith("\n")
            assert len(block.text) < 2 * 2000 + 2000 or "\n\n" not in block.text[4000:-2000]
            assert not rest or rest[0] not in " \t" or len(block.text) >= 4000
    whole = [t for s in SPLITS for t in sources.splits[s] if t.origin.startswith("argparse.py:")]
    assert "".join(text.text for text in whole) == (library / "argparse.py").read_text()


def test_loading_is_deterministic(sources, docstrings) -> None:
    assert load_sources(packages=False) == sources
    three = data.load("python_sources", packages=False, examples=3)
    assert three.splits == {split: texts[:3] for split, texts in sources.splits.items()}
    few = data.load("docstrings", examples=100)
    assert isinstance(few, LanguageTask) and few.grade is sentence_scores
    assert few.splits == {split: texts[:100] for split, texts in docstrings.splits.items()}


def test_a_limit_takes_whole_files_evenly(sources, monkeypatch) -> None:
    size = 150_000
    read = []
    inner = python_sources._read
    monkeypatch.setattr(python_sources, "_read", lambda file: read.append(file) or inner(file))
    small = load_sources(packages=False, characters=size)
    for split, texts in small.splits.items():
        allowed = {text.origin: text for text in sources.splits[split]}
        assert all(allowed[text.origin] == text for text in texts)
        total = sum(len(text.text) for text in texts)
        assert 0.8 * size < total < size + python_sources.LARGEST
    firsts = {path[0].lower() for path in files_of(small, "train")}
    assert len(firsts) > 8, "the files are from one end of the alphabet"
    held = len(files_of(sources, "dev") | files_of(sources, "test"))
    assert len(read) < held + 100


# ------------------------------------------------------------------------------ made-up libraries


LINE = "# A line of a file that somebody wrote.\n"
SKIPPED = {
    "bad_bytes.py": b"# \xff\n" + LINE.encode() * 3,
    "empty.py": "",
    "blank.py": "\n" * 500,
    "tiny.py": "import os\n",
    "enormous.py": LINE * 20_000,
    "one_line.py": LINE + "TABLE = '" + "x" * 2000 + "'\n",
    "null.py": LINE * 3 + "\0",
    "generated.py": "# Generated by tools/make.py\n" + LINE * 3,
    "generated_too.py": "#!/usr/bin/python\n# AUTO-GENERATED, see make.py\n" + LINE * 3,
    "generated_so.py": '"""This file was automatically generated."""\n' + LINE * 3,
    "generated_as.py": "# This file is generated from a.txt\n" + LINE * 3,
    "do_not.py": LINE + "# DO NOT EDIT!\n" + LINE,
    "variables.py": "# system configuration generated and used by\n# build time variables\n" + LINE,
    "test_this.py": LINE * 3,
    "this_test.py": LINE * 3,
    "conftest.py": LINE * 3,
    "test/a.py": LINE * 3,
    "a/tests/b.py": LINE * 3,
    "site-packages/c.py": LINE * 3,
    "not-importable.py": LINE * 3,
    "config-3.11/a.py": LINE * 3,
    "a/__pycache__/b.py": LINE * 3,
    "notes.txt": LINE * 3,
}
KEPT = {
    "marked.py": b"\xef\xbb\xbf" + LINE.encode() * 2,
    "carriage.py": LINE.replace("\n", "\r\n") * 4,
    "generates.py": '"""Code that generates by hand what was generated."""\n' + LINE,
    "late.py": LINE * 40 + "# Generated by make.py\n",
    "testing/d.py": LINE * 5,
    "contest.py": LINE * 6,
    "large.py": LINE * 9_000,
}


def test_what_is_read_and_what_is_not(library, packages) -> None:
    before = trained(library)
    for path, text in {**SKIPPED, **KEPT}.items():
        put(packages, path, text)
    assert trained(library) - before == set(KEPT)
    task = load_sources(root=library)
    (marked,) = [text for text in task.splits["train"] if text.origin.startswith("marked.py")]
    assert marked.text == LINE * 2 and marked.origin == "marked.py:1"
    assert not any("\r" in text.text for text in task.splits["train"])


def test_packages_go_to_train_alone(library, packages, monkeypatch) -> None:
    read = []
    inner = python_sources._read
    monkeypatch.setattr(python_sources, "_read", lambda file: read.append(file) or inner(file))
    alone = load_sources(root=library, packages=False)
    read.clear()
    for split in SPLITS:
        put(packages, next(names(split)), f"# A package's, of {split}." + BODY.format(7) + LINE)
    task = load_sources(root=library)
    assert [task.splits[s] == alone.splits[s] for s in SPLITS] == [False, True, True]
    assert len(read) == len(set(read)) == 4 + 3, "pure and other packages are in the same folder"
    added = [t for t in task.splits["train"] if t not in alone.splits["train"]]
    assert sorted(t.text.split(".")[0] for t in added) == [
        "# A package's, of dev",
        "# A package's, of test",
        "# A package's, of train",
    ]
    assert load_sources(root=library, packages=False) == alone


def test_the_installed_packages_are_where_the_interpreter_has_them() -> None:
    folders = python_sources._package_folders()
    assert any((folder / "numpy" / "linalg" / "__init__.py").is_file() for folder in folders)


def test_equal_files_are_kept_once(library, packages) -> None:
    for folder, path in ((library, "a/x.py"), (packages, "b/x.py"), (packages, "c.py")):
        put(folder, path, LINE * 3)
    held = {split: (library / next(names(split))).read_text() for split in ("dev", "test")}
    for split, text in held.items():
        put(packages, f"copy_of_{split}.py", text)
    task = load_sources(root=library)
    assert sum(text.text == LINE * 3 for s in SPLITS for text in task.splits[s]) == 1
    assert not any(path.startswith("copy") for path in files_of(task, "train"))
    for split, text in held.items():
        assert [found.text for found in task.splits[split]] == [text]


HELD = '''
class Held:
    def read(self, size):
        """Take so much."""
        return self.rest[:size]

    def plain(self, one_thing, another_thing):
        return [one_thing.value + another_thing.value, one_thing, another_thing, self]

    def short(self):
        return 1
'''


@pytest.mark.parametrize(
    ("copy", "kept"),
    [
        (HELD, False),
        ('def read(self, size):\n\t"""Take\n\tso much.\n\n\tMore."""\n\treturn 3\n', False),
        ('x = 1\ndef read(self, size):\n    """Take so much."""', False),
        ("async def nothing(): pass\n" + HELD[HELD.index("    def plain") :], False),
        ("    def short(self):\n        return 1\n", True),
        ('def read(self, size):\n    """Take less."""\n', True),
        ('def read(self, length):\n    """Take so much."""\n', True),
        ('# """Take so much."""\n', True),
    ],
)
@pytest.mark.parametrize(("split", "characters"), [("test", None), ("dev", None), ("dev", 20_000)])
def test_functions_that_are_held_out_are_not_learned(
    copy, kept, split, characters, library, packages
) -> None:
    put(library, next(n for n in names(split) if not (library / n).exists()), LINE + HELD)
    put(packages, "copy.py", LINE * 60 + "\n" + copy)
    task = load_sources(root=library, block=2000, characters=characters)
    found = [text for text in task.splits["train"] if text.origin.startswith("copy.py")]
    assert bool(found) == kept
    put(packages, "copy.py", LINE * 60 + "\n" + copy + "\n" + LINE * 60)
    found = load_sources(root=library, block=1000, characters=characters).splits["train"]
    found = [text.text for text in found if text.origin.startswith("copy.py")]
    assert found[0].rstrip() == (LINE * 60).rstrip() and (copy in "".join(found)) == kept


def test_dev_has_no_function_of_test(library) -> None:
    for split in ("dev", "test"):
        path = next(n for n in names(split) if not (library / n).exists())
        put(library, path, f"# {split} has it.\n" + LINE + HELD)
    task = load_sources(root=library, packages=False)
    assert [len(task.splits[split]) for split in ("dev", "test")] == [1, 2]
    assert "Held" not in task.splits["dev"][0].text


def test_blocks_end_at_top_level_where_they_can(library) -> None:
    functions = [f"def f{n}():\n    a = 1\n\n    return {n}\n\n\n" for n in range(20)]
    put(library, "zz.py", "".join(functions) + "class C:\n" + "    x = 1\n\n" * 40)
    blocks = [
        text
        for s in SPLITS
        for text in load_sources(root=library, packages=False, block=100).splits[s]
        if text.origin.startswith("zz.py")
    ]
    assert "".join(text.text for text in blocks) == (library / "zz.py").read_text()
    for text, after in itertools.pairwise(blocks):
        assert 100 <= len(text.text) < 260 and text.text.endswith("\n\n")
        assert after.text.startswith(("def f", "class")) or len(text.text) >= 200
    # Three functions a block; the last two with the beginning of the class.
    firsts = [text.text.split("(")[0] for text in blocks[:7]]
    assert firsts == [f"def f{n}" for n in range(0, 20, 3)] and len(blocks) == 9
    assert len(blocks[-1].text) >= 50, "a rest too short to be a block stays with the one before"


def test_nothing_is_run(library, packages) -> None:
    trap = library / "ran"
    put(packages, "trap.py", f"open({str(trap)!r}, 'w')\nraise SystemExit\n" + LINE)
    put(
        library,
        "trap.py",
        f'def f():\n    """One two three four."""\n    {LINE}open({str(trap)!r})',
    )
    assert "trap.py" in trained(library)
    load_docstrings_of(library)
    assert not trap.exists()


def test_bad_options_are_refused(library, packages, tmp_path) -> None:
    for load in (load_sources, load_docstrings):
        with pytest.raises(ValueError, match="root='.*' has no ast.py: expected the folder of a P"):
            load(root=tmp_path)
        (library / next(names("dev"))).write_text("")
        with pytest.raises(ValueError, match=r"library': nothing is left for split '.*'; pass the"):
            load(root=library)
    with pytest.raises(ValueError, match="block=0 must be at least 1 character"):
        load_sources(block=0)
    with pytest.raises(ValueError, match="characters=0 must be at least 1, or None for all"):
        load_sources(characters=0)
    for code, min_words in ((0, 3), (1000, 0)):
        message = f"code={code} and min_words={min_words} must be at least 1"
        with pytest.raises(ValueError, match=message):
            load_docstrings(code=code, min_words=min_words)


# ------------------------------------------------------------------------------------- docstrings


def described(library: Path, source: str, **options: Any) -> list[Written]:
    """What is made of the functions of a source, among others to fill the splits."""
    put(library, "mine.py", source)
    task = load_docstrings_of(library, **options)
    return [t for s in SPLITS for t in task.splits[s] if t.origin.startswith("mine.py")]


def load_docstrings_of(library: Path, **options: Any) -> LanguageTask:
    for split in SPLITS:
        text = f'def f():\n    """Words that {split} has alone."""\n    return "{split}"\n'
        put(library, next(names(split)), text)
    return load_docstrings(root=library, **options)


METHOD = '''
import os


class A:
    """No function's."""

    if os:
        @property
        @decorated(1,
                   2)
        async def total(self, values: "list[int]" = (1, 2),
                        # why
                        ) -> int:
            # before
            r"""Add up
              all\\d.

            Another paragraph.
            """

            """Not a docstring."""
            text = f"""
    less {values}
"""

            return text
'''


def test_a_function_without_its_docstring_is_the_prompt(library) -> None:
    (text,) = described(library, METHOD)
    code = '''@property
@decorated(1,
           2)
async def total(self, values: "list[int]" = (1, 2),
                # why
                ) -> int:
    # before
    """Not a docstring."""
    text = f"""
    less {values}
"""

    return text'''
    assert text.prompt == code + "\n\n# The docstring:\n"
    assert text.references == (text.pieces[1].text,) == ("Add up\n  all\\d.",)
    assert [piece.learned for piece in text.pieces] == [False, True]
    assert text.origin == "mine.py:9"


def test_tabs_and_form_feeds(library) -> None:
    source = 'x = 1\n\x0c\nclass A:\n\tdef f(self):\n\t\t"""Go there at once."""\n\t\treturn 1\n'
    (text,) = described(library, source)
    assert text.prompt.startswith("def f(self):\n\treturn 1\n\n#") and text.origin == "mine.py:4"


def test_long_code_is_cut_at_a_lines_end(library) -> None:
    source = 'def long_name(a):\n    """Say one two."""\n    x = 1\n    y = 22\n    return x'
    code = source.replace('    """Say one two."""\n', "")
    for size in (len(code), len(code) + 1, 10**9):
        (text,) = described(library, source, code=size)
        assert text.prompt == code + MARKER
    for size in (len(code) - 1, len(code) - len("\n    return x")):
        (text,) = described(library, source, code=size)
        assert text.prompt == "def long_name(a):\n    x = 1\n    y = 22" + MARKER
    # Where the first line is too long, nothing is left to show.
    task = described(library, source, code=len("def long_name(a):"))
    assert task[0].prompt == "def long_name(a):" + MARKER
    assert not described(library, source, code=len("def long_name(a):") - 1)


GOOD = 'def f(a):\n    """Take the first of all."""\n    return a[0]\n'
LEFT_OUT = {
    "short": GOOD.replace("Take the first of all", "Take it"),
    "no docstring": "def f(a):\n    return a[0]\n",
    "blank docstring": GOOD.replace("Take the first of all.", " "),
    "nothing else": GOOD.replace("    return a[0]\n", ""),
    "pass": GOOD.replace("return a[0]", "pass"),
    "dots": GOOD.replace("return a[0]", "..."),
    "not implemented": GOOD.replace("return a[0]", "raise NotImplementedError"),
    "abstract": GOOD.replace("return a[0]", "raise NotImplementedError('here')"),
    "one line": 'def f(a): """Take the first of all."""; return a[0]',
    "same line": GOOD.replace('"""\n    return', '"""; return'),
    "docstring on the line of the signature": 'def f(a,\n  b): "Take the first."\n',
    "words": 'def take_the_firstOf(a):\n    """Take the first of a."""\n    return a\n',
    "same docstring": GOOD + GOOD.replace("f(a)", "g(b)").replace("Take the", "take  the"),
    "same code": GOOD + GOOD.replace("Take the first", "Give the first"),
    "inner": "def f(a):\n" + "".join(f"    {line}\n" for line in GOOD.splitlines()),
    "does not parse": GOOD + "print 1\n",
    "is too deep": GOOD + "(" * 5000,
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_functions_that_are_left_out(case, library) -> None:
    assert len(described(library, GOOD)) == 1
    assert described(library, LEFT_OUT[case]) == []


def test_shortest_docstring(library) -> None:
    source = (
        'def go(a):\n    """Add it."""\n    return "\\d" + a\n'  # and an escape Python warns of
    )
    assert described(library, source) == []
    assert len(described(library, source, min_words=2)) == 1


def test_every_prompt_of_the_library_is_a_function(docstrings) -> None:
    for text in docstrings.splits["dev"] + docstrings.splits["test"]:
        code = text.prompt.removesuffix(MARKER)
        assert len(code) <= 1000 and text.prompt == code + MARKER
        if len(code) < 850:  # not cut
            (node,) = ast.parse(code).body
            assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            assert text.references[0] not in (ast.get_docstring(node) or "")


def test_answers_are_scored_in_words(docstrings) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    texts = docstrings.splits["test"][:20]
    assert docstrings.grade is not None
    right = docstrings.grade(texts, [text.references[0] for text in texts])
    assert right == {"bleu": pytest.approx(100.0), "rougeL": pytest.approx(1.0)}
    other = docstrings.grade(texts, [text.references[0] for text in texts[::-1]])
    assert other["bleu"] < 20 and other["rougeL"] < 0.5


def test_of_equal_files_both_tasks_keep_the_held_out_one(library) -> None:
    unused = {s: (n for n in names(s) if not (library / n).exists()) for s in SPLITS}
    for split in ["train"] * 20 + ["dev", "test"]:
        put(library, next(unused[split]), GOOD)
    for task in (load_docstrings_of(library), load_sources(root=library, packages=False)):
        found = {s: sum("return a[0]" in t.text for t in task.splits[s]) for s in SPLITS}
        assert found == {"train": 0, "dev": 0, "test": 1}, task.name


def test_docstring_examples() -> None:
    failed, tried = doctest.testmod(python_sources)
    assert tried >= 3 and not failed
