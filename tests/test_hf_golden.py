"""Adapters that Hugging Face PEFT wrote for a tiny Llama: imported, computed, and written back."""

import json
from pathlib import Path
from typing import Any

import llama_oracle
import numpy as np
import pytest
from safetensors.numpy import load_file

import models
import pefts

GOLDEN = Path(__file__).parents[1] / "../shared/golden/peft"
ADAPTERS = (
    "adalora",
    "boft",
    "dora",
    "hira",
    "ia3",
    "ln_tuning",
    "loha",
    "lokr",
    "lora",
    "lora_embed",
    "lora_patterns",
    "miss",
    "miss_bat",
    "miss_mini",
    "oft_cayley",
    "oft_neumann",
    "randlora",
    "rslora",
    "trainable_tokens",
    "vblora",
    "vera",
)
# Of these no kernel changes; a p_tuning comes back as the prompt that it has made.
BESIDE = ("llama_adapter", "p_tuning", "prefix", "prompt")
ATOL = {"randlora": 1e-4}  # a scale of 160 in float32
COPIES = ("proj.randlora_A", "proj.randlora_B")  # of the shared pair, in the modules of some files
pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the golden adapters (../shared/golden/peft) are not here"
)


def load(scanned: bool) -> tuple[Any, Any, Any, np.ndarray]:
    params, names, config = llama_oracle.load(GOLDEN / "base", scanned)
    return params, names, config, np.load(GOLDEN / "ids.npy")


def adapter(name: str) -> Path:
    kind = json.loads((GOLDEN / name / "adapter_config.json").read_text())["peft_type"]
    if kind not in {format.peft_type for format in pefts.formats.FORMATS.values()}:
        pytest.skip(f"no format for {kind}")
    return GOLDEN / name


def write_back(name: str, scanned: bool, folder: Path) -> None:
    params, names, _, _ = load(scanned)
    task = json.loads((adapter(name) / "adapter_config.json").read_text())["task_type"]
    found = pefts.import_hf(adapter(name), params, names)
    pefts.export_hf(folder, *found, params, names, task_type=task)


@pytest.mark.parametrize("scanned", [True, False])
def test_the_oracle_is_a_llama(scanned: bool) -> None:
    params, _, config, ids = load(scanned)
    logits = llama_oracle.forward(params, config, ids)
    np.testing.assert_allclose(logits, np.load(GOLDEN / "base_logits.npy"), rtol=0, atol=2e-5)


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_imported_adapter_computes_what_peft_computes(name: str, scanned: bool) -> None:
    params, names, config, ids = load(scanned)
    peft, state = pefts.import_hf(adapter(name), params, names)
    logits = llama_oracle.forward(peft.merge(params, state), config, ids)
    expected = np.load(GOLDEN / name / "logits.npy")
    assert np.abs(expected - np.load(GOLDEN / "base_logits.npy")).max() > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=0, atol=ATOL.get(name, 2e-5))


@pytest.mark.parametrize("name", [*ADAPTERS, *BESIDE])
def test_the_decoder_computes_what_peft_computes(name: str) -> None:
    """The adapter beside the kernels of models.decoder, read from the same folder."""
    model, params, names = models.load(GOLDEN / "base")
    peft, state = pefts.import_hf(adapter(name), params, names)
    bound = {"params": peft.bind(params, state)}
    logits = pefts.apply(model.apply)(bound, np.load(GOLDEN / "ids.npy").astype(np.int32))
    np.testing.assert_allclose(logits, np.load(GOLDEN / name / "logits.npy"), rtol=0, atol=2e-5)


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("name", [*ADAPTERS, *BESIDE])
def test_it_is_written_back_as_it_was(name: str, scanned: bool, tmp_path: Path) -> None:
    write_back(name, scanned, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    original = load_file(GOLDEN / name / "adapter_model.safetensors")
    original = {key: value for key, value in original.items() if not key.endswith(COPIES)}
    assert set(written) == set(original)
    for key, value in original.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)


@pytest.mark.parametrize("name", [*ADAPTERS, "llama_adapter", "prefix", "prompt"])
def test_the_config_says_the_same(name: str, tmp_path: Path) -> None:
    """Every field written agrees with peft's own file, or names the modules one by one."""
    write_back(name, True, tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    written = json.loads(text)
    original = json.loads((GOLDEN / name / "adapter_config.json").read_text())
    assert text == json.dumps(written, indent=2, sort_keys=True) + "\n"
    spelled_out = {"target_modules", "rank_pattern", "alpha_pattern", "peft_version"}
    spelled_out |= {"feedforward_modules"}
    about = {"base_model_name_or_path"}
    for field, value in written.items():
        if field not in spelled_out | about:
            assert value == original[field], field
    modules = written.get("target_modules", [])
    assert isinstance(modules, str) or all("." in module for module in modules)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_imported_adapter_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    params, names, config, ids = load(True)
    peft, state = pefts.import_hf(adapter(name), params, names)
    pefts.save(tmp_path / "a.safetensors", peft, state, params)
    loaded, restored = pefts.load(tmp_path / "a.safetensors", params)
    logits = llama_oracle.forward(loaded.merge(params, restored), config, ids)
    np.testing.assert_allclose(logits, np.load(GOLDEN / name / "logits.npy"), rtol=0, atol=2e-5)
