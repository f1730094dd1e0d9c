"""Training by values of the loss alone, without its gradient."""

from pefts.zeroth_order.adazeta import adazeta
from pefts.zeroth_order.engine import ZerothOrder
from pefts.zeroth_order.estimator import Sampling, estimate
from pefts.zeroth_order.mezo import mezo
from pefts.zeroth_order.sparse_mezo import sparse_mezo

__all__ = ["Sampling", "ZerothOrder", "adazeta", "estimate", "mezo", "sparse_mezo"]
