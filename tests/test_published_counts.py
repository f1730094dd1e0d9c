"""Trainable parameters that papers and their code report, from the shapes of the models alone."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import pefts
from pefts import core

QUERY_VALUE = r"/(query|value)/"
QUERY_KEY_VALUE = r"/(query|key|value)/"
XS_KERNELS = r"/(query|value|out|down)/"  # those of LoRA-XS and LoRA-SB on GLUE


def encoder(layers: int, width: int) -> dict[str, tuple[int, int, int]]:
    """BERT's linear kernels (layers, d_in, d_out)."""
    square = dict.fromkeys(("query", "key", "value", "out"), (layers, width, width))
    return square | {"up": (layers, width, 4 * width), "down": (layers, 4 * width, width)}


def decoder(layers: int, width: int, kv: int, hidden: int) -> dict[str, tuple[int, int, int]]:
    """Llama's seven projections (layers, d_in, d_out)."""
    return {
        "query": (layers, width, width),
        "key": (layers, width, kv),
        "value": (layers, width, kv),
        "out": (layers, width, width),
        "gate": (layers, width, hidden),
        "up": (layers, width, hidden),
        "down": (layers, hidden, width),
    }


MODELS = {
    "gemma-2b": decoder(18, 2048, 256, 16384),
    "llama-2-7b": decoder(32, 4096, 4096, 11008),  # LLaMA-7B has the same shapes
    "llama-2-70b": decoder(80, 8192, 1024, 28672),
    "llama-3-8b": decoder(32, 4096, 1024, 14336),
    "llama-3.2-3b": decoder(28, 3072, 1024, 8192),
    "mistral-7b": decoder(32, 4096, 1024, 14336),
    "roberta-base": encoder(12, 768),
    "roberta-large": encoder(24, 1024),
}


class Count(NamedTuple):
    method: str
    kwargs: Mapping[str, Any]
    model: str
    count: int
    targets: str = "all-linear"


COUNTS = (
    Count("boft", {"block_size": 4}, "llama-3.2-3b", 802_816, QUERY_VALUE),
    Count("hira", {"rank": 32}, "llama-3.2-3b", 9_175_040, QUERY_VALUE),
    Count("ia3", {}, "llama-3.2-3b", 286_720, r"/(key|value|down)/"),
    Count("loha", {"rank": 32}, "llama-3.2-3b", 18_350_080, QUERY_VALUE),
    Count("llama_adapter", {"length": 100}, "llama-3.2-3b", 8_601_628, r"/value/"),
    Count("loldu", {"rank": 768}, "roberta-base", 18_432, QUERY_VALUE),
    Count("lokr", {"rank": 32, "decompose_factor": 4}, "llama-3.2-3b", 2_294_656, QUERY_VALUE),
    Count("lora", {"rank": 2}, "llama-2-7b", 4_997_120),
    Count("lora", {"rank": 64}, "mistral-7b", 167_772_160),
    Count("lora", {"rank": 8}, "roberta-base", 294_912, QUERY_VALUE),
    Count("lora", {"rank": 8}, "roberta-large", 786_432, QUERY_VALUE),
    Count("lora_sb", {"rank": 96, "eta0": 3e-7}, "mistral-7b", 2_064_384),
    Count("lora_sb", {"rank": 24, "eta0": 1e-6}, "roberta-large", 55_296, XS_KERNELS),
    Count("lora_xs", {"rank": 16}, "mistral-7b", 57_344),
    Count("lora_xs", {"rank": 64}, "mistral-7b", 917_504),
    *(
        Count("lora_xs", {"rank": rank}, "roberta-large", count, XS_KERNELS)
        for rank, count in zip(
            (4, 8, 12, 16, 20, 25), (1_536, 6_144, 13_824, 24_576, 38_400, 60_000), strict=True
        )
    ),
    Count("miss", {"rank": 64}, "llama-2-7b", 87_031_808),
    Count("miss", {"rank": 64}, "llama-3.2-3b", 7_340_032, QUERY_VALUE),
    Count("miss", {"rank": 64, "form": "bat"}, "llama-3.2-3b", 7_340_032, QUERY_VALUE),
    Count("miss", {"form": "mini", "mini_rank": 64}, "llama-3.2-3b", 229_376, QUERY_VALUE),
    Count("more", {"rank": 4}, "llama-2-7b", 3_145_728, QUERY_KEY_VALUE),
    Count("more", {"rank": 4}, "roberta-large", 589_824, QUERY_KEY_VALUE),
    # As many as a LoRA of the budget's rank, whatever the rank and the number of shards.
    Count("mos", {"rank": 2, "private": 0, "shards": 1}, "llama-2-7b", 4_997_120),
    Count("mos", {"rank": 16, "budget": 2, "shards": 4}, "llama-2-7b", 4_997_120),
    Count("mos", {"rank": 8, "budget": 2, "shards": 8}, "llama-3-8b", 5_242_880),
    Count("nola", {}, "llama-2-70b", 573_440),
    Count("oft", {"blocks": 32}, "llama-3.2-3b", 8_171_520, QUERY_VALUE),
    Count("pissa", {"rank": 128}, "llama-2-7b", 319_815_680),
    Count("prefix", {"length": 200}, "llama-3.2-3b", 11_468_800, r"/value/"),
    Count("pvera", {"rank": 256}, "llama-3.2-3b", 143_360, QUERY_VALUE),
    Count("randlora", {"rank": 32}, "llama-3.2-3b", 9_289_728, QUERY_VALUE),
    Count("sorsa", {"rank": 128}, "llama-2-7b", 319_844_352),
    # A sixteenth of LoRA of rank 8 on the same kernels.
    Count("svfit", {"rank": 768}, "roberta-base", 18_432, QUERY_VALUE),
    # 126 of them gates, which the paper leaves out: "194K" and "6.35M".
    Count("svft", {}, "gemma-2b", 193_536 + 126),
    Count("svft", {"pattern": "banded"}, "gemma-2b", 6_352_416 + 126),
    Count("vb_lora", {}, "llama-3.2-3b", 1_212_416, QUERY_VALUE),
)


def abstract(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def abstract_stats(shapes: Mapping[str, tuple[int, int, int]], components: int) -> dict[str, Any]:
    """What pefts.calibrate would return, without values."""
    return {
        f"layers/{name}/kernel": {
            "gradient": abstract((layers, d_in, d_out)),
            "second_moment": abstract((layers, d_in, d_in)),
            "sample_moment": abstract((layers, d_in, d_in)),
            "components": abstract((layers, components, d_in)),
            "explained_variance_ratio": abstract((layers, components)),
        }
        for name, (layers, d_in, d_out) in shapes.items()
    }


@pytest.mark.parametrize("row", COUNTS, ids=lambda row: f"{row.method}-{row.model}-{row.count}")
def test_published_count(row: Count) -> None:
    shapes = MODELS[row.model]
    params = {"layers": {name: {"kernel": abstract(shape)} for name, shape in shapes.items()}}
    build = pefts.METHODS[row.method]
    peft = build(targets=row.targets, axes={"kernel": "lio"}, **row.kwargs)
    needs = set(peft.traits.needs) - {core.CONTEXT}
    stats = abstract_stats(shapes, peft.traits.components) if needs else None
    state = jax.eval_shape(functools.partial(peft.init, jax.random.key(0)), params, stats)
    assert pefts.count(state.trainable) == row.count
