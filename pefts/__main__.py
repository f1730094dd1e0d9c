"""python -m pefts: the table of methods, as the README shows it."""

import inspect
import re

from pefts.core import Peft
from pefts.methods import METHODS

REQUIRED = {"threshold": 1e-3, "total_steps": 100}  # arguments without a default, for the listing


def table() -> str:
    """One markdown row per method, read from its docstring and its traits."""
    header = "| method | what it does | merges | exact at step 0 | source |\n|---|---|---|---|---|"
    return "\n".join([header, *(_row(name) for name in METHODS)])


def _row(name: str) -> str:
    doc = inspect.getdoc(METHODS[name]) or ""
    what = doc.split("\n\n")[0].replace("\n", " ").rstrip(".").replace("|", r"\|")
    identifiers = re.findall(r"\d{4}\.\d{5}", doc.partition("Source:")[2])
    source = ", ".join(f"[{i}](https://arxiv.org/abs/{i})" for i in identifiers) or "baseline"
    traits = _default(name).traits
    flags = ["yes" if flag else "no" for flag in (traits.mergeable, traits.identity_at_init)]
    return f"| `{name}` | {what} | {' | '.join(flags)} | {source} |"


def _default(name: str) -> Peft:
    parameters = inspect.signature(METHODS[name]).parameters
    return METHODS[name](**{k: v for k, v in REQUIRED.items() if k in parameters})


if __name__ == "__main__":
    print(table())
