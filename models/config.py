"""Configuration of the BERT family, read from and written to a Hugging Face config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
}
DTYPES = ("bfloat16", "float32")
# What a rematerialised layer keeps for its backward pass; None: layers are not rematerialised.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# Default pad id per model type, for a config.json that leaves it out.
PAD_ID = {"bert": 0, "roberta": 1, "xlm-roberta": 1}
# config.json features that change the computation and are not built here: key -> accepted values.
ACCEPTED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "is_decoder": (False, None),
    "position_embedding_type": ("absolute", None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "intermediate_size",
    "max_positions",
    "type_vocab_size",
)
DROPOUTS = ("dropout", "attention_dropout", "classifier_dropout")


def choose(name: str, value: Any, known: Any) -> None:
    """Raises ValueError, listing the known values, unless `value` is one of them."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is not supported; choose one of {sorted(known)}")


def check(config: Any, sizes: tuple[str, ...], dropouts: tuple[str, ...]) -> None:
    """Raises ValueError unless numerics are known, sizes positive and dropouts in [0, 1)."""
    choose("dtype", config.dtype, DTYPES)
    choose("param_dtype", config.param_dtype, DTYPES)
    choose("remat", config.remat, REMAT)
    for name in sizes:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    for name in dropouts:
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name}={getattr(config, name)} must be in [0, 1)")


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes, numerics and lifting of one encoder.

    `dtype` is the dtype of the computation, `param_dtype` of the parameters. `scan_layers` compiles
    one layer for all (parameters stacked on a leading axis). `remat` trades time for memory:
    "none", "full" (only layer inputs are kept), "dots" (matrix products are kept too).

    Raises:
      ValueError: a size is not positive, heads do not divide hidden_size, or a named choice
        (model_type, activation, dtype, param_dtype, remat) is not supported.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 512
    type_vocab_size: int = 2
    pad_id: int = 0
    model_type: str = "bert"
    activation: str = "gelu"
    norm_eps: float = 1e-12
    initializer_range: float = 0.02
    dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"

    def __post_init__(self) -> None:
        choose("model_type", self.model_type, PAD_ID)
        choose("hidden_act", self.activation, ACTIVATIONS)
        check(self, SIZES, DROPOUTS)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}"
            )

    @property
    def max_length(self) -> int:
        """Longest sequence: RoBERTa's positions start behind the pad id."""
        return self.max_positions - (0 if self.model_type == "bert" else self.pad_id + 1)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **options: Any) -> "EncoderConfig":
        """Reads the content of a Hugging Face config.json.

        Args:
          hf: the parsed file.
          **options: fields that config.json does not know, or overrides (dtype, remat, dropout).

        Raises:
          ValueError: unknown model_type, a missing size, or a feature that is not built here.

        Example:
          >>> sizes = dict(vocab_size=30522, hidden_size=384, num_hidden_layers=6,
          ...              num_attention_heads=12, intermediate_size=1536)
          >>> EncoderConfig.from_hf({"model_type": "bert", **sizes}, remat="full").max_length
          512
        """
        choose("model_type", hf.get("model_type"), PAD_ID)
        absent = [key for key in REQUIRED if key not in hf]
        if absent:
            raise ValueError(f"config.json lacks {', '.join(absent)}")
        for key, accepted in ACCEPTED.items():
            if hf.get(key) not in accepted:
                raise ValueError(f"{key}={hf[key]!r} is not supported; only {accepted[0]!r} is")
        dropout = hf.get("hidden_dropout_prob", 0.1)
        head_dropout = hf.get("classifier_dropout")
        pad_id = hf.get("pad_token_id", PAD_ID[hf["model_type"]])
        if pad_id is None:
            raise ValueError("pad_token_id=None is not supported; give the id of padding")
        fields = {
            "vocab_size": hf["vocab_size"],
            "hidden_size": hf["hidden_size"],
            "num_layers": hf["num_hidden_layers"],
            "num_heads": hf["num_attention_heads"],
            "intermediate_size": hf["intermediate_size"],
            "max_positions": hf.get("max_position_embeddings", 512),
            "type_vocab_size": hf.get("type_vocab_size", 2),
            "pad_id": pad_id,
            "model_type": hf["model_type"],
            "activation": hf.get("hidden_act", "gelu"),
            "norm_eps": hf.get("layer_norm_eps", 1e-12),
            "initializer_range": hf.get("initializer_range", 0.02),
            "dropout": dropout,
            "attention_dropout": hf.get("attention_probs_dropout_prob", 0.1),
            "classifier_dropout": dropout if head_dropout is None else head_dropout,
        }
        return cls(**(fields | options))

    def to_hf(self) -> dict[str, Any]:
        """Content of a config.json that `from_hf` and transformers read back."""
        return {
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_positions,
            "type_vocab_size": self.type_vocab_size,
            "pad_token_id": self.pad_id,
            "hidden_act": self.activation,
            "layer_norm_eps": self.norm_eps,
            "initializer_range": self.initializer_range,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.attention_dropout,
            "classifier_dropout": self.classifier_dropout,
        }
