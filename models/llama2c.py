"""llama2.c checkpoints (.bin) as Hugging Face folders.

    python -m models.llama2c stories260K.bin tok512.bin stories260K

The format of Karpathy's tinyllamas, version 0: seven int32 sizes, then float32 matrices (out, in).
Its rotary positions turn neighbours (2j, 2j + 1) of a head, those of transformers the two halves of
one: rows of q_proj and k_proj are put in that order. Its tokenizer merges the pair whose result has
the highest score; as byte-pair merges in the order of scores that is the same.
"""

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from models import hf

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
_SPACE = "▁"
_FIRST_BYTE, _FIRST_PIECE = 3, 259  # behind the three special tokens; behind the 256 bytes


class Sizes(NamedTuple):
    """The header of a checkpoint."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int  # negative: the head is not tied
    positions: int


def convert(weights: Path, tokenizer: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors and the tokenizer's files.

    Args:
      weights: a version 0 checkpoint.
      tokenizer: the tokenizer.bin that belongs to it.
      folder: created if absent.

    Raises:
      ValueError: a file is not of these formats, or is truncated.
    """
    sizes, tensors = read_weights(weights)
    raw = read_tokenizer(tokenizer, abs(sizes.vocab))
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / hf.SINGLE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(sizes), indent=2) + "\n")
    raw.save(str(folder / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN, "pad_token": UNKNOWN}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def read_weights(file: Path) -> tuple[Sizes, dict[str, np.ndarray]]:
    """The header and the tensors under their Hugging Face names."""
    data = file.read_bytes()
    if len(data) < 28:
        raise ValueError(f"{file} has {len(data)} bytes; a llama2.c checkpoint starts with 28")
    sizes = Sizes(*struct.unpack("<7i", data[:28]))
    if min(abs(n) for n in sizes) < 1 or any(n < 0 for n in sizes._replace(vocab=1)):
        raise ValueError(f"{file} is no llama2.c checkpoint of version 0: its header says {sizes}")
    values = np.frombuffer(data, "<f4", offset=28)
    tensors, position = {}, 0
    for name, shape in _layout(sizes):
        count = int(np.prod(shape))
        if position + count > len(values):
            raise ValueError(f"{file} is truncated: it ends within {name} {shape}")
        tensors[name] = values[position : position + count].reshape(shape)
        position += count
    return sizes, dict(_unstacked(sizes, tensors))


def _layout(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the file; stacked over layers."""
    d, f, n = sizes.hidden, sizes.intermediate, sizes.layers
    head = d // sizes.heads
    narrow = sizes.kv_heads * head
    yield "model.embed_tokens.weight", (abs(sizes.vocab), d)
    yield "input_layernorm.weight", (n, d)
    yield "self_attn.q_proj.weight", (n, d, d)
    yield "self_attn.k_proj.weight", (n, narrow, d)
    yield "self_attn.v_proj.weight", (n, narrow, d)
    yield "self_attn.o_proj.weight", (n, d, d)
    yield "post_attention_layernorm.weight", (n, d)
    yield "mlp.gate_proj.weight", (n, f, d)
    yield "mlp.down_proj.weight", (n, d, f)
    yield "mlp.up_proj.weight", (n, f, d)
    yield "model.norm.weight", (d,)
    if sizes.vocab < 0:
        yield "rotary tables", (2, sizes.positions, head // 2)
        yield "lm_head.weight", (abs(sizes.vocab), d)


def _unstacked(sizes: Sizes, tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tensors.items():
        if name == "rotary tables":
            continue
        if name.startswith(("model.", "lm_head.")):
            yield name, value
            continue
        for layer, matrix in enumerate(value):
            if "q_proj" in name or "k_proj" in name:
                matrix = _halves(matrix, sizes.hidden // sizes.heads)
            yield f"model.layers.{layer}.{name}", np.ascontiguousarray(matrix)


def _halves(matrix: np.ndarray, head: int) -> np.ndarray:
    """Rows (2j, 2j + 1) of every head to (j, j + head / 2)."""
    pairs = matrix.reshape(-1, head // 2, 2, matrix.shape[1])
    return pairs.transpose(0, 2, 1, 3).reshape(matrix.shape)


def _config(sizes: Sizes) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": abs(sizes.vocab),
        "max_position_embeddings": sizes.positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": sizes.vocab > 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def read_tokenizer(file: Path, vocab_size: int) -> tokenizers.Tokenizer:
    """The tokenizer of a llama2.c tokenizer.bin with so many entries."""
    data, position, pieces = file.read_bytes(), 4, []
    for _ in range(vocab_size):
        if position + 8 > len(data):
            raise ValueError(f"{file} ends after {len(pieces)} of {vocab_size} entries")
        score, length = struct.unpack_from("<fi", data, position)
        position += 8
        pieces.append((data[position : position + length].decode("utf-8"), score))
        position += length
    texts = [UNKNOWN, BOS, EOS]
    texts += [f"<0x{byte:02X}>" for byte in range(_FIRST_PIECE - _FIRST_BYTE)]
    texts += [text.replace(" ", _SPACE) for text, _ in pieces[_FIRST_PIECE:]]
    vocabulary = {text: index for index, text in enumerate(texts)}
    merges = _merges(vocabulary, [score for _, score in pieces])
    raw = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    )
    raw.add_special_tokens([UNKNOWN, BOS, EOS])
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, 1)]
    )
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return raw


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    found = []
    for text, index in vocabulary.items():
        if index < _FIRST_PIECE:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocabulary and right in vocabulary:
                order = (-scores[index], vocabulary[left], vocabulary[right])
                found.append((order, (left, right)))
    return [pair for _, pair in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description="a llama2.c checkpoint as a Hugging Face folder")
    parser.add_argument("weights", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        convert(arguments.weights, arguments.tokenizer, arguments.folder)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
