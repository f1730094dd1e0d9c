"""Tiny random encoders that transformers wrote, what it computes with them, and ways to spoil them.

conftest.py offers the fixtures to every test.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from models import encoder, hf

SIZES = {
    "vocab_size": 61,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 24,
    # Large weights: with the usual 0.02 every hidden state is near its bias and errors hide.
    "initializer_range": 0.4,
}
FAMILIES = ("bert", "roberta", "xlm-roberta")


@pytest.fixture(scope="session")
def transformers():
    pytest.importorskip("torch", reason="parity is measured against torch")
    return pytest.importorskip("transformers", reason="parity is measured against transformers")


def torch_model(transformers, family, head="Model", **options):
    import torch

    name = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | options))
    model = getattr(transformers, f"{name}{head}")(config).eval()
    with torch.no_grad():  # fresh biases are zero and fresh norms one, which would hide swaps
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def checkpoints(transformers, tmp_path_factory):
    """A saved base model of every family: name -> (folder, torch model)."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        model = torch_model(transformers, family)
        model.save_pretrained(folder)
        made[family] = folder, model
    return made


@pytest.fixture
def bert_folder(checkpoints, tmp_path):
    """A copy of the BERT checkpoint that a test may spoil."""
    return Path(shutil.copytree(checkpoints["bert"][0], tmp_path / "bert"))


def batch(family, token_types=2):
    """Tokens with padding, mask, token types (RoBERTa has one type only)."""
    pad = encoder.EncoderConfig.from_hf({"model_type": family, **SIZES}).pad_id
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, SIZES["vocab_size"], (4, 9))
    mask = (np.arange(9)[None, :] < np.array([9, 4, 7, 1])[:, None]).astype(np.int32)
    types = rng.integers(0, token_types, (4, 9))
    return np.where(mask, tokens, pad).astype(np.int32), mask, types.astype(np.int32)


def torch_hidden(model, tokens, mask, types):
    import torch

    rows = [torch.from_numpy(x.astype(np.int64)) for x in (tokens, mask, types)]
    with torch.no_grad():
        out = model(input_ids=rows[0], attention_mask=rows[1], token_type_ids=rows[2])
    return out.logits.numpy() if hasattr(out, "logits") else out.last_hidden_state.numpy()


def close(ours, theirs, mask):
    real = mask[..., None].astype(bool) if ours.ndim == 3 else True
    np.testing.assert_allclose(
        np.where(real, ours, 0), np.where(real, theirs, 0), atol=1e-5, rtol=1e-5
    )


def rewrite(folder, change):
    """Applies change(dict of tensors) to a checkpoint, in place."""
    tensors = safetensors.numpy.load_file(folder / hf.SINGLE)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / hf.SINGLE, {"format": "pt"})


def edit_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))
