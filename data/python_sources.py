"""The Python sources of this machine: code to continue, and functions to describe.

Two language-model tasks that need no download. Files are read as data; nothing is imported or run.
A file of the standard library is in the split that the hash of its path says, in both tasks and
for everybody: adding files moves none. Dev and test are of the standard library alone, so that
their texts, unlike those of train, do not depend on the packages that are installed; they still
differ between Python versions.

Tests are left out. They are more than half of a whole library, mostly tables of cases, and many
systems install the library without them.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.stdlib_docs import SKIPPED_FOLDERS
from data.task import text_hash
from data.written import (
    LanguageTask,
    Written,
    answered,
    make_language_task,
    plain,
    sentence_scores,
)

# Of the standard library's files. Not an argument: the two tasks must divide the files alike.
SHARES = {"test": 0.1, "dev": 0.1}
LARGEST = 400_000  # bytes; larger files are tables
SMALLEST = 40  # characters
LONGEST_LINE = 1000  # characters; longer lines are data
SIGNIFICANT = 80  # characters; shorter functions without a docstring are nobody's own
# Said in the first lines of a file that a program wrote.
_GENERATED = re.compile(
    r"auto-?(matically )?\s?generated|^\W*(this (file|module) (is|was) )?generated\b|"
    r"codec \S+ generated|do not (edit|modify)|build time variables",
    re.IGNORECASE | re.MULTILINE,
)
_HEAD = 1000
_TEST = re.compile(r"test_\w*|\w+_test|conftest")
_BLANK = re.compile(r"\n\s*\n")
# Ends what is compared of a function, and begins the next one.
_PARTS = re.compile(r"\n\s*\n|\n(?=[ \t]*(?:async )?def )")
_DEFINES = re.compile(r"[ \t]*(?:async )?def ")
_QUOTES = re.compile("\"\"\"|'''")
MARKER = "\n\n# The docstring:\n"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Source(NamedTuple):
    """A Python file: its path below its root, with slashes, and its text."""

    path: str
    text: str


class Function(NamedTuple):
    """A function with a docstring.

    Attributes:
        name: as defined.
        code: its source without the docstring, decorators included, not indented.
        doc: the first paragraph of the docstring.
        origin: "path:line" of its first line.
    """

    name: str
    code: str
    doc: str
    origin: str


def load_sources(
    *,
    packages: bool = True,
    root: str | Path | None = None,
    block: int = 2000,
    characters: int | None = None,
) -> LanguageTask:
    """Return the sources of the standard library and of the installed packages, to continue.

    Left out are tests, what cannot be imported by its path, files that are not UTF-8, nearly empty
    or larger than `LARGEST`, files that a program wrote, and all but one of equal files. A block
    of train that has a function of test or dev, or one of dev that has a function of test, is left
    out too: packages carry copies of the library. Functions are compared to the end of the
    docstring or to the first blank line, apart from white space; short ones have to have a
    docstring for it.

    Args:
        packages: add the .py files of the installed packages to train.
        root: library folder to read; the running Python's by default.
        block: characters of a block, about. It ends behind a blank line: the first one before an
            unindented line, or, at twice the length, any.
        characters: of each split, at most one file more; the files with the smallest hashes of
            their paths are taken, and no more of train are read. None takes all.

    Returns:
        The task "python_sources", with splits "train", "dev" and "test", sorted by path. Origins
        are "path:line" below the library's or the packages' folder.

    Raises:
        ValueError: `root` has no standard library in it or too little of it for three splits, or
            `block` or `characters` is below 1.

    Example:
        >>> task = load_sources(packages=False, characters=20_000)
        >>> list(task.splits)
        ['train', 'dev', 'test']
    """
    if block < 1:
        raise ValueError(f"block={block} must be at least 1 character")
    if characters is not None and characters < 1:
        raise ValueError(f"characters={characters} must be at least 1, or None for all")
    library = _library(root)
    roots = [library, *(_package_folders() if packages else ())]
    paths = _divided(dict.fromkeys(roots), library)
    splits: dict[str, list[Written]] = {}
    seen: set[bytes] = set()  # digests of files
    taken: set[str] = set()  # functions of the splits before
    for split in paths:
        # What is held out is read whole: train must have none of it, however little is taken.
        size = characters if split == "train" else None
        sources = list(_sources(paths[split], seen, size))
        blocks = [_blocks(source, block, taken) for source in sources]
        if split != "train":
            taken.update(key for source in sources for key in _functions_in(source.text))
        splits[split] = _in_order(sources, blocks, characters)
    _check(splits, library)
    return make_language_task("python_sources", {s: splits[s] for s in ("train", "dev", "test")})


def load_docstrings(
    *, root: str | Path | None = None, code: int = 1000, min_words: int = 3
) -> LanguageTask:
    """Return functions of the standard library, to write the docstrings of.

    The prompt is the function without its docstring and then `MARKER`; the answer, and the
    reference for the scores, is the docstring's first paragraph. Functions within functions, those
    whose code or answer another one has as well, those with nothing but the docstring in them, and
    answers that only repeat the name are left out.

    Args:
        root: library folder to read; the running Python's by default.
        code: longest code in characters; longer code is cut at a line's end. Lower it where prompts
            fill the rows of a tokenizer with few characters a token.
        min_words: shortest answer to keep, in words.

    Returns:
        The task "docstrings", with splits "train", "dev" and "test" of the same files as those of
        `load_sources`. Its `grade` is `data.written.sentence_scores`.

    Raises:
        ValueError: `root` has no standard library in it or too little of it for three splits, or
            `code` or `min_words` is below 1.

    Example:
        >>> task = load_docstrings()
        >>> task.splits["test"][0].prompt.endswith("# The docstring:\\n")
        True
    """
    if code < 1 or min_words < 1:
        raise ValueError(f"code={code} and min_words={min_words} must be at least 1")
    library = _library(root)
    splits: dict[str, list[Written]] = {"train": [], "dev": [], "test": []}
    seen: set[bytes] = set()
    functions = [
        (split, function)
        for split, paths in _divided([library], library).items()
        for source in sorted(_sources(paths, seen, None))
        for function in read_functions(source)
    ]
    docs = Counter(_plain(function.doc) for _, function in functions)
    codes = Counter(_plain(function.code) for _, function in functions)
    for split, function in functions:
        alone = docs[_plain(function.doc)] == codes[_plain(function.code)] == 1
        shown = _cut(function.code, code)
        if alone and shown and _says_something(function, min_words):
            splits[split].append(answered(shown + MARKER, function.doc, function.origin))
    _check(splits, library)
    return make_language_task("docstrings", splits, sentence_scores)


def split_of(path: str) -> str:
    """Return the split of a file of the standard library.

    Args:
        path: below the library's folder, with slashes.

    Example:
        >>> split_of("argparse.py") in ("train", "dev", "test")
        True
    """
    # The salt is one that puts tkinter/__init__.py, a fourteenth of all functions, into train.
    place = int(text_hash("split", path)[:8], 16) / 16**8
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"


def read_functions(source: Source) -> Iterator[Function]:
    """Yield the functions with a docstring of a file, none for one that does not parse.

    Functions within functions are part of these.
    """
    try:
        with warnings.catch_warnings():
            # The library's own sources may hold escapes that newer parsers warn about.
            warnings.simplefilter("ignore")
            tree = ast.parse(source.text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = source.text.split("\n")
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if not isinstance(node, _FUNCTIONS):
            stack.extend(reversed(list(ast.iter_child_nodes(node))))
        elif (code := _code(node, lines)) is not None:
            doc = _BLANK.split(inspect.cleandoc(ast.get_docstring(node) or ""))[0]
            yield Function(node.name, code, doc.strip(), f"{source.path}:{_first_line(node)}")


# -------------------------------------------------------------------------------------- the files


def _library(root: str | Path | None) -> Path:
    folder = Path(root if root is not None else sysconfig.get_path("stdlib"))
    if not (folder / "ast.py").is_file():
        raise ValueError(
            f"root={str(folder)!r} has no ast.py: expected the folder of a Python standard library "
            "as source files; pass root= or install the library's sources"
        )
    return folder


def _package_folders() -> list[Path]:
    return [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]


def _files(folder: Path) -> Iterator[str]:
    """Paths of the files that can be imported by their path."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in set(folders) - SKIPPED_FOLDERS if name.isidentifier())
        below = Path(parent).relative_to(folder)
        for file in sorted(files):
            name = file.removesuffix(".py")
            if name != file and name.isidentifier() and not _TEST.fullmatch(name):
                yield (below / file).as_posix()


