"""Trained rows of a table: lookups, tied heads; and peft's files of them and of trained norms."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import hf_pair
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import SIZES, torch_logits, torch_model

import models
import pefts

TOKENS = [7, 3, 11]
# peft has no table of the norms that it adapts.
NOISE = (
    hf_pair.PEFT_NOISE,
    "ignore:Unsupported layer type .*Norm",
    # The rows of a tied head, which are those of the table.
    r"ignore:Found missing adapter keys.*\['base_model.model.lm_head.trainable_tokens_delta",
)


class Tied(nn.Module):
    """One table at both ends."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        table = nn.Embed(13, 6, name="wte")
        return table(tokens), table.attend(jnp.ones((1, 6)))


def test_rows_are_replaced_at_both_ends(key: jax.Array) -> None:
    model, ids = Tied(), jnp.arange(13).reshape(1, 13)
    params = model.init(key, ids)["params"]
    peft = pefts.trainable_tokens(TOKENS)
    state = pefts.randomize(key, peft.init(key, params), 0.5)
    E = np.array(params["wte"]["embedding"])
    E[TOKENS] = state.trainable["wte/embedding"]["R"]
    rows, logits = pefts.apply(model.apply)({"params": peft.bind(params, state)}, ids)
    np.testing.assert_array_equal(rows[0], E)
    np.testing.assert_allclose(logits[0], E.sum(1), rtol=1e-5)


def test_the_lookup_builds_no_table(key: jax.Array) -> None:
    """The gradient of R, and of nothing that has the table's size."""
    params = {"wte": {"embedding": jnp.ones((13, 6))}}
    peft = pefts.trainable_tokens(TOKENS)
    state = peft.init(key, params)
    ids = jnp.asarray([[3, 3, 5, 7]])

    class Lookup(nn.Module):
        @nn.compact
        def __call__(self, ids: jax.Array) -> jax.Array:
            return nn.Embed(13, 6, name="wte")(ids)

    def total(trainable: Any) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=trainable))
        return pefts.apply(Lookup().apply)({"params": bound}, ids).sum()

    grads = jax.grad(total)(state.trainable)["wte/embedding"]["R"]
    np.testing.assert_array_equal(grads[:, 0], [1, 2, 0])
    made = str(jax.make_jaxpr(jax.grad(total))(state.trainable))
    assert "f32[13,6] = " not in made


# --- Hugging Face PEFT ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: tmp_path_factory.mktemp(family) for family in ("llama", "gpt2")}
    for family, folder in made.items():
        torch_model(family, num_hidden_layers=2).save_pretrained(folder)
    return made


@pytest.fixture
def tokens() -> np.ndarray:
    tokens = np.random.default_rng(1).integers(3, SIZES["vocab_size"], (2, 7)).astype(np.int32)
    tokens[0, :3] = TOKENS
    return tokens


def base(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


METHODS = {
    "tokens": lambda axes: pefts.trainable_tokens(TOKENS),
    "norms": lambda axes: pefts.ln_tuning(),
    "scales": lambda axes: pefts.ln_tuning(targets="attention_norm/scale"),
}


@pytest.mark.filterwarnings(*NOISE)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_peft_computes_what_we_compute(
    name: str, family: str, folders: dict[str, Path], tokens: np.ndarray, tmp_path: Path
) -> None:
    """GPT-2's head is its table, and its norms have biases."""
    model, params, names = models.load(folders[family])
    peft = METHODS[name](None)
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), params), 0.3)
    pefts.export_hf(tmp_path, peft, state, params, names)
    opened = hf_pair.hf.PeftModel.from_pretrained(base(folders[family]), str(tmp_path)).eval()
    run = pefts.apply(model.apply)
    ours = np.asarray(run({"params": peft.bind(params, state)}, tokens))
    assert np.abs(ours - model.apply({"params": params}, tokens)).max() > 1e-2
    np.testing.assert_allclose(torch_logits(opened, tokens), ours, rtol=0, atol=5e-5)
    again, restored = pefts.import_hf(tmp_path, params, names)
    np.testing.assert_allclose(
        run({"params": again.bind(params, restored)}, tokens), ours, rtol=0, atol=5e-5
    )


