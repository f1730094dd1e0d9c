"""P-tuning: the prompt that its MLP makes, published counts, and peft's files of soft prompts."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from subject import base_inputs, base_params
from tiny import Classifier
from tiny_decoders import SIZES, torch_logits, torch_model

import models
import pefts
from pefts.methods.p_tuning import bake

TABLE = "embed/embedding"


def test_a_baked_prompt_computes_the_same() -> None:
    params, model = base_params(), Classifier()
    peft = pefts.p_tuning(length=3, hidden=5)
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), params), 0.5)
    baked, plain = bake(peft, state)
    assert baked.config["method"] == "prompt" and baked.config["length"] == 3
    assert {leaf.shape for leaf in jax.tree.leaves(plain)} == {(3, 12)}
    run = pefts.apply(model.apply)
    ours = run({"params": peft.bind(params, state)}, *base_inputs())
    np.testing.assert_allclose(
        run({"params": baked.bind(params, plain)}, *base_inputs()), ours, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="bake takes a p_tuning, and this is 'prompt'"):
        bake(baked, plain)


def test_the_mlp_is_as_wide_as_the_table_by_default(key: jax.Array) -> None:
    params = {"wte": {"embedding": jnp.ones((9, 4))}}
    layers = pefts.p_tuning(length=3).init(key, params).trainable["wte/embedding"]
    assert {name: layers[name].shape for name in layers} == {
        "T": (3, 4),
        **{f"W{n}": (4, 4) for n in (1, 2, 3)},
        **{f"b{n}": (4,) for n in (1, 2, 3)},
    }


@pytest.mark.parametrize(
    ("peft", "count"),
    [(pefts.p_tuning(length=20), 28_382_208), (pefts.prompt(length=200, init="normal"), 614_400)],
)
def test_published_counts(peft: pefts.Peft, count: int, key: jax.Array) -> None:
    """Llama-3.2-3B on MetaMathQA, of which the table's width alone matters."""
    table = jax.ShapeDtypeStruct((128_256, 3072), jnp.bfloat16)
    state = jax.eval_shape(peft.init, key, {"embed_tokens": {"embedding": table}})
    assert pefts.count(state.trainable) == count


def test_errors_name_the_method(key: jax.Array) -> None:
    params = base_params()
    peft = pefts.p_tuning(length=2)
    bound = {"params": peft.bind(params, peft.init(key, params))}
    tokens, mask = base_inputs()
    with pytest.raises(ValueError, match="p_tuning: tokens=0 is no array of integer ids"):
        pefts.apply(Classifier().apply)(bound, mask, tokens)
    with pytest.raises(ValueError, match="p_tuning: argument '1' of shape"):
        pefts.apply(Classifier().apply)(bound, tokens, mask[:, :3])
    with pytest.raises(ValueError, match="p_tuning cannot be merged"):
        peft.merge(params, peft.init(key, params))


# --- Hugging Face PEFT ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="parity is measured against torch")
    pytest.importorskip("peft", reason="parity is measured against Hugging Face PEFT")
    made = tmp_path_factory.mktemp("llama")
    torch_model("llama", num_hidden_layers=2).save_pretrained(made)
    return made


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(3, SIZES["vocab_size"], (2, 7)).astype(np.int32)


def base(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def logits(folder: Path, peft: pefts.Peft, state: Any, tokens: np.ndarray) -> np.ndarray:
    model, params, _ = models.load(folder)
    return np.asarray(pefts.apply(model.apply)({"params": peft.bind(params, state)}, tokens))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize(
    ("method", "kind"), [("prompt", "PROMPT_TUNING"), ("p_tuning", "P_TUNING")]
)
def test_peft_computes_what_we_compute(
    method: str, kind: str, folder: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    import peft as hf

    _, params, names = models.load(folder)
    ours = pefts.METHODS[method](length=4)
    state = pefts.randomize(jax.random.key(1), ours.init(jax.random.key(0), params), 0.5)
    pefts.export_hf(tmp_path, ours, state, params, names, task_type="CAUSAL_LM")
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings"}
    opened = hf.PeftModel.from_pretrained(base(folder), str(tmp_path)).eval()
    assert opened.active_peft_config.peft_type == kind
    expected = logits(folder, ours, state, tokens)
    # peft's logits of the virtual tokens stand in front of the others, as ours do
    np.testing.assert_allclose(torch_logits(opened, tokens), expected, rtol=0, atol=5e-5)
    again, restored = pefts.import_hf(tmp_path, params, names)
    assert again.config["method"] == "prompt"
    np.testing.assert_allclose(logits(folder, again, restored, tokens), expected, rtol=0, atol=5e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("kind", ["prompt", "mlp", "lstm"])
def test_we_compute_what_peft_computes(
    kind: str, folder: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    import peft as hf
    import torch

    torch.manual_seed(0)
    shared = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    config = hf.PromptTuningConfig(**shared)
    if kind != "prompt":
        config = hf.PromptEncoderConfig(
            **shared, encoder_reparameterization_type=kind.upper(), encoder_hidden_size=6
        )
    theirs = hf.get_peft_model(base(folder), config).eval()
    theirs.save_pretrained(tmp_path)
    _, params, names = models.load(folder)
    peft, state = pefts.import_hf(tmp_path, params, names)
    np.testing.assert_allclose(
        logits(folder, peft, state, tokens), torch_logits(theirs, tokens), rtol=0, atol=5e-5
    )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("trains_head", [True, False])
def test_a_classifier_travels_with_its_head(trains_head: bool, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="parity is measured against Hugging Face PEFT")
    import hf_pair

    pair = hf_pair.classifier()
    peft = pefts.prompt(length=3)
    if trains_head:
        peft = pefts.chain(pefts.full(targets="classifier"), peft)
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), pair.params), 0.3)
    pefts.export_hf(tmp_path, peft, state, pair.params, pair.names, task_type="SEQ_CLS")
    ours = pair.run(peft, state)
    assert np.abs(ours - pair.run_torch(pair.base())).max() > 1e-2
    hf_pair.close(pair.opened(tmp_path), ours)
    again = pefts.import_hf(tmp_path, pair.params, pair.names)
    hf_pair.close(pair.run(*again), ours)


def test_a_folder_that_peft_would_not_use_is_refused(folder: Path, tmp_path: Path) -> None:
    _, params, names = models.load(folder)
    peft = pefts.prompt(length=2)
    state = peft.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="PROMPT_TUNING without a task_type as the base alone"):
        pefts.export_hf(tmp_path, peft, state, params, names)
    both = pefts.chain(peft, pefts.prompt(length=3))
    with pytest.raises(ValueError, match="exactly one adapter"):
        pefts.export_hf(tmp_path, both, both.init(jax.random.key(0), params), params, names)
