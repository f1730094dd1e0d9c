"""Optimizers that optax lacks, as optax gradient transformations; one file each."""

from pefts.optimizers.decay import decay_mask
from pefts.optimizers.fira import fira, scale_by_fira
from pefts.optimizers.galore import galore, scale_by_galore
from pefts.optimizers.lora_plus import lora_plus
from pefts.optimizers.restart import restart_at

OPTIMIZERS = {
    "fira": fira,
    "galore": galore,
    "lora_plus": lora_plus,
}

__all__ = [
    "OPTIMIZERS",
    "decay_mask",
    "fira",
    "galore",
    "lora_plus",
    "restart_at",
    "scale_by_fira",
    "scale_by_galore",
]
