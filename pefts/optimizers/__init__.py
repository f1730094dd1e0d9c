"""Optimizers that optax lacks, as optax gradient transformations; one file each."""

from pefts.optimizers.decay import decay_mask
from pefts.optimizers.lora_plus import lora_plus
from pefts.optimizers.restart import restart_at

OPTIMIZERS = {
    "lora_plus": lora_plus,
}

__all__ = ["OPTIMIZERS", "decay_mask", "lora_plus", "restart_at"]
