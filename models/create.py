"""A decoder with random weights and a tokenizer of its own, as a Hugging Face folder.

    python -m models.create python_decoder --task=python_sources --vocab_size=4096

The tokenizer is a byte-level BPE, learned from the texts of a task's training split; train.py
pretrains the model from there. Whatever can be read of a checkpoint folder can be read of this one.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers

from models import decoder, decoder_names, hf
from models.decoder_config import DecoderConfig
from models.rope import Rope

END = "<|endoftext|>"
BYTES = 256


def learn_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of so many tokens: END, the bytes, and what they are most often joined to.

    Args:
      texts: what to learn from; without any the tokens are END and the bytes.
      vocab_size: at most so many tokens; fewer where the texts have no more pairs.

    Raises:
      ValueError: fewer tokens than there are bytes.
    """
    if vocab_size <= BYTES:
        raise ValueError(f"vocab_size={vocab_size} must be above {BYTES}: every byte is a token")
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return raw


def create(
    folder: str | Path, config: DecoderConfig, tokenizer: tokenizers.Tokenizer, seed: int = 0
) -> Path:
    """Writes config.json, model.safetensors and the tokenizer's files.

    Args:
      folder: created if absent.
      config: of a family whose names are known; its vocab_size is the tokenizer's.
      tokenizer: see `learn_tokenizer`.
      seed: of the weights.

    Raises:
      ValueError: config and tokenizer differ in size, or see `hf.save_params`.
    """
    folder, size = Path(folder), tokenizer.get_vocab_size()
    if config.vocab_size != size:
        raise ValueError(
            f"config.vocab_size={config.vocab_size} is not the tokenizer's number of tokens, {size}"
        )
    end = tokenizer.token_to_id(END)
    tokens = jnp.zeros((1, 4), jnp.int32)
    init = jax.jit(lambda: decoder.Decoder(config).init(jax.random.key(seed), tokens)["params"])
    names = decoder_names.NAMES[config.model_type]
    names = replace(
        names, layers=config.num_layers, scanned=config.scan_layers, prefix=names.prefixes[-1]
    )
    hf.save_params(folder, init(), names, {**config.to_hf(), "eos_token_id": end})
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(named, indent=2) + "\n")
    return folder


@functools.cache
def tiny_llama() -> Path:
    """A folder with a Llama of 30 thousand random weights, whose tokens are bytes.

    It is the same for everyone, and gone when the process ends.
    """
    place = tempfile.TemporaryDirectory(prefix="tiny_llama_")
    _KEPT.append(place)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_layers": 2, "num_heads": 4}
    config = llama(vocab_size=BYTES + 1, num_kv_heads=2, max_positions=1024, **sizes)
    return create(place.name, config, learn_tokenizer([], BYTES + 1))


_KEPT: list[tempfile.TemporaryDirectory] = []  # a folder lives as long as its object


def llama(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    max_positions: int,
) -> DecoderConfig:
    """The configuration of a Llama whose head is tied to its embedding."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        max_positions=max_positions,
        rope=Rope(max_positions),
        tie_embeddings=True,
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line above."""
    import data  # a task is wanted here alone: models read no data
    from data.written import LanguageTask

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", required=True, help="a language task of data.TASKS")
    parser.add_argument("--root", help="of the task's files, where it has any")
    parser.add_argument("--characters", type=int, help="of the texts, to learn the tokenizer from")
    parser.add_argument("--seed", type=int, default=0)
    sizes = {
        "vocab_size": 4096,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 4,
        "max_positions": 512,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = vars(parser.parse_args(arguments))
    try:
        task = data.load(given["task"], **({"root": given["root"]} if given["root"] else {}))
        if not isinstance(task, LanguageTask):
            raise ValueError(f"--task={given['task']} has labels, not texts to learn to write")
        texts = [written.text for written in task.splits["train"]]
        raw = learn_tokenizer(_first(texts, given["characters"]), given["vocab_size"])
        wanted = {name: given[name] for name in sizes} | {"vocab_size": raw.get_vocab_size()}
        create(given["folder"], llama(**wanted), raw, given["seed"])
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"wrote {given['folder']}")


def _first(texts: list[str], characters: int | None) -> Iterable[str]:
    """Texts, evenly taken, of about so many characters in all."""
    total = sum(map(len, texts))
    if characters is None or characters >= total:
        return texts
    return texts[:: max(1, total // max(characters, 1))]


if __name__ == "__main__":
    main()
