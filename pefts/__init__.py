"""Parameter-efficient fine-tuning of JAX models: pure transforms of parameter pytrees."""

import importlib

from pefts.calibrate import calibrate
from pefts.compose import chain, partition
from pefts.core import Peft, PeftState, Traits, count, randomize, stack
from pefts.hf_format import export_hf, import_hf
from pefts.inject import apply, infer_axes
from pefts.io import load, save
from pefts.methods import METHODS
from pefts.methods.adalora import adalora
from pefts.methods.bottleneck import bottleneck
from pefts.methods.dora import dora
from pefts.methods.full import bitfit, full, head_only
from pefts.methods.lora import lora
from pefts.methods.prompt import prompt
from pefts.methods.sara import sara
from pefts.methods.vera import vera
from pefts.optimizers import OPTIMIZERS
from pefts.registry import from_config

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "Peft",
    "PeftState",
    "Traits",
    "adalora",
    "apply",
    "bitfit",
    "bottleneck",
    "calibrate",
    "chain",
    "count",
    "dora",
    "export_hf",
    "from_config",
    "full",
    "head_only",
    "import_hf",
    "infer_axes",
    "load",
    "lora",
    "partition",
    "prompt",
    "randomize",
    "sara",
    "save",
    "stack",
    "vera",
]


def __getattr__(name: str) -> object:
    """`pefts.nnx`, imported when it is first used."""
    if name == "nnx":
        return importlib.import_module("pefts.nnx")
    raise AttributeError(f"module 'pefts' has no attribute {name!r}")
