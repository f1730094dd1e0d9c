"""LLaMA-Adapter: the gated term in numpy, upper layers, other methods beside it, peft's files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hf_pair import PEFT_NOISE
from subject import base_inputs, base_params, model_axes
from test_attention import HEADS, TOKENS, WIDTH, Layer
from tiny_decoders import SIZES, torch_logits, torch_model

import models
import pefts
from models.decoder_names import NAMES

VALUE = "layers/attention/value/kernel"
LENGTH = 3


def moved(peft: pefts.Peft, params: Any) -> pefts.PeftState:
    return pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), params), 0.5)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def term(layer: Any, p: Any, x: np.ndarray) -> np.ndarray:
    """g softmax(q K^T / sqrt(H)) V with K and V of P, biases included."""

    def project(name: str, inputs: np.ndarray) -> np.ndarray:
        y = inputs @ np.asarray(layer[name]["kernel"]) + np.asarray(layer[name]["bias"])
        return y.reshape(*inputs.shape[:-1], HEADS, -1)

    q, K, V = project("query", x), project("key", p["P"]), project("value", p["P"])
    scores = np.einsum("btnh,snh->bnts", q, K) / np.sqrt(WIDTH // HEADS)
    return p["gate"] * np.einsum("bnts,snh->btnh", softmax(scores), V).reshape(x.shape)


@pytest.fixture
def x(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (2, TOKENS, WIDTH))


def biased(model: Any, x: jax.Array) -> Any:
    params = model.init(jax.random.key(5), x)["params"]
    return jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim == 1 else leaf, params)


def test_the_term_is_that_of_the_equation(x: jax.Array) -> None:
    model = Layer()
    params = biased(model, x)
    peft = pefts.llama_adapter(length=LENGTH)
    state = moved(peft, params)
    ours = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    p = {name: np.asarray(leaf) for name, leaf in state.trainable["value/kernel"].items()}
    expected = np.asarray(model.apply({"params": params}, x)) + term(params, p, np.asarray(x))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", ["key", "value", "key|value"])
def test_the_prompt_goes_through_adapted_projections(targets: str, x: jax.Array) -> None:
    model = Layer()
    params = biased(model, x)
    peft, lora = pefts.llama_adapter(length=LENGTH), pefts.lora(rank=2, targets=targets)
    state, low = moved(peft, params), moved(lora, params)
    run = pefts.apply(model.apply)
    expected = run({"params": peft.bind(lora.merge(params, low), state)}, x)
    for first, second, states in ((lora, peft, (low, state)), (peft, lora, (state, low))):
        both = pefts.PeftState(*({str(n): s[i] for n, s in enumerate(states)} for i in (0, 1)))
        ours = run({"params": pefts.chain(first, second).bind(params, both)}, x)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_projection_without_a_dense_form_is_refused(x: jax.Array) -> None:
    model = Layer()
    params = biased(model, x)
    chain = pefts.chain(pefts.llama_adapter(length=2), pefts.bottleneck(width=2, targets="key"))
    bound = {"params": chain.bind(params, chain.init(jax.random.key(0), params))}
    with pytest.raises(ValueError, match="'key/kernel' carries a method without a dense form"):
        pefts.apply(model.apply)(bound, x)


def test_it_adds_up_with_a_prefix_in_either_order(x: jax.Array) -> None:
    """The gated softmax sees the prompt alone, not the prefix."""
    model = Layer()
    params = biased(model, x)
    peft, prefix = pefts.llama_adapter(length=LENGTH), pefts.prefix(length=2)
    state, other = moved(peft, params), moved(prefix, params)
    run = pefts.apply(model.apply)
    base = model.apply({"params": params}, x)
    alone = [
        run({"params": one.bind(params, s)}, x) - base
        for one, s in ((peft, state), (prefix, other))
    ]
    for first, second, states in ((prefix, peft, (other, state)), (peft, prefix, (state, other))):
        both = pefts.PeftState(*({str(n): s[i] for n, s in enumerate(states)} for i in (0, 1)))
        ours = run({"params": pefts.chain(first, second).bind(params, both)}, x)
        np.testing.assert_allclose(ours - base, sum(alone), rtol=1e-5, atol=1e-5)


def test_keys_of_an_unknown_name_are_refused(x: jax.Array) -> None:
    model = Layer(value="contents")
    params = model.init(jax.random.key(5), x)["params"]
    peft = pefts.llama_adapter(length=2, targets="contents")
    bound = {"params": peft.bind(params, peft.init(jax.random.key(0), params))}
    with pytest.raises(ValueError, match="keys beside 'contents/kernel' is not known by its name"):
        pefts.apply(model.apply)(bound, x)


# --- upper layers ---


def test_lower_layers_of_a_stack_are_left_alone() -> None:
    params, inputs, run = base_params(), base_inputs(), pefts.apply(tiny.Classifier().apply)
    peft = pefts.llama_adapter(length=LENGTH, layers=1, axes=model_axes(True))
    state = moved(peft, params)
    np.testing.assert_array_equal(state.frozen[VALUE]["on"], [0, 1])

    @jax.jit
    def loss(trainable: Any) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=trainable))
        return jnp.sum(run({"params": bound}, *inputs) ** 2)

    grads = jax.grad(loss)(state.trainable)[VALUE]
    for leaf in grads.values():
        assert not np.asarray(leaf[0]).any() and np.asarray(leaf[1]).any()


def test_unrolled_upper_layers_are_chosen_by_number() -> None:
    params = {
        f"layers_{n}": {"value": {"kernel": jnp.ones((4, 6))}, "key": {"kernel": jnp.ones((4, 6))}}
        for n in range(12)
    }
    state = pefts.llama_adapter(length=2, layers=3).init(jax.random.key(0), params)
    assert sorted(state.trainable) == [f"layers_{n}/value/kernel" for n in (10, 11, 9)]
    assert not state.frozen


# --- Hugging Face PEFT ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    torch_model("llama").save_pretrained(made)
    return made


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(3, SIZES["vocab_size"], (2, 7)).astype(np.int32)


def base(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def loaded(folder: Path, scanned: bool = True) -> tuple[Any, Any, Any, Any]:
    model, params, names = models.load(folder, scan_layers=scanned)
    axes = pefts.infer_axes(model.apply, params, jnp.zeros((1, 4), jnp.int32))
    return model, params, names, axes


@pytest.mark.filterwarnings(PEFT_NOISE)
@pytest.mark.parametrize(("layers", "scanned"), [(None, True), (2, True), (2, False)])
def test_peft_computes_what_we_compute(
    layers: int | None, scanned: bool, folder: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    import peft as hf

    model, params, names, axes = loaded(folder, scanned)
    ours = pefts.llama_adapter(length=LENGTH, layers=layers, axes=axes)
    state = moved(ours, params)
    pefts.export_hf(tmp_path, ours, state, params, names, task_type="CAUSAL_LM")
    opened = hf.PeftModel.from_pretrained(base(folder), str(tmp_path)).eval()
    run = pefts.apply(model.apply)
    logits = run({"params": ours.bind(params, state)}, tokens)
    assert np.abs(logits - model.apply({"params": params}, tokens)).max() > 1e-2
    np.testing.assert_allclose(logits, torch_logits(opened, tokens), rtol=0, atol=5e-5)
    again, restored = pefts.import_hf(tmp_path, params, names)
    np.testing.assert_allclose(
        run({"params": again.bind(params, restored)}, tokens), logits, rtol=0, atol=5e-5
    )
    assert again.config["layers"] == (layers if scanned else None)


@pytest.mark.filterwarnings(PEFT_NOISE)
def test_we_compute_what_peft_computes(folder: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    import peft as hf
    import torch

    config = hf.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    theirs = hf.get_peft_model(base(folder), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "adaption_gate" in name:
                parameter.fill_(0.7)
    theirs.save_pretrained(tmp_path)
    model, params, names, _ = loaded(folder)
    ours, state = pefts.import_hf(tmp_path, params, names)
    logits = pefts.apply(model.apply)({"params": ours.bind(params, state)}, tokens)
    np.testing.assert_allclose(logits, torch_logits(theirs, tokens), rtol=0, atol=5e-5)


def test_what_peft_cannot_say_is_refused(folder: Path, tmp_path: Path) -> None:
    _, params, names, _ = loaded(folder, scanned=False)

    def export(peft: pefts.Peft, tree: Any = params, mapping: Any = names) -> None:
        pefts.export_hf(tmp_path, peft, peft.init(jax.random.key(0), tree), tree, mapping)

    with pytest.raises(ValueError, match=r"ADAPTION_PROMPT into \['model.layers.2.self_attn'\]"):
        export(pefts.llama_adapter(length=2, targets="layers_1/self_attn/v_proj"))
    head = pefts.chain(pefts.full(targets="lm_head"), pefts.llama_adapter(length=2))
    with pytest.raises(
        ValueError, match="'lm_head'.* trained outright, and peft stores no modules"
    ):
        export(head)
    fused = {"layers_0": {"self_attn": {"qkv_proj": {"kernel": jnp.ones((4, 12))}}}}
    gpt2 = replace(NAMES["gpt2"], layers=1, scanned=False, prefix="transformer.")
    with pytest.raises(
        ValueError, match="Llama and Mistral alone, .* 'transformer.h.0.attn.c_attn"
    ):
        export(pefts.llama_adapter(length=2), fused, gpt2)
