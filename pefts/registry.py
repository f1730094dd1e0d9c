"""Methods by name, and back from the config that each of them carries."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from pefts.compose import chain, partition
from pefts.core import Declaration, Peft
from pefts.methods import METHODS


def from_config(config: Mapping[str, Any]) -> Peft:
    """The method that a config describes; the inverse of `Peft.config`.

    Args:
      config: {"method": name, **hyperparameters}; "chain" and "partition" hold their "members".

    Raises:
      ValueError: an unknown method (near names are listed) or hyperparameter.

    Example:
      >>> import pefts
      >>> pefts.from_config({"method": "lora", "rank": 4}).config["rank"]
      4
    """
    arguments = dict(config)
    name = arguments.pop("method", None)
    if name == "chain":
        return chain(*[from_config(member) for member in arguments["members"]])
    if name == "partition":
        if arguments["labels"] is None:
            raise ValueError(
                "this partition was labelled by a function; give patterns to rebuild it."
            )
        members = {label: from_config(c) for label, c in arguments["members"].items()}
        return partition(members, arguments["labels"])
    return _factory(name)(**arguments)


def declare(config: Mapping[str, Any]) -> Declaration:
    """What a single method's file says of one kernel, for a method that builds on it.

    Args:
      config: {"method": name, **hyperparameters}, of a method that @factory makes.

    Raises:
      ValueError: an unknown method (near names are listed), hyperparameter, or a combination.
    """
    arguments = dict(config)
    name = arguments.pop("method", None)
    if name in ("chain", "partition"):
        raise ValueError(f"method={name!r} is several methods, and one is needed here.")
    build = _factory(name)
    build(**arguments)  # checks the arguments
    return inspect.unwrap(build)(**arguments)


def _factory(name: Any) -> Any:
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(str(name), METHODS, n=3)
    raise ValueError(
        f"method={name!r} is unknown"
        + (f"; near names: {near}" if near else "")
        + f". The methods are {sorted(METHODS)}."
    )
