"""Tiny random decoders of every family, as transformers writes them, and what it computes."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    # Large weights: with the usual 0.02 every hidden state is near its bias and errors hide.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 10}
# model_type -> (configuration class, model class, arguments beside SIZES)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 4}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GEMMA),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**GEMMA, "sliding_window_pattern": 3},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
}
_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "num_key_value_heads": None,
}


class Reference(NamedTuple):
    """A checkpoint folder and the torch model that wrote it."""

    folder: Path
    torch_model: Any


def torch_model(family: str, **options: Any) -> Any:
    """A random model of a family, in evaluation mode."""
    import torch
    import transformers

    configuration, name, own = FAMILIES[family]
    fields = {**SIZES, **own, **options}
    if family == "gpt2":
        fields = {
            _GPT2_KEYS.get(key, key): value
            for key, value in fields.items()
            if _GPT2_KEYS.get(key, key)
        }
    torch.manual_seed(0)
    config = getattr(transformers, configuration)(**fields, attn_implementation="eager")
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():  # fresh biases are zero and fresh norms one, which would hide swaps
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """A saved model of every family."""
    pytest.importorskip("torch", reason="parity is measured against torch")
    pytest.importorskip("transformers", reason="parity is measured against transformers")
    made = {}
    for family in FAMILIES:
        model = torch_model(family)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        made[family] = Reference(folder, model)
    return made


def batch(length: int = 11) -> tuple[np.ndarray, np.ndarray]:
    """Three rows of tokens, two of them padded on the left, and the mask."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, SIZES["vocab_size"], (3, length))
    mask = (np.arange(length)[None, :] >= np.array([0, 4, length - 2])[:, None]).astype(np.int32)
    return np.where(mask, tokens, 0).astype(np.int32), mask


def torch_logits(model: Any, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """What transformers computes; positions count real tokens, as its `generate` has them."""
    import torch

    arguments = {"input_ids": torch.from_numpy(tokens.astype(np.int64))}
    if mask is not None:
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        arguments["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        arguments["position_ids"] = torch.from_numpy(positions.astype(np.int64))
    with torch.no_grad():
        return model(**arguments).logits.numpy()
