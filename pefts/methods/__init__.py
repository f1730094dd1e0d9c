"""One file per method, each holding only its mathematics."""

from pefts.methods.full import bitfit, full, head_only
from pefts.methods.lora import lora

METHODS = {
    "bitfit": bitfit,
    "full": full,
    "head_only": head_only,
    "lora": lora,
}
