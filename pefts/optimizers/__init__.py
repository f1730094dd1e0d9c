"""Optimizers that optax lacks, as optax gradient transformations; one file each."""

from pefts.optimizers.decay import decay_mask
from pefts.optimizers.fira import fira, scale_by_fira
from pefts.optimizers.galore import galore, scale_by_galore
from pefts.optimizers.lora_plus import lora_plus
from pefts.optimizers.restart import restart_at
from pefts.zeroth_order import adazeta, mezo, sparse_mezo

OPTIMIZERS = {
    "adazeta": adazeta,
    "fira": fira,
    "galore": galore,
    "lora_plus": lora_plus,
    "mezo": mezo,
    "sparse_mezo": sparse_mezo,
}

__all__ = [
    "OPTIMIZERS",
    "adazeta",
    "decay_mask",
    "fira",
    "galore",
    "lora_plus",
    "mezo",
    "restart_at",
    "scale_by_fira",
    "scale_by_galore",
    "sparse_mezo",
]
