"""Hugging Face PEFT's adapter formats, one file per family; FORMATS[method] goes both ways."""

from pefts.formats import (
    adalora,
    boft,
    hira,
    ia3,
    llama_adapter,
    ln_tuning,
    lora,
    lycoris,
    miss,
    oft,
    poly,
    prefix,
    prompt,
    pvera,
    randlora,
    trainable_tokens,
    vb_lora,
    vera,
)
from pefts.formats.contract import Format

FORMATS: dict[str, Format] = {
    "adalora": adalora.FORMAT,
    "boft": boft.FORMAT,
    "bone": miss.BONE,  # no method: an older peft's name of miss
    "dora": lora.FORMAT,
    "hira": hira.FORMAT,
    "ia3": ia3.FORMAT,
    "llama_adapter": llama_adapter.FORMAT,
    "ln_tuning": ln_tuning.FORMAT,
    "loha": lycoris.LOHA_FORMAT,
    "lokr": lycoris.LOKR_FORMAT,
    "lora": lora.FORMAT,
    "miss": miss.FORMAT,
    "oft": oft.FORMAT,
    "p_tuning": prompt.P_TUNING,
    "poly": poly.FORMAT,
    "prefix": prefix.FORMAT,
    "prompt": prompt.FORMAT,
    "pvera": pvera.FORMAT,
    "randlora": randlora.FORMAT,
    "trainable_tokens": trainable_tokens.FORMAT,
    "vb_lora": vb_lora.FORMAT,
    "vera": vera.FORMAT,
}
