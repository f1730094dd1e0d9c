"""A real GPT-2: minGPT's gpt-nano, trained to sort six digits of {0, 1, 2}.

Its weights and what each part of it computed for three rows come from files that are not part of
this repository; they are put into a Hugging Face folder here, as a GPT-2 has it.
"""

import base64
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

import models
from models.generate import generate
from models.layers import BLOCK_OUTPUT

SOURCE = Path(__file__).parents[1] / "../shared/weights/gpt_nano_sort"
pytestmark = pytest.mark.skipif(
    not SOURCE.is_dir(), reason="the weights (../shared/weights/gpt_nano_sort) are not here"
)
# In Hugging Face's GPT-2 these are Conv1D, (in, out); minGPT has nn.Linear, (out, in).
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
DIGITS = 6
TOLERANCE = 1e-5  # the logits reach 8.4; the differences found are below 2e-6


def read(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the arrays of one of the files."""
    content = json.loads((SOURCE / name).read_text())
    config, arrays = content.pop("config"), {}
    for key, value in content.items():
        assert value["dtype"] == "torch.float32"
        data = np.frombuffer(base64.b64decode(value["data"]), "<f4")
        arrays[key] = data.reshape(value["shape"])
    return config, arrays


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a GPT-2 folder."""
    config, arrays = read("gpt-nano-sort-model.json")
    tensors = {
        name: np.ascontiguousarray(value.T) if name.endswith(CONV1D) else value
        for name, value in arrays.items()
    }
    folder = tmp_path_factory.mktemp("gpt_nano_sort")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    hf_config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_positions": config["block_size"],
        "tie_word_embeddings": False,
        **{key: config[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
    }
    (folder / "config.json").write_text(json.dumps(hf_config))
    return folder


@pytest.fixture(scope="module")
def partials() -> dict[str, np.ndarray]:
    """What minGPT computed, by the name of the part."""
    return read("gpt-nano-sort-t0-partials.json")[1]


@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_layer_gives_the_stored_values(
    checkpoint: Path, partials: dict[str, np.ndarray], scan_layers: bool
) -> None:
    model, params, _ = models.load(checkpoint, scan_layers=scan_layers)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 85_728  # all but causal masks
    tokens = partials["idx"].astype(np.int32)
    logits, kept = model.apply({"params": params}, tokens, mutable=["intermediates"])
    outputs = traverse_util.flatten_dict(kept["intermediates"])
    assert {path[-1] for path in outputs} == {BLOCK_OUTPUT}
    shape = (-1, *tokens.shape, model.config.hidden_size)
    layers = np.concatenate([np.reshape(leaf, shape) for leaf in jax.tree.leaves(outputs)])
    found = {f"block{number}": layer for number, layer in enumerate(layers)}
    found["ln_f"] = model.apply({"params": params}, tokens, method="hidden")
    found["lm_head"] = logits
    found["probs"] = jax.nn.softmax(logits)
    assert set(found) == {name for name in partials if name in found} and len(found) == 6
    for name, value in found.items():
        np.testing.assert_allclose(value, partials[name], atol=TOLERANCE, rtol=0, err_msg=name)


def test_transformers_reads_the_same_folder(
    checkpoint: Path, partials: dict[str, np.ndarray]
) -> None:
    torch = pytest.importorskip("torch", reason="parity is measured against torch")
    transformers = pytest.importorskip("transformers", reason="parity is measured against it")
    reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        logits = reference(torch.from_numpy(partials["idx"].astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(logits, partials["lm_head"], atol=TOLERANCE, rtol=0)


def test_it_sorts_every_row_of_digits(checkpoint: Path) -> None:
    model, params, _ = models.load(checkpoint)
    rows = np.asarray(list(itertools.product(range(3), repeat=DIGITS)), np.int32)
    # The model has 11 positions: the last digit is read from the logits behind them.
    run = functools.partial(generate, model.apply, model.config, new_tokens=DIGITS - 1)
    first = jax.jit(run)({"params": params}, rows, np.ones_like(rows)).tokens
    whole = np.concatenate([rows, np.asarray(first)], axis=1)
    assert whole.shape == (729, model.config.max_positions)
    logits = jax.jit(model.apply)({"params": params}, whole)
    last = np.argmax(logits[:, -1], axis=-1)
    answers = np.concatenate([whole[:, DIGITS:], last[:, None]], axis=1)
    np.testing.assert_array_equal(answers, np.sort(rows, axis=1))
