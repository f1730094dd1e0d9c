"""One file per method, each holding only its mathematics."""

from pefts.methods.adalora import adalora
from pefts.methods.bottleneck import bottleneck
from pefts.methods.corda import corda
from pefts.methods.dora import dora
from pefts.methods.full import bitfit, full, head_only
from pefts.methods.ln_tuning import ln_tuning
from pefts.methods.lora import lora
from pefts.methods.olora import olora
from pefts.methods.pissa import pissa
from pefts.methods.prompt import prompt
from pefts.methods.sara import sara
from pefts.methods.vera import vera

METHODS = {
    "adalora": adalora,
    "bitfit": bitfit,
    "bottleneck": bottleneck,
    "corda": corda,
    "dora": dora,
    "full": full,
    "head_only": head_only,
    "ln_tuning": ln_tuning,
    "lora": lora,
    "olora": olora,
    "pissa": pissa,
    "prompt": prompt,
    "sara": sara,
    "vera": vera,
}