@pytest.mark.filterwarnings(*NOISE)
@pytest.mark.parametrize("name", ["tokens", "norms"])
def test_we_compute_what_peft_computes(name: str, tmp_path: Path) -> None:
    pair = hf_pair.bare()
    config = (
        hf_pair.hf.TrainableTokensConfig(token_indices=[9, 6], target_modules=["word_embeddings"])
        if name == "tokens"
        else hf_pair.hf.LNTuningConfig(target_modules=["output.LayerNorm"])
    )
    theirs = hf_pair.trained_by_peft(pair, config, tmp_path)
    assert np.abs(theirs - pair.run_torch(pair.base())).max() > 1e-2
    peft, state = pefts.import_hf(tmp_path, pair.params, pair.names)
    hf_pair.close(pair.run(peft, state), theirs)
    pefts.export_hf(tmp_path / "again", peft, state, pair.params, pair.names)
    hf_pair.close(pair.opened(tmp_path / "again"), theirs)
    assert set(hf_pair.tensors_of(tmp_path)) == set(hf_pair.tensors_of(tmp_path / "again"))


@pytest.mark.filterwarnings(*NOISE)
def test_a_tied_head_is_written_twice_by_peft(
    folders: dict[str, Path], tokens: np.ndarray, tmp_path: Path
) -> None:
    config = hf_pair.hf.TrainableTokensConfig(token_indices=TOKENS, target_modules=["wte"])
    theirs = hf_pair.hf.get_peft_model(base(folders["gpt2"]), config).eval()
    for name, parameter in theirs.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.add_(0.3)
    theirs.save_pretrained(tmp_path)
    key = "base_model.model.lm_head.trainable_tokens_delta"
    assert key in hf_pair.tensors_of(tmp_path)
    model, params, names = models.load(folders["gpt2"])
    peft, state = pefts.import_hf(tmp_path, params, names)
    ours = pefts.apply(model.apply)({"params": peft.bind(params, state)}, tokens)
    np.testing.assert_allclose(ours, torch_logits(theirs, tokens), rtol=0, atol=5e-5)

    def other(tensors: dict[str, np.ndarray]) -> None:
        tensors[key] = tensors[key] + 1

    with pytest.raises(ValueError, match="tensor 'base_model.model.lm_head.trainable_tokens_delta"):
        pefts.import_hf(hf_pair.edit(tmp_path, other), params, names)


@pytest.mark.filterwarnings(*NOISE)
def test_norms_of_some_layers_leave_the_others_alone(tmp_path: Path) -> None:
    pair = hf_pair.bare()
    config = hf_pair.hf.LNTuningConfig(target_modules=r".*layer\.1\.output\.LayerNorm")
    theirs = hf_pair.trained_by_peft(pair, config, tmp_path)
    peft, state = pefts.import_hf(tmp_path, pair.params, pair.names)
    hf_pair.close(pair.run(peft, state), theirs)


def test_incomplete_files_are_refused(tmp_path: Path) -> None:
    pair = hf_pair.bare()
    peft = pefts.ln_tuning(targets="mlp/norm")
    state = peft.init(jax.random.key(0), pair.params)
    pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
    module = "base_model.model.encoder.layer.0.output.LayerNorm.ln_tuning_layers"
    hf_pair.edit(tmp_path, lambda tensors: tensors.pop(f"{module}.bias"))
    with pytest.raises(ValueError, match=r"missing \['ln_tuning_layers.bias'\]"):
        pefts.import_hf(tmp_path, pair.params, pair.names)
    tokens = pefts.trainable_tokens([3, 7])
    state = tokens.init(jax.random.key(0), pair.params)
    pefts.export_hf(tmp_path, tokens, state, pair.params, pair.names)
    hf_pair.edit(tmp_path, token_indices=[3, 7, 9])
    with pytest.raises(ValueError, match=r"trainable_tokens_delta has shape \(2, 12\).* \(3, 12\)"):
        pefts.import_hf(tmp_path, pair.params, pair.names)
