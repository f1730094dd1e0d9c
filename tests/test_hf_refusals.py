"""What the exchange with Hugging Face PEFT refuses, and what it says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_pair
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_pair import (
    EXPORTS,
    IMPORTS,
    PEFT_NOISE,
    QUERY,
    Pair,
    edit,
    lora_config,
    made,
    trained_by_peft,
)

import pefts

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)


@pytest.fixture(scope="module")
def encoder() -> Pair:
    return hf_pair.bare()


@pytest.fixture(scope="module")
def classifier() -> Pair:
    return hf_pair.classifier()


def test_a_base_that_init_would_change_is_refused(encoder: Pair, tmp_path: Path) -> None:
    for init in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"):
        trained_by_peft(encoder, lora_config(), tmp_path)
        edit(tmp_path, init_lora_weights=init)
        with pytest.raises(ValueError, match=f"init_lora_weights='{init}'.*changes the base"):
            pefts.import_hf(tmp_path, encoder.params, encoder.names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_bias": True}, "lora_bias=True cannot be imported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"bias": "some"}, "bias='some' cannot be imported"),
        ({"new_feature": 3}, "new_feature=3 is a field of LORA that pefts does not know"),
        ({"peft_type": "XLORA"}, r"peft_type='XLORA' cannot be imported; supported .*'LORA'"),
        ({"peft_type": None}, "peft_type=None"),
        ({"r": 4}, r"lora_A.weight has shape \(3, 12\) in the file; .* \(4, 12\)"),
        ({"use_dora": True}, r"missing \['lora_magnitude_vector'\]"),
        (
            {"target_modules": ["query"]},
            r"tensors without being selected \['encoder.layer.0.*value",
        ),
        ({"target_modules": ["query", "value", "key"]}, "selected without tensors .*self.key"),
        ({"modules_to_save": ["LayerNorm"]}, r"lacks \['embeddings.LayerNorm.bias'"),
        ({"bias": "lora_only"}, "lacks .*query.bias"),
    ],
)
def test_what_the_config_asks_for_in_vain(
    fields: dict[str, Any], message: str, encoder: Pair, tmp_path: Path
) -> None:
    trained_by_peft(encoder, lora_config(), tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        pefts.import_hf(tmp_path, encoder.params, encoder.names)


KEY = f"base_model.model.{QUERY.format(1)}.lora_A.weight"


def renamed(new: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[new] = tensors.pop(KEY)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), r"query' do not fit .* missing \['lora_A.weight'\]"),
        (lambda t: t.update({KEY: t[KEY][:, :5].copy()}), r"\(3, 5\) in the file; .* \(3, 12\)"),
        (lambda t: t.update({KEY: t[KEY] * np.nan}), f"NaN or Inf in '{KEY}'"),
        (lambda t: t.update({KEY: t[KEY].astype(np.int32)}), "is int32, and no float"),
        (renamed(KEY.removeprefix("base_model.model.")), "lacks the prefix 'base_model.model.'"),
        (renamed(KEY.replace("model.enc", "model.bert.enc")), "no module or tensor of this model"),
        (renamed(KEY.replace("lora_A.weight", "lora_C.weight")), "no module or tensor of this"),
        (lambda t: t.clear(), "no adapter tensor at all"),
        (
            lambda t: t.update(
                {"base_model.model.embeddings.word_embeddings.weight": np.ones((61, 12), "f4")}
            ),
            "changed 'embeddings.word_embeddings.weight' of the base",
        ),
        (
            lambda t: t.update(
                {"base_model.model.embeddings.word_embeddings.weight": np.ones((64, 12), "f4")}
            ),
            r"shape \(64, 12\) in the adapter and \(61, 12\) in the model",
        ),
    ],
)
def test_tensors_that_do_not_fit(change: Any, message: str, encoder: Pair, tmp_path: Path) -> None:
    trained_by_peft(encoder, lora_config(), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        pefts.import_hf(tmp_path, encoder.params, encoder.names)


def test_damaged_and_pickled_folders(encoder: Pair, tmp_path: Path) -> None:
    arguments = (encoder.params, encoder.names)
    with pytest.raises(ValueError, match="adapter_config.json cannot be read"):
        pefts.import_hf(tmp_path, *arguments)
    trained_by_peft(encoder, lora_config(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        pefts.import_hf(tmp_path, *arguments)
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="a pickle, which can run code"):
        pefts.import_hf(tmp_path, *arguments)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        pefts.import_hf(tmp_path, *arguments)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        pefts.import_hf(tmp_path, *arguments)


def test_a_vera_file_without_its_projections_is_refused(encoder: Pair, tmp_path: Path) -> None:
    trained_by_peft(encoder, IMPORTS["vera"](), tmp_path)
    edit(tmp_path, save_projection=False)
    with pytest.raises(ValueError, match="save_projection=False.*torch's generator"):
        pefts.import_hf(tmp_path, encoder.params, encoder.names)


def refused(pair: Pair, method: Any, message: str, folder: Path, **info: Any) -> None:
    peft, state = made(pair, method)
    with pytest.raises(ValueError, match=message):
        pefts.export_hf(folder / "new", peft, state, pair.params, pair.names, **info)
    assert not (folder / "new").exists()


def test_export_refuses_what_peft_cannot_represent(classifier: Pair, tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (
            lambda axes: pefts.full(targets="classifier"),
            "exactly one adapter and this method has 0",
        ),
        (
            lambda axes: pefts.chain(*[pefts.lora(rank=2, axes=axes)] * 2),
            "exactly one adapter and this method has 2",
        ),
        (
            lambda axes: pefts.chain(
                pefts.full(targets="query/kernel"), pefts.lora(rank=2, axes=axes)
            ),
            "query/kernel' is trained outright and adapted too",
        ),
        (
            lambda axes: pefts.vera(rank=3, targets=r"query|word_embeddings", axes=axes),
            "VeRA adapts linear modules alone",
        ),
    ]
    for method, message in cases:
        refused(classifier, method, message, tmp_path)
    refused(classifier, EXPORTS["lora"], r"info: \['r'\] cannot be chosen", tmp_path, r=7)


def test_a_method_without_a_format_is_named(
    classifier: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(pefts.formats.FORMATS, "dora")
    refused(classifier, EXPORTS["dora"], "dora does not change .* by a low-rank product", tmp_path)


def test_states_that_cannot_be_exported(encoder: Pair, tmp_path: Path) -> None:
    peft, state = made(encoder, EXPORTS["lora"])
    arguments = (encoder.params, encoder.names)
    with pytest.raises(ValueError, match="every A and B of this state is zero"):
        pefts.export_hf(tmp_path, peft, jax.tree.map(jnp.zeros_like, state), *arguments)
    broken = jax.tree.map(lambda leaf: leaf / 0, state)
    with pytest.raises(ValueError, match="NaN or Inf"):
        pefts.export_hf(tmp_path, peft, broken, *arguments)
    assert not list(tmp_path.iterdir())
