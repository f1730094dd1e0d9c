"""Budgets that keep the code readable, and rules that a linter does not know."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import pefts
from pefts.targets import Select

ROOT = Path(__file__).resolve().parents[1]
OURS = ("pefts", "models", "data", "training", "configs", "benchmarks", "tests")
FILES = sorted(
    [*ROOT.glob("*.py"), *(file for folder in OURS for file in (ROOT / folder).rglob("*.py"))]
)
LIBRARY = [file for file in FILES if file.is_relative_to(ROOT / "pefts")]
METHOD_FILES = [file for file in LIBRARY if file.parent.name == "methods"]
NEUTRAL = [ROOT / name for name in ("train.py", "eval.py", "pefts/core.py")]
FILE_LINES, METHOD_LINES, FUNCTION_LINES, NESTING = 600, 400, 60, 3
TABLE = ROOT / "tests" / "cases.py"  # a row for every method: as long as there are methods
# Nine are what a budget over training needs (when it starts, ends and recurs, from which rank to
# which, how its scores are smoothed) on top of alpha, dropout and a penalty's weight.
HYPERPARAMETERS = 9
VAGUE = {"utils.py", "helpers.py", "common.py", "misc.py"}
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)


def named(file: Path) -> str:
    return str(file.relative_to(ROOT))


def functions(source: str) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_lines(function: ast.FunctionDef, source: list[str]) -> int:
    """Lines of a function that hold code: no docstring, comment or blank line."""
    first = function.body[0]
    has_doc = ast.get_docstring(function) is not None
    doc = range(first.lineno, first.end_lineno + 1) if has_doc else range(0)
    lines = range(function.lineno, function.end_lineno + 1)
    text = {n: source[n - 1].strip() for n in lines if n not in doc}
    return sum(bool(line) and not line.startswith("#") for line in text.values())


def nesting(node: ast.AST) -> int:
    """The deepest stack of blocks in a function; an elif and an inner function start no level."""
    deepest = 0
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.FunctionDef | ast.ClassDef):
                continue
            is_elif = isinstance(node, ast.If) and field == "orelse" and isinstance(child, ast.If)
            level = isinstance(child, BLOCKS) and not is_elif
            deepest = max(deepest, level + nesting(child))
    return deepest


def hyperparameters(signature: inspect.Signature) -> list[str]:
    return [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]


def words(source: str) -> set[str]:
    """Names, attributes, arguments and whole strings of a program."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "arg", "name", "value"):
            text = getattr(node, field, None)
            if isinstance(text, str):
                found.add(text)
    return found


@pytest.mark.parametrize("file", FILES, ids=named)
def test_budgets(file: Path) -> None:
    source = file.read_text()
    lines = source.splitlines()
    budget = METHOD_LINES if file in METHOD_FILES else FILE_LINES
    assert file == TABLE or len(lines) <= budget, (
        f"{named(file)} has {len(lines)} lines, at most {budget}"
    )
    for function in functions(source):
        where = f"{named(file)}:{function.lineno} {function.name}"
        length, depth = code_lines(function, lines), nesting(function)
        assert length <= FUNCTION_LINES, (
            f"{where} has {length} code lines, at most {FUNCTION_LINES}"
        )
        assert depth <= NESTING, f"{where} nests {depth} blocks, at most {NESTING}"


def test_no_vague_file_names() -> None:
    assert not [named(file) for file in FILES if file.name in VAGUE]


@pytest.mark.parametrize("file", LIBRARY, ids=named)
def test_library_raises_its_errors(file: Path) -> None:
    """Neither assert, which -O removes, nor a warning, which nobody reads."""
    for node in ast.walk(ast.parse(file.read_text())):
        assert not isinstance(node, ast.Assert), f"{named(file)}:{node.lineno} asserts"
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        assert called not in ("warn", "warnings.warn"), f"{named(file)}:{node.lineno} warns"


@pytest.mark.parametrize("file", METHOD_FILES, ids=named)
def test_methods_hold_records_alone(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            marks = [ast.unparse(mark).replace(" ", "") for mark in node.decorator_list]
            frozen = any("dataclass" in mark and "frozen=True" in mark for mark in marks)
            assert "NamedTuple" in bases or frozen, f"{named(file)}: class {node.name}"


@pytest.mark.parametrize("name", sorted(pefts.METHODS))
def test_hyperparameters_are_few_and_typed(name: str) -> None:
    signature = inspect.signature(pefts.METHODS[name])
    given = hyperparameters(signature)
    assert len(given) <= HYPERPARAMETERS, f"{name} takes {given}"
    assert not set(given) & set(Select.__annotations__), f"{name} redeclares a Select argument"
    untyped = [p for p in given if signature.parameters[p].annotation is inspect.Parameter.empty]
    assert not untyped, f"{name}: {untyped} have no type"


@pytest.mark.parametrize("file", NEUTRAL, ids=named)
def test_no_method_is_named_where_all_are_equal(file: Path) -> None:
    assert file.exists()
    assert not words(file.read_text()) & set(pefts.METHODS)


LONG = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
DOCUMENTED = 'def f():\n    """One.\n\n    Two.\n    """\n    # why\n\n    return 1\n'
DEEP = "def f():\n  if a:\n    for b in c:\n      with d:\n        while e:\n          pass\n"
LADDER = (
    "def f():\n  if a:\n    pass\n  elif b:\n    pass\n  elif c:\n    pass\n  else:\n    pass\n"
)
INNER = "def f():\n  if a:\n    if b:\n      def g():\n        if c:\n          pass\n"


@pytest.mark.parametrize(
    ("source", "length", "depth"),
    [
        (LONG, FUNCTION_LINES + 1, 0),
        (DOCUMENTED, 2, 0),
        (DEEP, 6, 4),
        (LADDER, 9, 1),
        (INNER, 6, 2),
    ],
)
def test_measures(source: str, length: int, depth: int) -> None:
    function = next(functions(source))
    assert code_lines(function, source.splitlines()) == length
    assert nesting(function) == depth


def test_words_see_names_and_strings() -> None:
    assert {"lora", "rank", "dora"} <= words("import pefts\npefts.lora(rank=1)\nx = 'dora'")
    assert "full" not in words("# full\nx = 'the full story'")
