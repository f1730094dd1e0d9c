"""Parameter-efficient fine-tuning of JAX models: pure transforms of parameter pytrees."""

import importlib
from typing import Any

from pefts.calibrate import calibrate
from pefts.compose import chain, partition
from pefts.convert import to_lora
from pefts.core import Peft, PeftState, Traits, count, randomize
from pefts.hf_format import export_hf, import_hf
from pefts.inject import apply, infer_axes
from pefts.io import load, save
from pefts.methods import *  # every method by name: pefts.lora, ...
from pefts.methods import METHODS
from pefts.optimizers import OPTIMIZERS
from pefts.registry import from_config
from pefts.stacking import per_example, stack, unstack

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "Peft",
    "PeftState",
    "Traits",
    "apply",
    "calibrate",
    "chain",
    "count",
    "export_hf",
    "from_config",
    "import_hf",
    "infer_axes",
    "load",
    "partition",
    "per_example",
    "randomize",
    "save",
    "stack",
    "to_lora",
    "unstack",
    *METHODS,
]


def __getattr__(name: str) -> Any:
    """`pefts.nnx`, imported when it is first used."""
    if name == "nnx":
        return importlib.import_module("pefts.nnx")
    raise AttributeError(f"module 'pefts' has no attribute {name!r}")
