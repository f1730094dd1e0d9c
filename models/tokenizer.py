"""Text to token ids, by the tokenizer file that lies beside a checkpoint.

A thin layer over the `tokenizers` library: whatever truncation and padding tokenizer.json has
switched on is reset (sentence-transformers saves both), the length is an argument of each call, and
padding is left to whoever makes batches.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

# Names of the padding token, tried in order, where no file says which it is.
PAD_TOKENS = ("[PAD]", "<pad>")
# Special tokens of a BERT word list; the last is in most of them.
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Encoded(NamedTuple):
    """Token ids and token types (0 first text, 1 second), one unpadded row per example."""

    ids: list[list[int]]
    types: list[list[int]]


@dataclass(frozen=True)
class Tokenizer:
    """Encodes texts; holds a path and two numbers, so it may be pickled to data workers.

    Args:
      folder: holds tokenizer.json, or vocab.txt of a WordPiece model.
      pad_id: id that fills short rows.
      vocab_size: one more than the largest id.
      end_id: of the token that ends a text, or None.
    """

    folder: Path
    pad_id: int
    vocab_size: int
    end_id: int | None = None

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        max_length: int | None = None,
    ) -> list[list[int]]:
        """Token ids with special tokens, one unpadded row per text (or pair of texts).

        Args:
          texts: first texts.
          pairs: second texts, one per first text.
          max_length: rows are cut to it, special tokens included, the longer text first.

        Raises:
          ValueError: texts is one string, pairs is of another length, or max_length leaves no room
            for text.
        """
        return self.encode_pairs(texts, pairs, max_length).ids

    def encode_pairs(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        max_length: int | None = None,
    ) -> Encoded:
        """As `encode`, with the token types that tell the second text from the first."""
        if isinstance(texts, str) or isinstance(pairs, str):
            raise ValueError("texts is one string; give a list of strings, [text] for one")
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"pairs has {len(pairs)} texts, texts {len(texts)}; they go together")
        raw = _open(self.folder, max_length, pairs is not None)
        rows = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encoded = raw.encode_batch(rows)
        return Encoded([row.ids for row in encoded], [row.type_ids for row in encoded])

    def encode_spans(
        self, texts: Sequence[str], special: bool = True
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Of each text its ids, and the (start, end) in it of each id; (0, 0) for what was added.

        Args:
          texts: any; special tokens written out in them are recognised.
          special: add the special tokens that begin (and end) a text.

        Raises:
          ValueError: texts is one string.
        """
        if isinstance(texts, str):
            raise ValueError("texts is one string; give a list of strings, [text] for one")
        raw = _open(self.folder, None, False)
        encoded = raw.encode_batch(list(texts), add_special_tokens=special)
        return [(row.ids, row.offsets) for row in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of one row of ids, without special tokens."""
        return _open(self.folder, None, False).decode(list(ids))


def load(folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Opens the tokenizer of a checkpoint folder.

    Args:
      folder: holds tokenizer.json, or vocab.txt of a WordPiece model.
      vocab_size: rows of the model's embedding; None skips the check.

    Raises:
      ValueError: no tokenizer file or an unreadable one, no padding token, or an id that the
        model's embedding does not have.
    """
    folder = Path(folder)
    vocabulary = _open(folder, None, False).get_vocab(with_added_tokens=True)
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has id {largest} ({token!r}), the model"
            f" vocab_size={vocab_size}; tokenizer and model do not belong together"
        )
    end = _named_token(folder, "eos_token")
    pad = vocabulary[_pad_token(folder, vocabulary)]
    return Tokenizer(folder, pad, largest + 1, vocabulary.get(end) if end else None)


def _named_token(folder: Path, name: str) -> str | None:
    named = _read_json(folder / "tokenizer_config.json").get(name)
    # Older files describe the token by an object.
    return named.get("content") if isinstance(named, dict) else named


def _pad_token(folder: Path, vocabulary: dict[str, int]) -> str:
    # Decoders often have none, and any token will do where it is masked.
    for token in (
        _named_token(folder, "pad_token"),
        *PAD_TOKENS,
        _named_token(folder, "eos_token"),
    ):
        if token in vocabulary:
            return token
    raise ValueError(
        f"the tokenizer in {folder} has no padding token;"
        " name one as pad_token in tokenizer_config.json"
    )


@functools.lru_cache(maxsize=16)
def _open(folder: Path, max_length: int | None, paired: bool) -> tokenizers.Tokenizer:
    """One object per length: truncation is a mutable setting, and data workers may be threads."""
    raw = _read(folder)
    raw.no_padding()
    raw.no_truncation()
    if max_length is None:
        return raw
    special = raw.num_special_tokens_to_add(paired)
    if max_length <= special:
        raise ValueError(
            f"max_length={max_length} leaves no room for text: {special} special tokens are added"
        )
    raw.enable_truncation(max_length, strategy="longest_first")
    return raw


def _read(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return _wordpiece(folder)
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is not a readable tokenizer file ({error})") from error


def _wordpiece(folder: Path) -> tokenizers.Tokenizer:
    """BERT's tokenizer from its word list alone."""
    file = folder / "vocab.txt"
    if not file.is_file():
        raise ValueError(f"{folder} has neither tokenizer.json nor vocab.txt; one is needed")
    lines = file.read_text(encoding="utf-8").splitlines()
    vocabulary = {token: i for i, token in enumerate(lines)}
    absent = [token for token in SPECIAL[:4] if token not in vocabulary]
    if absent:
        raise ValueError(f"{file} lacks {', '.join(absent)}; it is not a BERT word list")
    settings = _read_json(folder / "tokenizer_config.json")
    raw = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.add_special_tokens([token for token in SPECIAL if token in vocabulary])
    raw.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return raw


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
