"""Configuration of decoder language models, read from and written to a Hugging Face config.json.

Each family is data: where config.json keeps a field, what transformers takes where it is absent,
and what is always so in the family.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from models.attention import Implementation
from models.config import ACTIVATIONS, check, choose
from models.rope import Rope

NORMS = ("rms", "rms_offset", "layer")
SLIDING, FULL = "sliding_attention", "full_attention"
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "max_positions",
)
DROPOUTS = ("dropout", "embed_dropout", "attention_dropout")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes, architecture and numerics of one decoder.

    Architecture: `norm` is "rms", "rms_offset" (scale 1 + w, as Gemma keeps it) or "layer";
    `gated` an MLP of two products instead of one; `sandwich` norms behind attention and MLP too;
    `qk_norm` norms of queries and keys; `fused_qkv` one product for all three (GPT-2). Without
    `rope` positions are learned. Layers for which `sliding` is true see the last `window`
    positions, turned by `local_rope` if there is one.

    Numerics: `dtype` of the computation, `param_dtype` of the parameters, `scan_layers` compiles
    one layer for all, `remat` as in `EncoderConfig`, `attention` the implementation: "auto", "xla",
    or "cudnn" (flash attention on NVIDIA GPUs, bfloat16).

    Raises:
      ValueError: a size is not positive, key heads do not divide query heads, a head is odd where
        it is turned, or a named choice is not supported.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    model_type: str = "llama"
    activation: str = "silu"
    gated: bool = True
    norm: str = "rms"
    norm_eps: float = 1e-6
    sandwich: bool = False
    qk_norm: bool = False
    fused_qkv: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    embed_scale: float = 1.0
    query_scale: float | None = None  # of queries against keys; None: head_dim^(-1/2)
    attention_cap: float | None = None  # c tanh(. / c) of the attention's logits
    logit_cap: float | None = None
    rope: Rope | None = None
    local_rope: Rope | None = None
    window: int | None = None
    sliding: tuple[bool, ...] = ()
    initializer_range: float = 0.02
    dropout: float = 0.0
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention: Implementation = "auto"

    def __post_init__(self) -> None:
        choose("model_type", self.model_type, FAMILIES)
        choose("activation", self.activation, ACTIVATIONS)
        choose("norm", self.norm, NORMS)
        choose("attention", self.attention, get_args(Implementation))
        check(self, SIZES, DROPOUTS)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} must be a multiple of "
                f"num_key_value_heads={self.num_kv_heads}"
            )
        if self.rope and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs")
        if self.fused_qkv and self.num_kv_heads != self.num_heads:
            raise ValueError("a fused q, k, v product needs as many key heads as query heads")
        if self.sliding and len(self.sliding) != self.num_layers:
            raise ValueError(f"layer_types has {len(self.sliding)} entries for {self.num_layers}")
        if any(self.sliding) and (self.window is None or self.window < 1):
            raise ValueError(f"sliding_window={self.window} must be at least 1 for sliding layers")

    @property
    def max_length(self) -> int | None:
        """Longest sequence; None where positions are turned, which has no end."""
        return None if self.rope else self.max_positions

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **options: Any) -> "DecoderConfig":
        """Reads the content of a Hugging Face config.json.

        Args:
          hf: the parsed file.
          **options: fields that config.json does not know, or overrides (dtype, remat, dropout).

        Raises:
          ValueError: unknown model_type, a missing size, or a feature that is not built here.

        Example:
          >>> sizes = dict(vocab_size=32000, hidden_size=64, num_hidden_layers=2,
          ...              num_attention_heads=8, intermediate_size=172)
          >>> DecoderConfig.from_hf({"model_type": "llama", **sizes}, remat="full").head_dim
          8
        """
        model_type = str(hf.get("model_type"))
        if model_type in WITH_IMAGES:
            hf, model_type = hf.get("text_config", {}), WITH_IMAGES[model_type]
        choose("model_type", model_type, FAMILIES)
        family = FAMILIES[model_type]
        for key, accepted in {**ACCEPTED, **family.accepted}.items():
            if hf.get(key) not in (*accepted, None):
                raise ValueError(f"{key}={hf[key]!r} is not supported; only {accepted[0]!r} is")
        read = {name: hf.get(key, family.defaults.get(name)) for name, key in family.keys.items()}
        absent = [family.keys[name] for name in REQUIRED if read[name] is None]
        if absent:
            raise ValueError(f"config.json lacks {', '.join(absent)}")
        # A null asks for what follows from the other fields.
        fields = {**family.fixed, **{k: v for k, v in read.items() if v is not None}}
        return cls(model_type=model_type, **(family.complete(fields, hf) | options))

    def to_hf(self) -> dict[str, Any]:
        """Content of a config.json that `from_hf` and transformers read back."""
        family = FAMILIES[self.model_type]
        written = {key: getattr(self, name) for name, key in family.keys.items()}
        return {
            "model_type": self.model_type,
            "architectures": [family.architecture],
            "torch_dtype": self.param_dtype,
            **written,
            **family.write(self),
        }


class ConfigFamily(NamedTuple):
    """How one model_type keeps a `DecoderConfig` in its config.json.

    Attributes:
      architecture: the class of transformers with a language-model head.
      keys: field -> key.
      defaults: field -> what transformers takes where config.json has no such key.
      fixed: fields that the family always has so.
      complete: (fields, config.json) -> fields, with those that follow from several keys.
      write: config -> the keys that `complete` reads.
      accepted: key -> values; others change the computation and are not built here.
    """

    architecture: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    complete: Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]
    accepted: Mapping[str, tuple[Any, ...]]


REQUIRED = ("vocab_size", "hidden_size", "num_layers", "num_heads")
WITH_IMAGES = {"gemma3": "gemma3_text"}  # of these models the text part is built
ACCEPTED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
    "use_bidirectional_attention": (False,),
}
_SHARED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "attention_dropout": "attention_dropout",
    "tie_embeddings": "tie_word_embeddings",
    "activation": "hidden_act",
}
_BIASES = {"qkv_bias": "attention_bias"}
_GEMMA_KEYS = {
    **_SHARED,
    **_BIASES,
    "activation": "hidden_activation",
    "attention_cap": "attn_logit_softcapping",
    "logit_cap": "final_logit_softcapping",
    "query_scale": "query_pre_attn_scalar",
}
_GEMMA_FIXED = {"norm": "rms_offset", "sandwich": True}


def _sized(fields: dict[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Head counts, head size and biases that follow from other fields; rotary positions."""
    fields.setdefault("num_kv_heads", fields["num_heads"])
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_heads"])
    fields.setdefault("output_bias", fields.get("qkv_bias", False))
    theta = content.get("rope_theta") or 10_000.0
    section = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if FULL not in section:
        section = _with_original(section, content)
        fields["rope"] = Rope.from_hf(section, theta, fields["max_positions"])
    return fields


