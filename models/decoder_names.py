"""The parameter names of every decoder family, ours and those of Hugging Face checkpoints."""

from models.hf import NameMap, entries

_SHARED = (
    ("embed_tokens", "embed_tokens", "embedding"),
    ("layers/self_attn/q_proj", "layers.{l}.self_attn.q_proj", "dense"),
    ("layers/self_attn/k_proj", "layers.{l}.self_attn.k_proj", "dense"),
    ("layers/self_attn/v_proj", "layers.{l}.self_attn.v_proj", "dense"),
    ("layers/self_attn/o_proj", "layers.{l}.self_attn.o_proj", "dense"),
    ("layers/self_attn/q_norm", "layers.{l}.self_attn.q_norm", "norm"),
    ("layers/self_attn/k_norm", "layers.{l}.self_attn.k_norm", "norm"),
    ("layers/mlp/gate_proj", "layers.{l}.mlp.gate_proj", "dense"),
    ("layers/mlp/up_proj", "layers.{l}.mlp.up_proj", "dense"),
    ("layers/mlp/down_proj", "layers.{l}.mlp.down_proj", "dense"),
    ("layers/attention_norm", "layers.{l}.input_layernorm", "norm"),
    ("norm", "norm", "norm"),
    ("lm_head", "lm_head", "dense"),
)
_TWO_NORMS = (("layers/mlp_norm", "layers.{l}.post_attention_layernorm", "norm"),)
_FOUR_NORMS = (
    ("layers/attention_norm_after", "layers.{l}.post_attention_layernorm", "norm"),
    ("layers/mlp_norm", "layers.{l}.pre_feedforward_layernorm", "norm"),
    ("layers/mlp_norm_after", "layers.{l}.post_feedforward_layernorm", "norm"),
)
_GPT2 = (
    ("embed_tokens", "wte", "embedding"),
    ("embed_positions", "wpe", "embedding"),
    ("layers/self_attn/qkv_proj", "h.{l}.attn.c_attn", "conv1d"),
    ("layers/self_attn/o_proj", "h.{l}.attn.c_proj", "conv1d"),
    ("layers/mlp/up_proj", "h.{l}.mlp.c_fc", "conv1d"),
    ("layers/mlp/down_proj", "h.{l}.mlp.c_proj", "conv1d"),
    ("layers/attention_norm", "h.{l}.ln_1", "norm"),
    ("layers/mlp_norm", "h.{l}.ln_2", "norm"),
    ("norm", "ln_f", "norm"),
    ("lm_head", "lm_head", "dense"),
)
# A tied head may lie in the file a second time.
_TIED = (("lm_head", r"(language_model\.)?lm_head\..*"),)
_LLAMA = NameMap(
    entries(_SHARED + _TWO_NORMS),
    prefixes=("model.",),
    outside=("lm_head",),
    optional=_TIED,
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
_GEMMA = NameMap(
    entries(_SHARED + _FOUR_NORMS),
    # Of a model with images too, before and since transformers renamed its parts.
    prefixes=("language_model.model.", "model.language_model.", "model."),
    outside=("lm_head",),
    optional=_TIED,
    ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
)
NAMES: dict[str, NameMap] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": NameMap(
        entries(_GPT2),
        prefixes=("transformer.",),
        outside=("lm_head",),
        optional=_TIED,
        ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
    ),
}
