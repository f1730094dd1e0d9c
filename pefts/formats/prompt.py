"""Soft prompts as Hugging Face PEFT stores them (peft_type PROMPT_TUNING and P_TUNING).

    prompt_embeddings (n, d)      P; no other key

P-tuning's file holds what its MLP makes and not the MLP: it is computed on the way out, and what
comes back is a `prompt`. peft puts P behind whatever factor transformers' embedding module applies
to its rows (Gemma 3's does, Gemma 2's model does it later): a prompt for such a model has to be
scaled by hand.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pefts.formats.contract import Arrays, Files, Format, Imported, Native, Slot, Weight, expect
from pefts.methods.prompt import TABLES

NAME = "prompt_embeddings"


def to_hf(native: Native) -> Files:
    """The vectors as they stand."""
    return _files(native, lambda p: p["P"], {"prompt_tuning_init": "RANDOM"})


def mlp_to_hf(native: Native) -> Files:
    """The vectors that the MLP makes."""
    ((_, p),) = native.slices.items()
    fields = {
        "encoder_dropout": 0.0,
        "encoder_hidden_size": p["W1"].shape[-1],
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
    }
    return _files(native, _mlp, fields)


def _mlp(p: Arrays) -> np.ndarray:
    x = np.maximum(p["T"] @ p["W1"] + p["b1"], 0)
    return np.maximum(x @ p["W2"] + p["b2"], 0) @ p["W3"] + p["b3"]


def _files(native: Native, virtual: Any, fields: Mapping[str, Any]) -> Files:
    ((_, p),) = native.slices.items()
    P = virtual(p)
    sizes = {
        "num_transformer_submodules": 1,
        "num_virtual_tokens": P.shape[0],
        "token_dim": P.shape[1],
    }
    return Files({**sizes, **fields}, {}, {NAME: P})


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`prompt`, of either type."""
    del weight
    if len(slots) > 1:
        raise ValueError(
            f"a prompt belongs to the table that embeds the tokens, and this model has "
            f"{[slot.path for slot in slots]}: it cannot be told which."
        )
    length, (slot,) = int(files.fields["num_virtual_tokens"]), slots
    expect("the model", files.shared, {NAME: (length, slot.d_out)})
    return Imported({"method": "prompt", "length": length}, {slot: {"P": files.shared[NAME]}})


_IGNORED = ("num_attention_heads", "num_layers", "token_dim")
FORMAT = Format(
    peft_type="PROMPT_TUNING",
    suffixes=(),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={"num_virtual_tokens": None},
    accepted={"num_transformer_submodules": (None, 1)},
    ignored=(
        *_IGNORED,
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    ),
    reasons={
        "num_transformer_submodules": "an encoder and a decoder with a prompt each is not served."
    },
    shared=(NAME,),
    biases=(),
    leaves=TABLES,
    keyless=True,
)
P_TUNING = FORMAT._replace(
    peft_type="P_TUNING",
    to_hf=mlp_to_hf,
    ignored=(
        *_IGNORED,
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
    ),
)
