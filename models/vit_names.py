"""The parameter names of vision transformers, ours and those of Hugging Face checkpoints."""

from dataclasses import replace

from models.hf import Entry, NameMap, entries
from models.vit_config import CLIP

# Of clips; transformers has none, and a checkpoint of images starts without it.
_TEMPORAL = ("temporal_embeddings", "temporal_embeddings", "embedding")
_VIT = (
    ("embeddings/patch_embedding", "embeddings.patch_embeddings.projection", "conv"),
    ("encoder/layers/norm_before", "encoder.layer.{l}.layernorm_before", "norm"),
    ("encoder/layers/attention/query", "encoder.layer.{l}.attention.attention.query", "dense"),
    ("encoder/layers/attention/key", "encoder.layer.{l}.attention.attention.key", "dense"),
    ("encoder/layers/attention/value", "encoder.layer.{l}.attention.attention.value", "dense"),
    ("encoder/layers/attention/output", "encoder.layer.{l}.attention.output.dense", "dense"),
    ("encoder/layers/norm_after", "encoder.layer.{l}.layernorm_after", "norm"),
    ("encoder/layers/mlp/intermediate", "encoder.layer.{l}.intermediate.dense", "dense"),
    ("encoder/layers/mlp/output", "encoder.layer.{l}.output.dense", "dense"),
    ("norm", "layernorm", "norm"),
    ("pooler/dense", "pooler.dense", "dense"),
    ("classifier", "classifier", "dense"),
    _TEMPORAL,
)
_CLIP = (
    ("embeddings/patch_embedding", "embeddings.patch_embedding", "conv"),
    ("embeddings/position_embeddings", "embeddings.position_embedding", "embedding"),
    ("embeddings/norm", "pre_layrnorm", "norm"),  # spelt so in every checkpoint
    ("encoder/layers/norm_before", "encoder.layers.{l}.layer_norm1", "norm"),
    ("encoder/layers/attention/query", "encoder.layers.{l}.self_attn.q_proj", "dense"),
    ("encoder/layers/attention/key", "encoder.layers.{l}.self_attn.k_proj", "dense"),
    ("encoder/layers/attention/value", "encoder.layers.{l}.self_attn.v_proj", "dense"),
    ("encoder/layers/attention/output", "encoder.layers.{l}.self_attn.out_proj", "dense"),
    ("encoder/layers/norm_after", "encoder.layers.{l}.layer_norm2", "norm"),
    ("encoder/layers/mlp/intermediate", "encoder.layers.{l}.mlp.fc1", "dense"),
    ("encoder/layers/mlp/output", "encoder.layers.{l}.mlp.fc2", "dense"),
    ("norm", "post_layernorm", "norm"),
    ("projection", "visual_projection", "dense"),
    ("classifier", "classifier", "dense"),
    _TEMPORAL,
)
# What transformers 5 calls the modules of a ViT; its checkpoints keep the keys above.
_RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("encoder.layer.", "layers."),
)
NAMES: dict[str, NameMap] = {
    "vit": NameMap(
        (
            *entries(_VIT),
            Entry("embeddings/class_embedding", "embeddings.cls_token", "11"),
            Entry(
                "embeddings/position_embeddings/embedding", "embeddings.position_embeddings", "1"
            ),
        ),
        prefixes=("vit.",),
        outside=("classifier",),
        optional=(("pooler", r"pooler\..*"), ("classifier", r"classifier\..*")),
        fresh=("classifier", "temporal_embeddings"),
        ignored=(r"embeddings\.mask_token", r"decoder\..*"),  # of pretraining on masked patches
    ),
    CLIP: NameMap(
        (
            *entries(_CLIP),
            Entry("embeddings/class_embedding", "embeddings.class_embedding"),
        ),
        prefixes=("vision_model.",),
        outside=("classifier", "projection"),
        optional=(
            ("projection", r"visual_projection\..*"),
            ("classifier", r"classifier\..*"),
            ("norm", r"post_layernorm\..*"),
        ),
        fresh=("classifier", "temporal_embeddings"),
        # Of a whole CLIP the texts' tower, and what compares the two.
        ignored=(
            r"embeddings\.position_ids",
            r"text_model\..*",
            r"text_projection\..*",
            r"logit_scale",
        ),
    ),
}


def of_modules(names: NameMap) -> NameMap:
    """The map by the names of modules in transformers 5, which an adapter for peft has to use.

    Args:
      names: as `models.load` returned it. CLIP's checkpoints are named like its modules: its map
        comes back as it is.

    Example:
      >>> of_modules(NAMES["vit"]).entries[4].key
      'layers.{l}.attention.q_proj.weight'
    """

    def renamed(key: str) -> str:
        for old, new in _RENAMED:
            key = key.replace(old, new)
        return key

    return replace(
        names, entries=tuple(entry._replace(key=renamed(entry.key)) for entry in names.entries)
    )
