"""LLaMA-Adapter as Hugging Face PEFT stores it (peft_type ADAPTION_PROMPT).

    adaption_prompt (1, n, d)   P        adaption_gate (1,)   g       per attention, "...self_attn"

adapter_layers counts them from the top. peft adds the term behind the output projection, which is
the same where that has no bias, and in GPT-2 without the projection, which is not.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pefts.attention import PROJECTIONS
from pefts.formats.contract import Files, Format, Imported, Native, Slot, Weight, expect, in_order

PROMPT, GATE = "adaption_prompt", "adaption_gate"
ATTENTION = "self_attn"


def module_of(module: str) -> str:
    """The attention that a projection belongs to."""
    return module.rpartition(".")[0]


def to_hf(native: Native) -> Files:
    """The slices that are on, which have to be the upper ones."""
    slots = in_order(native.slices)
    for slot in slots:
        if not slot.module.endswith(f".{ATTENTION}.v_proj"):
            raise ValueError(
                f"peft has adaption prompts for the attention of Llama and Mistral alone, and "
                f"{slot.path!r} is {slot.module!r} there: this model's cannot be written."
            )
    chosen = [slot for slot in slots if native.slices[slot].get("on", 1)]
    fields = {
        "adapter_layers": len(chosen),
        "adapter_len": int(native.config["length"]),
        "target_modules": ATTENTION,
    }
    modules = {
        module_of(slot.module): {
            PROMPT: native.slices[slot]["P"][None],
            GATE: native.slices[slot]["gate"].reshape(1),
        }
        for slot in chosen
    }
    return Files(fields, modules)


def from_hf(files: Files, slots: Sequence[Slot], weight: Weight) -> Imported:
    """`llama_adapter`; slices without tensors are off."""
    del weight
    length, trainable, frozen = int(files.fields["adapter_len"]), {}, {}
    for slot in slots:
        tensors = files.modules.get(module_of(slot.module))
        frozen[slot] = {"on": np.float32(tensors is not None)}
        if tensors is None:
            trainable[slot] = {
                "P": np.zeros((length, slot.d_in), np.float32),
                "gate": np.zeros((), np.float32),
            }
            continue
        expect(slot.module, tensors, {PROMPT: (1, length, slot.d_in), GATE: (1,)})
        trainable[slot] = {"P": tensors[PROMPT][0], "gate": tensors[GATE].reshape(())}
    count = sum(int(flags["on"]) for flags in frozen.values())
    is_whole = count == len(slots)
    config = {"method": "llama_adapter", "length": length, "layers": None if is_whole else count}
    return Imported(config, trainable, {} if is_whole else frozen)


def selects(config: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """The upper attentions of those that target_modules ends."""
    end = f".{config.get('target_modules') or ATTENTION}"
    found = in_order(name for name in names if name.endswith(end))
    return set(found[-int(config["adapter_layers"]) :])


FORMAT = Format(
    peft_type="ADAPTION_PROMPT",
    suffixes=(PROMPT, GATE),
    to_hf=to_hf,
    from_hf=from_hf,
    fields={"adapter_layers": None, "adapter_len": None},
    biases=(),
    saves_modules=False,
    stores_tables=False,
    leaves=PROJECTIONS,
    module_of=module_of,
    selects=selects,
)
