"""A tiny BERT in both libraries, and adapters on it: what the tests of the exchange share."""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

import models
import pefts

torch = pytest.importorskip("torch", reason="parity is measured against torch")
transformers = pytest.importorskip("transformers", reason="the torch models are transformers'")
hf = pytest.importorskip("peft", reason="parity is measured against Hugging Face PEFT")

# peft still asks transformers by the old name.
PEFT_NOISE = "ignore:.is_gradient_checkpointing. is deprecated"
SIZES = {
    "vocab_size": 61,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 24,
    "initializer_range": 0.3,
}
LABELS = 5
QUERY = "encoder.layer.{}.attention.self.query"


@functools.cache
def checkpoint(kind: str) -> Path:
    """A saved random model; the folder lives as long as the process."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**SIZES, num_labels=LABELS))
    with torch.no_grad():  # fresh biases are zero and fresh norms one, which would hide swaps
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    model.save_pretrained(folder)
    return folder


class Pair:
    """One checkpoint in both libraries."""

    def __init__(self, head: bool, **options: Any) -> None:
        self.head, self.kind = head, "BertForSequenceClassification" if head else "BertModel"
        self.folder = checkpoint(self.kind)
        labels = {"num_labels": LABELS, "pooling": "pooler"} if head else {}
        self.model, self.params, self.names = models.load(self.folder, **labels, **options)
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(5, SIZES["vocab_size"], (4, 9)).astype(np.int32)
        self.mask = np.ones_like(self.tokens)
        self.mask[1, 4:] = 0
        arguments = (self.tokens, self.mask)
        self.axes = pefts.infer_axes(self.model.apply, self.params, *arguments)

    def base(self) -> Any:
        return getattr(transformers, self.kind).from_pretrained(self.folder)

    def run_torch(self, model: Any) -> np.ndarray:
        model.eval()
        tokens, mask = (torch.from_numpy(x.astype(np.int64)) for x in (self.tokens, self.mask))
        with torch.no_grad():
            out = model(input_ids=tokens, attention_mask=mask)
        return out.logits.numpy() if self.head else self.masked(out.last_hidden_state.numpy())

    def run(self, peft: pefts.Peft, state: pefts.PeftState) -> np.ndarray:
        bound = {"params": peft.bind(self.params, state)}
        out = np.asarray(pefts.apply(self.model.apply)(bound, self.tokens, self.mask))
        return out if self.head else self.masked(out)

    def masked(self, hidden: np.ndarray) -> np.ndarray:
        return hidden * self.mask[..., None]

    def opened(self, folder: Path) -> np.ndarray:
        return self.run_torch(hf.PeftModel.from_pretrained(self.base(), folder))


@functools.cache
def bare() -> Pair:
    """The encoder, its layers stacked."""
    return Pair(False)


@functools.cache
def unrolled() -> Pair:
    """The encoder, its layers one by one."""
    return Pair(False, scan_layers=False)


@functools.cache
def classifier() -> Pair:
    """The encoder under its pooler and a head."""
    return Pair(True)


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def made(pair: Pair, method: Callable[..., pefts.Peft]) -> tuple[pefts.Peft, pefts.PeftState]:
    peft = method(pair.axes)
    fresh = peft.init(jax.random.key(0), pair.params)
    return peft, pefts.randomize(jax.random.key(1), fresh, scale=0.3)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], Any] | None = None, **fields: Any):
    """Spoil a folder's tensors, or its config."""
    if change is not None:
        tensors = tensors_of(folder)
        change(tensors)
        file = folder / "adapter_model.safetensors"
        safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    config = config_of(folder) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


EXPORTS: dict[str, Callable[[Any], pefts.Peft]] = {
    "lora": lambda axes: pefts.lora(rank=3, alpha=5.0, axes=axes),
    "patterns": lambda axes: pefts.lora(
        rank=4,
        alpha=6.0,
        targets=r"query|value|intermediate",
        rank_pattern={"query": 2},
        alpha_pattern={"query": 7.0, "value": 1.5},
        axes=axes,
    ),
    "rslora": lambda axes: pefts.lora(rank=3, alpha=5.0, rslora=True, axes=axes),
    "rslora and patterns": lambda axes: pefts.lora(
        rank=3, alpha=5.0, rslora=True, rank_pattern={"query": 2}, targets=r"query|value", axes=axes
    ),
    "embeddings": lambda axes: pefts.lora(
        rank=3, targets=r"word_embeddings|position_embeddings|key", axes=axes
    ),
    "dora": lambda axes: pefts.dora(rank=3, alpha=5.0, axes=axes),
    "dora embeddings": lambda axes: pefts.dora(rank=3, targets=r"word_embeddings", axes=axes),
    "vera": lambda axes: pefts.vera(rank=6, axes=axes),
    "adalora": lambda axes: pefts.adalora(
        total_steps=20, init_rank=4, target_rank=2, alpha=5.0, warmup=(1, 0), axes=axes
    ),
}


def lora_config(**options: Any) -> Any:
    defaults = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
    return hf.LoraConfig(**(defaults | {"target_modules": ["query", "value"]} | options))


IMPORTS: dict[str, Callable[[], Any]] = {
    "lora": lora_config,
    "rslora and patterns": lambda: lora_config(
        use_rslora=True,
        rank_pattern={QUERY.format(0): 2, "layer.1.*value": 5},
        alpha_pattern={"2.attention.self.query": 2.5},
    ),
    "regular expression": lambda: lora_config(target_modules=r".*\.(key|intermediate\.dense)"),
    "every kernel": lambda: lora_config(target_modules=r"(?!pooler).*(query|key|value|dense)"),
    "some layers": lambda: lora_config(layers_to_transform=[0, 2], layers_pattern="layer"),
    "excluded": lambda: lora_config(exclude_modules=["layer.1.attention.self.query"]),
    "embeddings": lambda: lora_config(target_modules=["word_embeddings", "query"]),
    "dora": lambda: lora_config(use_dora=True, rank_pattern={QUERY.format(1): 1}),
    "dora in one layer": lambda: lora_config(use_dora=True, layers_to_transform=1),
    "biases": lambda: lora_config(bias="lora_only"),
    "norms": lambda: lora_config(modules_to_save=["LayerNorm"]),
    "adalora": lambda: hf.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, lora_alpha=5, target_modules=["query", "value"]
    ),
    "vera": lambda: hf.VeraConfig(
        r=6, target_modules=["query", "intermediate.dense"], init_weights=False
    ),
}


def trained_by_peft(pair: Pair, config: Any, folder: Path) -> np.ndarray:
    """Save an adapter with every trained tensor away from its start; what peft computes with it."""
    torch.manual_seed(1)
    model = hf.get_peft_model(pair.base(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return pair.run_torch(model)
