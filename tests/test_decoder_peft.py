"""Adapters of decoders in real Hugging Face PEFT, and back: the same logits and the same text."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_decoders import FAMILIES, Reference, batch, torch_logits

import models
import pefts
from models.generate import generate

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated",  # peft asks transformers by the old name
)


def randomised(peft: pefts.Peft, params: Any) -> pefts.PeftState:
    return pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), params))


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_and_writes_the_same(
    decoders: dict[str, Reference], family: str, tmp_path: Path
) -> None:
    hf = pytest.importorskip("peft", reason="parity is measured against Hugging Face PEFT")
    import torch
    import transformers

    folder = decoders[family].folder
    model, params, names = models.load(folder)
    tokens, mask = batch()
    peft = pefts.lora(rank=4, alpha=6.0, axes=pefts.infer_axes(model.apply, params, tokens))
    state = randomised(peft, params)
    pefts.export_hf(tmp_path, peft, state, params, names)

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    theirs = hf.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    run, bound = pefts.apply(model.apply), {"params": peft.bind(params, state)}
    ours = np.asarray(jax.jit(lambda: run(bound, tokens, mask))())
    real = mask.astype(bool)
    plain = np.asarray(model.apply({"params": params}, tokens, mask))
    assert np.abs(ours - plain)[real].max() > 0.1
    np.testing.assert_allclose(
        ours[real], torch_logits(theirs, tokens, mask)[real], atol=5e-5, rtol=0
    )
    text = generate(run, model.config, bound, tokens, mask, new_tokens=6, stop=(2,)).tokens
    written = theirs.generate(
        input_ids=torch.from_numpy(tokens.astype(np.int64)),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        max_new_tokens=6,
        do_sample=False,
    ).numpy()[:, tokens.shape[1] :]
    np.testing.assert_array_equal(text[:, : written.shape[1]], written)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_what_peft_writes_is_read(
    decoders: dict[str, Reference], family: str, tmp_path: Path
) -> None:
    hf = pytest.importorskip("peft", reason="parity is measured against Hugging Face PEFT")
    import torch
    import transformers

    folder = decoders[family].folder
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    config = hf.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
    )
    torch.manual_seed(0)
    theirs = hf.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    model, params, names = models.load(folder)
    peft, state = pefts.import_hf(tmp_path, params, names)
    tokens, mask = batch()
    ours = pefts.apply(model.apply)({"params": peft.bind(params, state)}, tokens, mask)
    real = mask.astype(bool)
    expected = torch_logits(theirs, tokens, mask)
    np.testing.assert_allclose(np.asarray(ours)[real], expected[real], atol=5e-5, rtol=0)
