"""Hugging Face folders of a tiny random BERT and Llama, made without transformers or torch."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

import models
from models import create, encoder, hf
from models.decoder_config import DecoderConfig
from models.rope import Rope

WORDS = """return the of a and to in is if for an object file or value name this with string be from
that are not on it by given list class function set path default number type module data error as
method test thread socket window text parse read write open close import code time""".split()
HF_CONFIG = {
    "model_type": "bert",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}


def write(folder: Path) -> Path:
    """Write the checkpoint into `folder`."""
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary += [letter for letter in letters if letter not in WORDS]
    vocabulary += [f"##{letter}" for letter in letters]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    hf_config = {**HF_CONFIG, "vocab_size": len(vocabulary)}
    family = models.MODELS["bert"]
    config = family.config(hf_config)
    model = encoder.build(config, None, "pooler")
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = model.init(jax.random.key(3), tokens, jnp.ones_like(tokens), method="embed")["params"]
    names = replace(family.names, layers=config.num_layers, scanned=True)
    hf.save_params(folder, params, names, hf_config)
    return folder


def write_decoder(folder: Path) -> Path:
    """Write a Llama whose tokens are bytes into `folder`."""
    raw = create.learn_tokenizer([], 257)
    config = DecoderConfig(
        vocab_size=257,
        hidden_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        intermediate_size=40,
        max_positions=64,
        rope=Rope(64),
    )
    return create.create(folder, config, raw, seed=3)
