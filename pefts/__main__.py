"""python -m pefts: the table of methods, as the README shows it."""

import inspect
import re

from pefts.core import Peft
from pefts.methods import METHODS

# Arguments without a default, for the listing.
REQUIRED = {
    "eta0": 1e-3,
    "sources": ["source.safetensors"],
    "threshold": 1e-3,
    "tokens": [0],
    "total_steps": 100,
}


def table() -> str:
    """One markdown row per method, read from its docstring and its traits."""
    columns = ("method", "what it does", "merges", "exact at step 0", "starts from", "source")
    header = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*header, *(_row(name) for name in METHODS)])


def _row(name: str) -> str:
    doc = inspect.getdoc(METHODS[name]) or ""
    what = doc.split("\n\n")[0].replace("\n", " ").rstrip(".").replace("|", r"\|")
    identifiers = re.findall(r"\d{4}\.\d{5}", doc.partition("Source:")[2])
    source = ", ".join(f"[{i}](https://arxiv.org/abs/{i})" for i in identifiers) or "baseline"
    traits = _default(name).traits
    flags = ["yes" if flag else "no" for flag in (traits.mergeable, traits.identity_at_init)]
    data = ", ".join(f"`{need}`" for need in traits.needs)
    return f"| `{name}` | {what} | {' | '.join(flags)} | {data} | {source} |"


def _default(name: str) -> Peft:
    parameters = inspect.signature(METHODS[name]).parameters
    given = {k: v for k, v in REQUIRED.items() if k in parameters}
    none = (None, inspect.Parameter.empty)
    return METHODS[name](**{k: v for k, v in given.items() if parameters[k].default in none})


if __name__ == "__main__":
    print(table())