def _divided(roots: Iterable[Path], library: Path) -> dict[str, list[tuple[Path, str]]]:
    """Split -> (root, path) of its files; of equal files the first split's is the one to keep."""
    paths: dict[str, list[tuple[Path, str]]] = {"test": [], "dev": [], "train": []}
    for folder in roots:
        for path in _files(folder):
            paths[split_of(path) if folder == library else "train"].append((folder, path))
    return paths


def _sources(
    paths: Iterable[tuple[Path, str]], seen: set[bytes], characters: int | None
) -> Iterator[Source]:
    """Read files in the order of their paths' hashes, until there are enough characters."""
    total = 0
    for folder, path in sorted(paths, key=lambda pair: text_hash("order", pair[1])):
        if characters is not None and total >= characters:
            return
        text = _read(folder / path)
        if text is None:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            total += len(text)
            yield Source(path, text)


def _read(file: Path) -> str | None:
    """The text of a file that people wrote, or None."""
    try:
        if not file.is_file() or file.stat().st_size > LARGEST:
            return None
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    written = _GENERATED.search(text[:_HEAD]) or "\0" in text
    if written or len(text.strip()) < SMALLEST or _longest_line(text) > LONGEST_LINE:
        return None
    return text


def _longest_line(text: str) -> int:
    return max(map(len, text.split("\n")))


