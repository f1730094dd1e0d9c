"""Training by values of the loss alone, without its gradient."""

from pefts.zeroth_order import fedkseed, seed_log
from pefts.zeroth_order.adazeta import adazeta
from pefts.zeroth_order.black_box import (
    black_box,
    estimate_gradient,
    robust_loss,
    stability_losses,
)
from pefts.zeroth_order.coordinates import random_coordinates, value_and_cge
from pefts.zeroth_order.deepzero import (
    Staged,
    deepzero,
    layer_sparsity,
    prune,
    scale_by_coordinates,
    zo_grasp,
)
from pefts.zeroth_order.engine import ZerothOrder
from pefts.zeroth_order.estimator import Sampling, estimate
from pefts.zeroth_order.mezo import mezo
from pefts.zeroth_order.sparse_mezo import sparse_mezo

__all__ = [
    "Sampling",
    "Staged",
    "ZerothOrder",
    "adazeta",
    "black_box",
    "deepzero",
    "estimate",
    "estimate_gradient",
    "fedkseed",
    "layer_sparsity",
    "mezo",
    "prune",
    "random_coordinates",
    "robust_loss",
    "scale_by_coordinates",
    "seed_log",
    "sparse_mezo",
    "stability_losses",
    "value_and_cge",
    "zo_grasp",
]
