"""A Llama forward pass in numpy, from the equations, on a parameter tree of our layout.

    RMSNorm    x / sqrt(mean(x^2) + eps) * scale
    rotary     [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin], halves of a head, angle t
    theta^(-2i/H) attention  query head n reads key and value head n // (N / K)
    SwiGLU     down(silu(gate(x)) * up(x))

Shape legend: B batch, T tokens, D width, N query heads, K key heads, H head size.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from models import hf

Tree = dict[str, Any]
_KERNELS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
_NORMS = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
_TABLE = (
    hf.Entry("embed/embedding", "model.embed_tokens.weight"),
    hf.Entry("norm/scale", "model.norm.weight"),
    hf.Entry("head/kernel", "lm_head.weight", "T"),
    *(
        hf.Entry(f"layers/{p}/kernel", f"model.layers.{{l}}.{k}.weight", "T")
        for p, k in _KERNELS.items()
    ),
    *(hf.Entry(f"layers/{p}/scale", f"model.layers.{{l}}.{k}.weight") for p, k in _NORMS.items()),
)


def names(layers: int, scanned: bool) -> hf.NameMap:
    """The name map of the tree that `forward` takes."""
    return hf.NameMap(_TABLE, layers=layers, scanned=scanned)


def load(folder: Path, scanned: bool) -> tuple[Tree, hf.NameMap, dict[str, Any]]:
    """(params, names, config.json) of a checkpoint, float32."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    mapping = names(config["num_hidden_layers"], scanned)
    slices: dict[str, list[np.ndarray]] = {}
    places = {}
    for key in sorted(tensors):  # single-digit layers sort by number
        path, layer, op = mapping.path(key)
        slices.setdefault(path, []).append(tensors[key].T if op == "T" else tensors[key])
        places[path] = layer
    params: Tree = {}
    for path, rows in slices.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = rows[0] if places[path] is None else np.stack(rows)
    return params, mapping, config


def forward(params: Any, config: dict[str, Any], ids_BxT: np.ndarray) -> np.ndarray:
    """Logits (B, T, vocabulary) of the dense tree, stacked or unrolled, in float64."""
    x = _f64(params["embed"]["embedding"])[ids_BxT]
    for layer in range(config["num_hidden_layers"]):
        x = _block(_layer(params, layer), config, x)
    x = _norm(x, params["norm"]["scale"], config["rms_norm_eps"])
    return x @ _f64(params["head"]["kernel"])


def _f64(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float64)


def _layer(params: Any, layer: int) -> Any:
    if f"layers_{layer}" in params:
        return params[f"layers_{layer}"]

    def pick(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: pick(child) for name, child in node.items()}
        return np.asarray(node)[layer]

    return pick(params["layers"])


def _norm(x: np.ndarray, scale: Any, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * _f64(scale)


def _rotate(x_BxTxNxH: np.ndarray, theta: float) -> np.ndarray:
    half = x_BxTxNxH.shape[-1] // 2
    angle = np.arange(x_BxTxNxH.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
    x1, x2 = x_BxTxNxH[..., :half], x_BxTxNxH[..., half:]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def _attention(p: Any, config: dict[str, Any], x_BxTxD: np.ndarray) -> np.ndarray:
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    theta = config["rope_parameters"]["rope_theta"]
    B, T, _ = x_BxTxD.shape

    def project(name: str, count: int) -> np.ndarray:
        return (x_BxTxD @ _f64(p[name]["kernel"])).reshape(B, T, count, -1)

    q_BxTxNxH = _rotate(project("query", heads), theta)
    k_BxTxNxH = _rotate(project("key", keys), theta).repeat(heads // keys, axis=2)
    v_BxTxNxH = project("value", keys).repeat(heads // keys, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q_BxTxNxH, k_BxTxNxH) / np.sqrt(q_BxTxNxH.shape[-1])
    scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bnts,bsnh->btnh", weights, v_BxTxNxH).reshape(B, T, -1)
    return mixed @ _f64(p["output"]["kernel"])


def _block(p: Any, config: dict[str, Any], x: np.ndarray) -> np.ndarray:
    eps = config["rms_norm_eps"]
    x = x + _attention(p["attention"], config, _norm(x, p["norm_1"]["scale"], eps))
    h = _norm(x, p["norm_2"]["scale"], eps)
    gate, up = h @ _f64(p["mlp"]["gate"]["kernel"]), h @ _f64(p["mlp"]["up"]["kernel"])
    return x + (gate / (1 + np.exp(-gate)) * up) @ _f64(p["mlp"]["down"]["kernel"])
