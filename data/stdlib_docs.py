"""Which part of the standard library does a docstring describe?

A text-classification task that needs no download: the module, class and function docstrings of
the running Python's standard library, read with `ast` (nothing is imported), labelled with the
chapter of the library reference that documents the module.

The split is by module file. All docstrings of one file are in one split, so a model is scored on
files it has never seen; but a package's files may be divided (asyncio/locks.py in train,
asyncio/queues.py in test), and texts of one package share a vocabulary. It therefore measures
recognising an area from a new file, not from a new package. The counts differ between Python
versions: compare scores within one version only.
"""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data.task import Example, Task, make_task, text_hash

# Area -> modules or packages. The longest matching entry decides; a module under no entry is
# left out. Names that only some Python versions have are fine.
AREAS: dict[str, str] = {
    "concurrency": """
        _threading_local asynchat asyncio asyncore concurrent contextvars multiprocessing queue
        sched selectors signal subprocess threading""",
    "data types and numbers": """
        _collections_abc _py_abc _pydatetime _pydecimal _pylong _strptime _weakrefset bisect
        calendar collections colorsys copy dataclasses datetime decimal enum fractions functools
        graphlib heapq numbers operator pprint random reprlib statistics types weakref zoneinfo""",
    "files and storage": """
        _compression _pyio bz2 compression copyreg csv ctypes dbm filecmp fileinput fnmatch
        genericpath glob gzip io linecache lzma nturl2path ntpath os pathlib pickle pickletools
        pipes platform posixpath pty shelve shutil sqlite3 stat tarfile tempfile tty zipfile""",
    "graphical interfaces": "idlelib tkinter turtle turtledemo",
    "imports and packaging": """
        _aix_support _bootsubprocess _osx_support compileall distutils ensurepip imp importlib
        modulefinder pkgutil py_compile runpy site sysconfig venv zipapp zipimport""",
    "internet protocols": """
        cgi cgitb ftplib http imaplib ipaddress nntplib poplib smtpd smtplib socket socketserver
        ssl telnetlib urllib uuid webbrowser wsgiref xmlrpc""",
    "language services": """
        _ast_unparse annotationlib ast code codeop dis inspect keyword lib2to3 opcode pyclbr
        symtable tabnanny token tokenize typing""",
    "mail, markup and encodings": """
        _markupbase base64 email html json mailbox mailcap mimetypes plistlib quopri tomllib uu
        xml""",
    "testing and debugging": """
        bdb cProfile doctest pdb profile profiling pstats pydoc timeit trace traceback tracemalloc
        unittest""",
    "text and user programs": """
        _pyrepl argparse cmd codecs configparser curses difflib encodings getopt getpass gettext
        locale logging optparse re readline rlcompleter shlex string stringprep textwrap""",
}
SHARES = {"train": 0.70, "dev": 0.15, "test": 0.15}
# Folders under the library root that hold tests, third-party code or generated files.
SKIPPED_FOLDERS = frozenset(
    "__phello__ __pycache__ dist-packages idle_test lib-dynload pydoc_data site-packages test "
    "tests".split()
)


class Doc(NamedTuple):
    """A docstring: its module, the object's name without the module, and the text."""

    module: str
    name: str
    text: str


def load(*, root: str | Path | None = None, names: bool = True, min_words: int = 5) -> Task:
    """Return the task with splits "train", "dev" and "test".

    Args:
        root: library folder to read; the running Python's by default.
        names: put the object's qualified name before its docstring ("Lock.acquire: ..."). The
            module's name is never added.
        min_words: shortest docstring to keep, in words.

    Returns:
        A task whose labels are the areas that have at least three module files here, sorted. No
        module and no normalised text is in two splits, and every split has every label.

    Raises:
        ValueError: `root` has no standard library in it, `min_words` is below 1, or fewer than
            two areas remain.

    Example:
        >>> task = load()
        >>> sorted(task.splits)
        ['dev', 'test', 'train']
    """
    folder = Path(root if root is not None else sysconfig.get_path("stdlib"))
    if not (folder / "ast.py").is_file():
        raise ValueError(
            f"root={str(folder)!r} has no ast.py: expected the folder of a Python standard library "
            "as source files; pass root= or install the library's sources"
        )
    if min_words < 1:
        raise ValueError(f"min_words={min_words} must be at least 1: an empty text has no label")
    docs = [doc for doc in read_docs(folder) if len(doc.text.split()) >= min_words]
    by_area = _group(_unique(docs))
    splits: dict[str, list[Example]] = {split: [] for split in SHARES}
    for area, modules in sorted(by_area.items()):
        for module, split in sorted(divide({m: len(d) for m, d in modules.items()}).items()):
            splits[split] += [_example(doc, area, names) for doc in modules[module]]
    return make_task("stdlib_docs", sorted(by_area), splits)


