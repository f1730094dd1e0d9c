"""Configuration of vision transformers, read from and written to a Hugging Face config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from models.config import ACTIVATIONS as SHARED
from models.config import check, choose

CLIP = "clip_vision_model"
FAMILIES = ("vit", CLIP)
# CLIP's is not one of the text models'.
ACTIVATIONS = {**SHARED, "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x)}
REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
SIZES = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
    "num_channels",
    "projection_dim",
    "num_frames",
)
# The defaults of transformers, for what a config.json leaves out.
DEFAULTS = {
    "vit": {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "patch_size": 16},
    CLIP: {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32},
}


@dataclass(frozen=True)
class VisionConfig:
    """Sizes, numerics and lifting of one vision transformer.

    `dtype`, `param_dtype`, `scan_layers` and `remat` as in `models.config.EncoderConfig`. With
    `num_frames` above 1 the model reads clips, and the first heads look at the frame so many behind
    (or, below 0, before) their own that `head_offsets` says: (-1, 1) for the neighbours.

    Raises:
      ValueError: a size is not positive, the patches do not tile the image, heads do not divide
        hidden_size, head_offsets are 0, too many or without frames, or a named choice (model_type,
        activation, dtypes, remat) is not supported.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    model_type: str = "vit"
    activation: str = "gelu"
    norm_eps: float = 1e-12
    initializer_range: float = 0.02
    qkv_bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.0
    projection_dim: int = 512
    num_frames: int = 1
    head_offsets: tuple[int, ...] = ()
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"

    def __post_init__(self) -> None:
        choose("model_type", self.model_type, FAMILIES)
        choose("hidden_act", self.activation, ACTIVATIONS)
        check(self, SIZES, ("dropout", "attention_dropout", "classifier_dropout"))
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}"
            )
        offsets = self.head_offsets
        if offsets and (self.num_frames == 1 or 0 in offsets or len(offsets) > self.num_heads):
            raise ValueError(
                f"head_offsets={offsets} with num_frames={self.num_frames} and num_heads="
                f"{self.num_heads}: give clips of several frames, and other offsets than 0 for at "
                "most all heads"
            )
        if self.image_size % self.patch_size:
            below = self.image_size - self.image_size % self.patch_size
            near = [size for size in (below, below + self.patch_size) if size]
            raise ValueError(
                f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}: "
                f"patches would not tile the image; near sizes: {near}"
            )

    @property
    def is_clip(self) -> bool:
        """A norm before the layers, none on patches after them, no bias where patches enter."""
        return self.model_type == CLIP

    @property
    def num_tokens(self) -> int:
        """The class token and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **options: Any) -> "VisionConfig":
        """Reads the content of a Hugging Face config.json; of a whole CLIP its image tower.

        Args:
          hf: the parsed file.
          **options: fields that config.json does not know, or overrides (dtype, remat, dropout).

        Raises:
          ValueError: unknown model_type, a missing size, or images or patches that are not square.

        Example:
          >>> sizes = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
          ...              intermediate_size=3072)
          >>> VisionConfig.from_hf({"model_type": "vit", **sizes}).num_tokens
          197
        """
        hf = _image_tower(hf)
        model_type = str(hf.get("model_type"))
        choose("model_type", model_type, FAMILIES)
        absent = [key for key in REQUIRED if key not in hf]
        if absent:
            raise ValueError(f"config.json lacks {', '.join(absent)}")
        hf = {**DEFAULTS[model_type], **hf}
        fields = {
            "hidden_size": hf["hidden_size"],
            "num_layers": hf["num_hidden_layers"],
            "num_heads": hf["num_attention_heads"],
            "intermediate_size": hf["intermediate_size"],
            "image_size": _side(hf, "image_size", 224),
            "patch_size": _side(hf, "patch_size", 16),
            "num_channels": hf.get("num_channels", 3),
            "model_type": model_type,
            "activation": hf["hidden_act"],
            "norm_eps": hf["layer_norm_eps"],
            "initializer_range": hf.get("initializer_range", 0.02),
            "qkv_bias": hf.get("qkv_bias", True),
            "dropout": hf.get("hidden_dropout_prob", 0.0),
            "attention_dropout": hf.get(_attention_dropout(model_type), 0.0),
            "projection_dim": hf.get("projection_dim", 512),
            "num_frames": hf.get("num_frames", 1),
            "head_offsets": hf.get("head_offsets", ()),
        }
        fields |= options
        return cls(**{**fields, "head_offsets": tuple(fields["head_offsets"])})

    def to_hf(self) -> dict[str, Any]:
        """Content of a config.json that `from_hf` and transformers read back."""
        own = (
            {"projection_dim": self.projection_dim}
            if self.is_clip
            else {"qkv_bias": self.qkv_bias, "hidden_dropout_prob": self.dropout}
        )
        if self.num_frames > 1:
            clips = {"num_frames": self.num_frames, "head_offsets": list(self.head_offsets)}
            own = {**own, **clips}
        return {
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "num_channels": self.num_channels,
            "hidden_act": self.activation,
            "layer_norm_eps": self.norm_eps,
            "initializer_range": self.initializer_range,
            _attention_dropout(self.model_type): self.attention_dropout,
            **own,
        }


def _image_tower(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    if hf.get("model_type") != "clip":
        return hf
    # What the two towers project to stands beside them.
    shared = {"projection_dim": hf.get("projection_dim", 512)}
    return {"model_type": CLIP, **hf.get("vision_config", {}), **shared}


def _attention_dropout(model_type: str) -> str:
    return "attention_dropout" if model_type == CLIP else "attention_probs_dropout_prob"


def _side(hf: Mapping[str, Any], key: str, default: int) -> int:
    value = hf.get(key, default)
    sides = list(value) if isinstance(value, list | tuple) else [value]
    if len(set(sides)) != 1 or not isinstance(sides[0], int):
        raise ValueError(f"{key}={value!r} is not supported; only squares of one integer are")
    return sides[0]
