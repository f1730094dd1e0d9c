"""One file per method, each holding only its mathematics."""

from pefts.methods.adalora import adalora
from pefts.methods.boft import boft
from pefts.methods.bottleneck import bottleneck
from pefts.methods.compacter import compacter
from pefts.methods.corda import corda
from pefts.methods.diffora import diffora
from pefts.methods.dora import dora
from pefts.methods.eva import eva
from pefts.methods.flora import flora
from pefts.methods.full import bitfit, full, head_only
from pefts.methods.hira import hira
from pefts.methods.ia3 import ia3
from pefts.methods.increlora import increlora
from pefts.methods.kind import kind
from pefts.methods.lamda import lamda
from pefts.methods.llama_adapter import llama_adapter
from pefts.methods.ln_tuning import ln_tuning
from pefts.methods.loha import loha
from pefts.methods.lokr import lokr
from pefts.methods.loldu import loldu
from pefts.methods.lora import lora
from pefts.methods.lora_ga import lora_ga
from pefts.methods.lora_sb import lora_sb
from pefts.methods.lora_xs import lora_xs
from pefts.methods.miss import miss
from pefts.methods.monarch import monarch
from pefts.methods.more import more
from pefts.methods.mos import mos
from pefts.methods.nola import nola
from pefts.methods.oft import oft
from pefts.methods.olora import olora
from pefts.methods.p_tuning import p_tuning
from pefts.methods.pela import pela
from pefts.methods.petalface import petalface
from pefts.methods.pissa import pissa
from pefts.methods.poly import poly
from pefts.methods.prefix import prefix
from pefts.methods.prompt import prompt
from pefts.methods.pvera import pvera
from pefts.methods.randlora import randlora
from pefts.methods.sara import sara
from pefts.methods.scalearn import scalearn
from pefts.methods.senszoq import senszoq
from pefts.methods.snnk import snnk
from pefts.methods.sorsa import sorsa
from pefts.methods.svfit import svfit
from pefts.methods.svft import svft
from pefts.methods.tensor_train import tensor_train
from pefts.methods.trainable_tokens import trainable_tokens
from pefts.methods.vb_lora import vb_lora
from pefts.methods.vera import vera
from pefts.methods.weight_compander import weight_compander
from pefts.methods.welore import welore
from pefts.methods.zeroi2v import zeroi2v

METHODS = {
    "adalora": adalora,
    "bitfit": bitfit,
    "boft": boft,
    "bottleneck": bottleneck,
    "compacter": compacter,
    "corda": corda,
    "diffora": diffora,
    "dora": dora,
    "eva": eva,
    "flora": flora,
    "full": full,
    "head_only": head_only,
    "hira": hira,
    "ia3": ia3,
    "increlora": increlora,
    "kind": kind,
    "lamda": lamda,
    "llama_adapter": llama_adapter,
    "ln_tuning": ln_tuning,
    "loha": loha,
    "lokr": lokr,
    "loldu": loldu,
    "lora": lora,
    "lora_ga": lora_ga,
    "lora_sb": lora_sb,
    "lora_xs": lora_xs,
    "miss": miss,
    "monarch": monarch,
    "more": more,
    "mos": mos,
    "nola": nola,
    "oft": oft,
    "olora": olora,
    "p_tuning": p_tuning,
    "pela": pela,
    "petalface": petalface,
    "pissa": pissa,
    "poly": poly,
    "prefix": prefix,
    "prompt": prompt,
    "pvera": pvera,
    "randlora": randlora,
    "sara": sara,
    "scalearn": scalearn,
    "senszoq": senszoq,
    "snnk": snnk,
    "sorsa": sorsa,
    "svfit": svfit,
    "svft": svft,
    "tensor_train": tensor_train,
    "trainable_tokens": trainable_tokens,
    "vb_lora": vb_lora,
    "vera": vera,
    "weight_compander": weight_compander,
    "welore": welore,
    "zeroi2v": zeroi2v,
}