def read_docs(folder: Path) -> Iterator[Doc]:
    """Yield the docstrings below `folder` of the modules that `AREAS` lists, in path order."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for path in sorted(Path(parent, file) for file in files if file.endswith(".py")):
            parts = path.relative_to(folder).with_suffix("").parts
            module = ".".join(part for part in parts if part != "__init__")
            if area_of(module) is not None:
                yield from _docs_of(path, module)


def area_of(module: str) -> str | None:
    """Return the area of a dotted module name, or None where `AREAS` does not list it."""
    parts = module.split(".")
    for size in range(len(parts), 0, -1):
        area = _AREA_BY_MODULE.get(".".join(parts[:size]))
        if area is not None:
            return area
    return None


def divide(sizes: dict[str, int]) -> dict[str, str]:
    """Assign modules to splits, so that each split's docstrings come near its share.

    Largest first, each to the split that lacks the most of its share; the smallest modules go
    to splits that would otherwise stay empty.

    Args:
        sizes: module -> docstrings; at least one module per split.

    Returns:
        module -> split name, a function of `sizes` alone.

    Raises:
        ValueError: fewer modules than splits.
    """
    if len(sizes) < len(SHARES):
        raise ValueError(
            f"sizes has {len(sizes)} modules for {len(SHARES)} splits; every split needs one"
        )
    lacking = {split: share * sum(sizes.values()) for split, share in SHARES.items()}
    empty, assigned = set(SHARES), {}
    ordered = sorted(sizes, key=lambda module: (-sizes[module], text_hash(module)))
    for index, module in enumerate(ordered):
        open_splits = empty if len(ordered) - index == len(empty) else set(SHARES)
        split = max(sorted(open_splits), key=lambda split: lacking[split])
        assigned[module] = split
        lacking[split] -= sizes[module]
        empty.discard(split)
    return assigned


def normalise(text: str) -> str:
    """Return the lower-case words of a text, one space apart: what deduplication compares."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _docs_of(path: Path, module: str) -> Iterator[Doc]:
    with warnings.catch_warnings():
        # The library's own sources may hold escapes that newer parsers warn about.
        warnings.simplefilter("ignore")
        tree = ast.parse(path.read_bytes(), filename=str(path))
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if text:
                yield Doc(module, name, text)
        for child in ast.iter_child_nodes(node):
            own = getattr(child, "name", "") if isinstance(child, _DEFINITIONS) else ""
            stack.append((f"{name}.{own}".strip(".") if own else name, child))


def _unique(docs: list[Doc]) -> list[Doc]:
    """Keep one docstring per normalised text; drop texts that two areas share."""
    areas: dict[str, set[str | None]] = defaultdict(set)
    for doc in docs:
        areas[normalise(doc.text)].add(area_of(doc.module))
    seen: dict[str, Doc] = {}
    for doc in sorted(docs):
        if len(areas[normalise(doc.text)]) == 1:
            seen.setdefault(normalise(doc.text), doc)
    return [seen[text] for text in sorted(seen)]


def _group(docs: list[Doc]) -> dict[str, dict[str, list[Doc]]]:
    by_area: dict[str, dict[str, list[Doc]]] = defaultdict(lambda: defaultdict(list))
    for doc in docs:
        by_area[area_of(doc.module) or ""][doc.module].append(doc)
    return {area: mods for area, mods in by_area.items() if len(mods) >= len(SHARES)}


def _example(doc: Doc, area: str, names: bool) -> Example:
    text = f"{doc.name}: {doc.text}" if names and doc.name else doc.text
    return Example(text, area, origin=doc.module)


_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_AREA_BY_MODULE = {module: area for area, modules in AREAS.items() for module in modules.split()}
