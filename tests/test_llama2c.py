"""A real decoder: stories260K, converted from its llama2.c files."""

import functools
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

import models
from models import llama2c
from models.generate import generate

STORIES = Path(__file__).parents[1] / "../shared/weights/stories260K"
# Published beside the weights (karpathy/llama2.c, doc/stories260K.md).
GOLDEN = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)
needs_stories = pytest.mark.skipif(
    not STORIES.is_dir(), reason="the weights (../shared/weights/stories260K) are not here"
)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stories")
    llama2c.convert(STORIES / "stories260K.bin", STORIES / "tok512.bin", folder)
    return folder


@needs_stories
def test_its_greedy_text_is_the_published_one(stories: Path) -> None:
    model, params, _ = models.load(stories)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 260_032
    tokenizer = models.load_tokenizer(stories)
    prompt = np.asarray([[1]], np.int32)
    run = functools.partial(generate, model.apply, model.config, new_tokens=80, stop=(2,))
    out = jax.jit(run)({"params": params}, prompt, np.ones_like(prompt))
    text = tokenizer.decode(np.asarray(out.tokens)[0].tolist())
    assert text.startswith(GOLDEN)


@needs_stories
def test_transformers_reads_the_folder(stories: Path) -> None:
    torch = pytest.importorskip("torch", reason="parity is measured against torch")
    transformers = pytest.importorskip("transformers", reason="parity is measured against it")
    tokenizer = models.load_tokenizer(stories)
    theirs = transformers.AutoTokenizer.from_pretrained(stories)
    text = "Once upon a time, Lily saw a 3-legged dög.\n\tIt said:  hi"
    (ids,) = tokenizer.encode([text])
    assert ids == theirs(text)["input_ids"] and len(ids) < len(text)
    assert tokenizer.decode(ids) == text
    model, params, _ = models.load(stories)
    reference = transformers.AutoModelForCausalLM.from_pretrained(stories)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits.numpy()
    ours = model.apply({"params": params}, np.asarray([ids], np.int32))
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


@needs_stories
def test_the_tokenizer_takes_the_pair_of_the_highest_score(stories: Path) -> None:
    """llama2.c's own greedy loop, written out."""
    data, at, pieces = (STORIES / "tok512.bin").read_bytes(), 4, []
    for _ in range(512):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append((data[at + 8 : at + 8 + length].decode(), score))
        at += 8 + length
    ids = {text: index for index, (text, _) in enumerate(pieces)}

    def encode(text: str) -> list[int]:
        row = [ids[character] for character in " " + text]
        while True:
            pairs = [pieces[a][0] + pieces[b][0] for a, b in zip(row, row[1:], strict=False)]
            scores = [pieces[ids[pair]][1] if pair in ids else -1e10 for pair in pairs]
            if not scores or max(scores) == -1e10:
                return [1, *row]
            best = int(np.argmax(scores))
            row[best : best + 2] = [ids[pairs[best]]]

    tokenizer = models.load_tokenizer(stories)
    for text in ("Once upon a time", GOLDEN, "the bird was sad. She said yes"):
        assert tokenizer.encode([text]) == [encode(text)], text


@needs_stories
def test_damaged_files_are_refused(tmp_path: Path) -> None:
    weights, words = tmp_path / "w.bin", tmp_path / "t.bin"
    shutil.copy(STORIES / "tok512.bin", words)
    data = (STORIES / "stories260K.bin").read_bytes()
    for content, message in (
        (data[:20], "has 20 bytes"),
        (data[:200_000], "truncated: it ends within self_attn.q_proj.weight"),
        (b"GGUF" + b"\xff" * 100, "no llama2.c checkpoint of version 0"),
    ):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            llama2c.convert(weights, words, tmp_path / "out")
    words.write_bytes(words.read_bytes()[:2000])
    with pytest.raises(ValueError, match="entries"):
        llama2c.read_tokenizer(words, 512)
    assert not (tmp_path / "out").exists()


def test_an_untied_checkpoint_is_read(tmp_path: Path) -> None:
    sizes = llama2c.Sizes(4, 6, 1, 2, 1, -300, 8)
    count = 300 * 4 + 4 + 16 + 8 + 8 + 16 + 4 + 24 * 3 + 4 + 2 * 8 * 1 + 300 * 4
    values = np.arange(count, dtype=np.float32)
    (tmp_path / "w.bin").write_bytes(struct.pack("<7i", *sizes) + values.tobytes())
    _, tensors = llama2c.read_weights(tmp_path / "w.bin")
    np.testing.assert_array_equal(tensors["lm_head.weight"], values[-1200:].reshape(300, 4))
    q_proj = values[1204:1220].reshape(4, 4)
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.q_proj.weight"], q_proj)
