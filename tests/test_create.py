"""A decoder made from nothing: its tokenizer, its folder, and the command that writes it."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import models
from models import create

TEXT = "def add(left, right):\n    return left + right\n\n\ndef größe(x):\n    return abs(x)\n"
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_positions": 64,
}


def test_a_tokenizer_of_bytes_joins_what_is_frequent() -> None:
    raw = create.learn_tokenizer([TEXT] * 3, 285)
    ids = raw.encode(TEXT).ids
    assert raw.decode(ids) == TEXT and len(ids) < 0.7 * len(TEXT.encode())
    assert raw.get_vocab_size() == 285 and raw.token_to_id(create.END) == 0
    unseen = "日本 £ \x00 ~"
    assert raw.decode(raw.encode(unseen).ids) == unseen
    bare = create.learn_tokenizer([], 257)
    assert len(bare.encode(TEXT).ids) == len(TEXT.encode())
    with pytest.raises(ValueError, match="vocab_size=256 must be above 256"):
        create.learn_tokenizer([TEXT], 256)


def test_a_folder_is_a_checkpoint_for_us_and_for_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="it is who has to open it")
    import torch

    raw = create.learn_tokenizer([TEXT], 280)
    config = create.llama(vocab_size=280, **SIZES)
    create.create(tmp_path / "one", config, raw, seed=1)
    model, params, _ = models.load(tmp_path / "one")
    assert "lm_head" not in params and model.config.tie_embeddings
    assert models.load_tokenizer(tmp_path / "one").end_id == 0
    assert models.stop_tokens(tmp_path / "one") == (0,)
    tokens = np.asarray([raw.encode(TEXT).ids[:20]], np.int32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "one")
    assert text(TEXT)["input_ids"] == raw.encode(TEXT).ids
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    ours = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=0)
    again = models.load(create.create(tmp_path / "two", config, raw, seed=1))[1]
    other = models.load(create.create(tmp_path / "three", config, raw, seed=2))[1]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params, again)
    assert all(jax.tree.leaves(same))
    assert (params["embed_tokens"]["embedding"] != other["embed_tokens"]["embedding"]).any()
    with pytest.raises(ValueError, match="vocab_size=281 is not the tokenizer's number .* 280"):
        create.create(tmp_path / "four", replace(config, vocab_size=281), raw)
    assert not (tmp_path / "four").exists()


def test_the_tiny_llama_is_the_same_for_everyone() -> None:
    model, params, _ = models.load("tiny-llama")
    assert models.folder("tiny-llama") == models.folder("tiny-llama")
    assert model.config.vocab_size == 257 and model.config.max_positions == 1024
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert total == 257 * 24 + 2 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40 + 2 * 24) + 24


def test_the_command_learns_from_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from data import corpora

    (tmp_path / "poem.txt").write_text("\n\n".join(f"verse {n} of the poem" for n in range(3000)))
    monkeypatch.setitem(corpora.KNOWN, "wikitext2", {"train": "poem.txt"})
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    options = [f"--root={tmp_path}", "--vocab_size=300", *sizes]
    create.main([str(tmp_path / "out"), "--task=wikitext2", "--characters=3000", *options])
    assert "wrote" in capsys.readouterr().out
    tokenizer = models.load_tokenizer(tmp_path / "out")
    (ids,) = tokenizer.encode([" verse of the poem"])
    assert len(ids) <= 6
    assert models.load(tmp_path / "out")[0].config.num_layers == 2
    for task, message in (("cola", "labels, not texts"), ("wikitext", "is not a task")):
        with pytest.raises(SystemExit):
            create.main([str(tmp_path / "bad"), f"--task={task}", "--root=../shared/data"])
        error = capsys.readouterr().err
        assert message in error or "../shared" in error
    assert not (tmp_path / "bad").exists()
