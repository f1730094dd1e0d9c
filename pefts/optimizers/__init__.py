"""Optimizers that optax lacks, as optax gradient transformations; one file each."""

from pefts.optimizers.active import scale_by_units
from pefts.optimizers.adam8bit import adam8bit, scale_by_adam8bit
from pefts.optimizers.allora import allora, scale_by_inverse_norm
from pefts.optimizers.apollo import apollo, scale_by_apollo
from pefts.optimizers.badam import badam
from pefts.optimizers.blockwise import quantize_state
from pefts.optimizers.decay import decay_mask
from pefts.optimizers.fira import fira, scale_by_fira
from pefts.optimizers.frugal import frugal, scale_by_frugal
from pefts.optimizers.galore import galore, scale_by_galore
from pefts.optimizers.hift import cycle_length, hift
from pefts.optimizers.lisa import lisa
from pefts.optimizers.lora_fa import lora_fa, scale_by_lora_fa
from pefts.optimizers.lora_plus import lora_plus
from pefts.optimizers.owlore import outlier_ratios, owlore, sampling_probabilities
from pefts.optimizers.perp_grad import perp_grad
from pefts.optimizers.restart import restart_at
from pefts.optimizers.riemannian import riemannian, scale_by_riemannian
from pefts.optimizers.transfer import scale_by_width, scale_learning_rate, step_law
from pefts.zeroth_order import adazeta, mezo, sparse_mezo

OPTIMIZERS = {
    "adam8bit": adam8bit,
    "adazeta": adazeta,
    "allora": allora,
    "apollo": apollo,
    "badam": badam,
    "fira": fira,
    "frugal": frugal,
    "galore": galore,
    "hift": hift,
    "lisa": lisa,
    "lora_fa": lora_fa,
    "lora_plus": lora_plus,
    "mezo": mezo,
    "owlore": owlore,
    "riemannian": riemannian,
    "sparse_mezo": sparse_mezo,
}

__all__ = [
    "OPTIMIZERS",
    "adam8bit",
    "adazeta",
    "allora",
    "apollo",
    "badam",
    "cycle_length",
    "decay_mask",
    "fira",
    "frugal",
    "galore",
    "hift",
    "lisa",
    "lora_fa",
    "lora_plus",
    "mezo",
    "outlier_ratios",
    "owlore",
    "perp_grad",
    "quantize_state",
    "restart_at",
    "riemannian",
    "sampling_probabilities",
    "scale_by_adam8bit",
    "scale_by_apollo",
    "scale_by_fira",
    "scale_by_frugal",
    "scale_by_galore",
    "scale_by_inverse_norm",
    "scale_by_lora_fa",
    "scale_by_riemannian",
    "scale_by_units",
    "scale_by_width",
    "scale_learning_rate",
    "sparse_mezo",
    "step_law",
]
