"""Prefix tuning as Hugging Face PEFT stores it (peft_type PREFIX_TUNING).

    prompt_embeddings (n, L 2 kv)     K of layer 0, V of layer 0, K of layer 1, ...; no other key

The file holds keys and values alone: an MLP that made them is computed on the way out and lost.
peft counts the real tokens from n, so `positions` has to be set here. Its prefix has positions 0 to
n - 1 for a sliding window alone, out of which it goes when the text grows; ours stays in sight.
"""

from collections.abc import Sequence

import numpy as np

from pefts.attention import PROJECTIONS, kv_features
from pefts.formats.contract import (
    Arrays,
    Files,
    Format,
    Imported,
    Native,
    Slot,
    Weight,
    expect,
    in_order,
)

NAME = "prompt_embeddings"
POSITIONS = "positions"  # the keyword of models.decoder; peft does not say it


def to_hf(native: Native) -> Files:
    """The table of all layers."""
    if native.config["positions"] is None:
        raise ValueError(
            "peft counts the tokens behind a prefix from n, and this prefix was made for tokens "
            "that are counted from 0 (positions=None): its keys would be seen from elsewhere. To "
            "export it, train with prefix(positions='positions')."
        )
    slots = in_order(native.slices)
    sizes = {kv_features(slot.path, slot.d_out) for slot in slots}
    if len(sizes) > 1:
        raise ValueError(
            f"peft gives all layers keys of one size, and the adapted ones have {sorted(sizes)} "
            "features: this model's prefix cannot be written."
        )
    pairs = [_keys_and_values(native.slices[slot], native.shared) for slot in slots]
    table = np.concatenate([x for pair in pairs for x in pair], axis=-1)
    # Neither token_dim nor num_attention_heads: peft takes those of keys from the model.
    fields = {
        "num_layers": len(slots),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(table),
        "prefix_projection": False,
    }
    return Files(fields, {}, {NAME: table})


def _keys_and_values(p: Arrays, shared: Arrays) -> list[np.ndarray]:
    if "K" in p:
        return [p["K"], p["V"]]
    hidden = np.tanh(shared["E"] @ shared["W1"] + shared["b1"])
    return np.split(hidden @ p["W2"] + p["b2"], 2, axis=-1)


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`prefix` whose real tokens are counted from n."""
    del weight
    length, ordered = int(files.fields["num_virtual_tokens"]), in_order(slots)
    sizes = [kv_features(slot.path, slot.d_out) for slot in ordered]
    expect("the model", files.shared, {NAME: (length, 2 * sum(sizes))})
    cuts = np.cumsum(np.repeat(sizes, 2))[:-1]
    parts = np.split(files.shared[NAME], cuts, axis=-1)
    trainable = {slot: {"K": parts[2 * n], "V": parts[2 * n + 1]} for n, slot in enumerate(ordered)}
    config = {"method": "prefix", "length": length, "positions": POSITIONS}
    return Imported(config, trainable)


FORMAT = Format(
    peft_type="PREFIX_TUNING",
    suffixes=(),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={"num_virtual_tokens": None},
    accepted={"num_transformer_submodules": (None, 1)},
    ignored=(
        "encoder_hidden_size",
        "init_weights",
        "num_attention_heads",
        "num_layers",
        "prefix_projection",
        "token_dim",
    ),
    reasons={
        "num_transformer_submodules": "an encoder and a decoder with a prefix each is not served."
    },
    shared=(NAME,),
    biases=(),
    leaves=PROJECTIONS,
    keyless=True,
)
