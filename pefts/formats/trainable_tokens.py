"""Trainable tokens as Hugging Face PEFT stores them (peft_type TRAINABLE_TOKENS).

    trainable_tokens_delta (n, d)    R: whole rows, despite the name, in the order of token_indices

The table itself does not travel. Rows of several tables go by the same token_indices. Where the
head is tied, peft writes the rows a second time under its name, and reads them without.
"""

from collections.abc import Sequence

from pefts.formats.contract import Files, Format, Imported, Native, Slot, Weight, expect

NAME = "trainable_tokens_delta"


def to_hf(native: Native) -> Files:
    """The rows of every table."""
    fields = {"init_weights": True, "token_indices": list(native.config["tokens"])}
    return Files(fields, {slot.module: {NAME: p["R"]} for slot, p in native.slices.items()})


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`trainable_tokens`."""
    del weight
    tokens, trainable = list(files.fields["token_indices"]), {}
    for slot in slots:
        tensors = files.modules[slot.module]
        expect(slot.module, tensors, {NAME: (len(tokens), slot.d_out)})
        trainable[slot] = {"R": tensors[NAME]}
    return Imported({"method": "trainable_tokens", "tokens": tokens}, trainable)


FORMAT = Format(
    peft_type="TRAINABLE_TOKENS",
    suffixes=(NAME,),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={"token_indices": ()},
    ignored=("init_weights",),
    biases=(),
    saves_modules=False,
    stores_tables=False,
    tied=("lm_head",),
    leaves=r"embedding$",
)
