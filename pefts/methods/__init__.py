"""One file per method, each holding only its mathematics."""

from pefts.methods.adalora import adalora
from pefts.methods.bottleneck import bottleneck
from pefts.methods.corda import corda
from pefts.methods.dora import dora
from pefts.methods.eva import eva
from pefts.methods.full import bitfit, full, head_only
from pefts.methods.kind import kind
from pefts.methods.lamda import lamda
from pefts.methods.ln_tuning import ln_tuning
from pefts.methods.loldu import loldu
from pefts.methods.lora import lora
from pefts.methods.lora_ga import lora_ga
from pefts.methods.lora_sb import lora_sb
from pefts.methods.lora_xs import lora_xs
from pefts.methods.monarch import monarch
from pefts.methods.more import more
from pefts.methods.olora import olora
from pefts.methods.pela import pela
from pefts.methods.pissa import pissa
from pefts.methods.prompt import prompt
from pefts.methods.sara import sara
from pefts.methods.senszoq import senszoq
from pefts.methods.sorsa import sorsa
from pefts.methods.svfit import svfit
from pefts.methods.svft import svft
from pefts.methods.tensor_train import tensor_train
from pefts.methods.vera import vera
from pefts.methods.welore import welore

METHODS = {
    "adalora": adalora,
    "bitfit": bitfit,
    "bottleneck": bottleneck,
    "corda": corda,
    "dora": dora,
    "eva": eva,
    "full": full,
    "head_only": head_only,
    "kind": kind,
    "lamda": lamda,
    "ln_tuning": ln_tuning,
    "loldu": loldu,
    "lora": lora,
    "lora_ga": lora_ga,
    "lora_sb": lora_sb,
    "lora_xs": lora_xs,
    "monarch": monarch,
    "more": more,
    "olora": olora,
    "pela": pela,
    "pissa": pissa,
    "prompt": prompt,
    "sara": sara,
    "senszoq": senszoq,
    "sorsa": sorsa,
    "svfit": svfit,
    "svft": svft,
    "tensor_train": tensor_train,
    "vera": vera,
    "welore": welore,
}