def _with_original(section: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    # LongRoPE checkpoints keep it beside the section.
    original = content.get("original_max_position_embeddings")
    return {"original_max_position_embeddings": original, **section}


def _write_sized(config: DecoderConfig) -> dict[str, Any]:
    return {"rope_parameters": config.rope.to_hf() if config.rope else None}


def _mistral(fields: dict[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    window = content.get("sliding_window", 4096)
    if window is not None:
        fields |= {"window": window, "sliding": (True,) * fields["num_layers"]}
    return _sized(fields, content)


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return {**_write_sized(config), "sliding_window": config.window}


def _qwen(fields: dict[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    if content.get("use_sliding_window"):
        first, layers = content.get("max_window_layers", 28), fields["num_layers"]
        fields["window"] = content.get("sliding_window", 4096)
        fields["sliding"] = _sliding(content, [i >= first for i in range(layers)])
    return _sized(fields, content)


def _write_qwen(config: DecoderConfig) -> dict[str, Any]:
    return {
        **_write_sized(config),
        "use_sliding_window": any(config.sliding),
        "sliding_window": config.window,
        "layer_types": _layer_types(config),
    }


def _gemma2(fields: dict[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    fields["window"] = content.get("sliding_window") or 4096
    alternating = [i % 2 == 0 for i in range(fields["num_layers"])]
    fields["sliding"] = _sliding(content, alternating)
    fields["embed_scale"] = math.sqrt(fields["hidden_size"])
    fields["query_scale"] = fields["query_scale"] ** -0.5
    return _sized(fields, content)


def _gemma3(fields: dict[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    period = content.get("sliding_window_pattern") or 6
    local = [bool((i + 1) % period) for i in range(fields["num_layers"])]
    fields = _gemma2(fields, {**content, "layer_types": content.get("layer_types") or local})
    section = content.get("rope_parameters") or {}
    far = section.get(FULL) or content.get("rope_scaling") or {}
    near = section.get(SLIDING) or {}
    positions = fields["max_positions"]
    fields["rope"] = Rope.from_hf(far, content.get("rope_theta") or 1e6, positions)
    theta = content.get("rope_local_base_freq") or 10_000.0
    return fields | {"local_rope": Rope.from_hf(near, theta, positions)}


def _write_gemma(config: DecoderConfig) -> dict[str, Any]:
    assert config.query_scale is not None and config.rope is not None
    scalar = config.query_scale**-2
    rope = config.rope.to_hf()
    if config.local_rope is not None:
        rope = {FULL: rope, SLIDING: config.local_rope.to_hf()}
    return {
        "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar)) else scalar,
        "sliding_window": config.window,
        "layer_types": _layer_types(config),
        "rope_parameters": rope,
    }


def _sliding(content: Mapping[str, Any], otherwise: list[bool]) -> tuple[bool, ...]:
    named = content.get("layer_types")
    if named is None:
        return tuple(otherwise)
    return tuple(_is_sliding(name) for name in named)


def _is_sliding(name: Any) -> bool:
    if not isinstance(name, bool):
        choose("layer_types", name, (SLIDING, FULL))
    return name is True or name == SLIDING


def _layer_types(config: DecoderConfig) -> list[str]:
    flags = config.sliding or (False,) * config.num_layers
    return [SLIDING if flag else FULL for flag in flags]


def _gpt2(fields: dict[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    del content
    fields.setdefault("intermediate_size", 4 * fields["hidden_size"])
    heads = fields["num_heads"]
    return fields | {"num_kv_heads": heads, "head_dim": fields["hidden_size"] // heads}


def _nothing(config: DecoderConfig) -> dict[str, Any]:
    del config
    return {}


_LLAMA_DEFAULTS = {
    "intermediate_size": 11008,
    "max_positions": 2048,
    "norm_eps": 1e-6,
    "activation": "silu",
}
_GEMMA_DEFAULTS = {
    "num_kv_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "max_positions": 8192,
    "activation": "gelu_pytorch_tanh",
    "tie_embeddings": True,
    "query_scale": 256,
}
FAMILIES: dict[str, ConfigFamily] = {
    "llama": ConfigFamily(
        "LlamaForCausalLM",
        {**_SHARED, **_BIASES, "mlp_bias": "mlp_bias"},
        _LLAMA_DEFAULTS,
        {},
        _sized,
        _write_sized,
        {"pretraining_tp": (1,)},
    ),
    "mistral": ConfigFamily(
        "MistralForCausalLM",
        _SHARED,
        {
            **_LLAMA_DEFAULTS,
            "num_kv_heads": 8,
            "intermediate_size": 14336,
            "max_positions": 131_072,
        },
        {},
        _mistral,
        _write_mistral,
        {},
    ),
    "qwen2": ConfigFamily(
        "Qwen2ForCausalLM",
        _SHARED,
        {**_LLAMA_DEFAULTS, "intermediate_size": 22016, "max_positions": 32768},
        {"qkv_bias": True, "output_bias": False},
        _qwen,
        _write_qwen,
        {},
    ),
    "qwen3": ConfigFamily(
        "Qwen3ForCausalLM",
        {**_SHARED, **_BIASES},
        {**_LLAMA_DEFAULTS, "intermediate_size": 22016, "max_positions": 32768, "head_dim": 128},
        {"qk_norm": True},
        _qwen,
        _write_qwen,
        {},
    ),
    "gemma2": ConfigFamily(
        "Gemma2ForCausalLM",
        _GEMMA_KEYS,
        {**_GEMMA_DEFAULTS, "attention_cap": 50.0, "logit_cap": 30.0},
        _GEMMA_FIXED,
        _gemma2,
        _write_gemma,
        {},
    ),
    "gemma3_text": ConfigFamily(
        "Gemma3ForCausalLM",
        _GEMMA_KEYS,
        {
            **_GEMMA_DEFAULTS,
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "num_layers": 26,
            "num_heads": 8,
            "max_positions": 131_072,
        },
        {**_GEMMA_FIXED, "qk_norm": True},
        _gemma3,
        _write_gemma,
        {},
    ),
    "gpt2": ConfigFamily(
        "GPT2LMHeadModel",
        {
            "vocab_size": "vocab_size",
            "hidden_size": "n_embd",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_positions": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
            "initializer_range": "initializer_range",
            "dropout": "resid_pdrop",
            "embed_dropout": "embd_pdrop",
            "attention_dropout": "attn_pdrop",
            "tie_embeddings": "tie_word_embeddings",
        },
        {
            "max_positions": 1024,
            "norm_eps": 1e-5,
            "activation": "gelu_new",
            "dropout": 0.1,
            "embed_dropout": 0.1,
            "attention_dropout": 0.1,
            "tie_embeddings": True,
        },
        {
            "norm": "layer",
            "gated": False,
            "fused_qkv": True,
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
        },
        _gpt2,
        _nothing,
        {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
        },
    ),
}