# ------------------------------------------------------------------------------------- the blocks


def _blocks(source: Source, size: int, taken: set[str]) -> list[Written]:
    """The blocks of a file that have no function of `taken`."""
    text, start, line, blocks = source.text, 0, 1, []
    for end in [match.end() for match in _BLANK.finditer(text)] + [len(text)]:
        whole = text[end : end + 1] not in (" ", "\t")
        long = end - start >= size * (1 if whole else 2) and len(text) - end >= size // 2
        if not long and end != len(text):
            continue
        piece = text[start:end]
        if piece.strip() and taken.isdisjoint(_functions_in(piece) if taken else ()):
            blocks.append(plain(piece, f"{source.path}:{line}"))
        line += piece.count("\n")
        start = end
    return blocks


def _functions_in(text: str) -> set[str]:
    """The definition and docstring of functions, to the first blank line, without white space."""
    found = set()
    for part in _PARTS.split(text):
        if _DEFINES.match(part):
            quoted = _QUOTES.split(part, maxsplit=2)
            key = "".join("".join(quoted[:2]).split())
            if len(quoted) > 1 or len(key) >= SIGNIFICANT:
                found.add(key)
    return found


def _in_order(
    sources: list[Source], blocks: list[list[Written]], characters: int | None
) -> list[Written]:
    """The blocks of the first files that have enough characters, by path."""
    chosen, total = [], 0
    for source, group in zip(sources, blocks, strict=True):
        if characters is not None and total >= characters:
            break
        chosen.append((source.path, group))
        total += len(source.text)
    return [written for _, group in sorted(chosen, key=lambda pair: pair[0]) for written in group]


def _check(splits: dict[str, list[Written]], library: Path) -> None:
    for split, texts in splits.items():
        if not texts:
            raise ValueError(
                f"root={str(library)!r}: nothing is left for split {split!r}; pass the folder of "
                "a whole standard library, and do not filter more than it has"
            )


# ---------------------------------------------------------------------------------- the functions


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str | None:
    """The source without the docstring, or None where there is no docstring or nothing else."""
    doc, rest = node.body[0], node.body[1:]
    if not ast.get_docstring(node) or all(_is_stub(statement) for statement in rest):
        return None
    last_of_doc = doc.end_lineno or doc.lineno
    last = node.end_lineno or last_of_doc
    head = lines[_first_line(node) - 1 : doc.lineno - 1]
    shares_line = doc.lineno == node.lineno or rest[0].lineno == last_of_doc
    if shares_line or not lines[doc.lineno - 1][: doc.col_offset].isspace():
        return None
    body = lines[last_of_doc:last]
    while not body[0].strip():
        body = body[1:]
    margin = lines[node.lineno - 1][: node.col_offset]
    return "\n".join(line.removeprefix(margin).rstrip() for line in head + body)


def _is_stub(statement: ast.stmt) -> bool:
    """`pass`, `...`, another string, or `raise NotImplementedError`."""
    if isinstance(statement, ast.Raise):
        raised = statement.exc
        return "NotImplementedError" in (ast.unparse(raised) if raised is not None else "")
    expression = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass) or expression


def _cut(code: str, size: int) -> str:
    """The first lines that have at most so many characters; empty where the first has more."""
    return code if len(code) <= size else code[: max(code.rfind("\n", 0, size + 1), 0)].rstrip()


def _says_something(function: Function, min_words: int) -> bool:
    words = re.findall(r"[a-z0-9]+", function.doc.lower())
    # Of the name, the pieces between underscores and those that begin with a capital.
    name = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", function.name).lower().split("_")
    return len(words) >= min_words and not set(words) <= {*name, "a", "an", "the"}


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
