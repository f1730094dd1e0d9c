"""Adapters exchanged with Hugging Face PEFT itself, on a tiny BERT, in both directions."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import models
import pefts
from pefts import io
from pefts.formats import selection

torch = pytest.importorskip("torch", reason="parity is measured against torch")
transformers = pytest.importorskip("transformers", reason="the torch models are transformers'")
hf = pytest.importorskip("peft", reason="parity is measured against Hugging Face PEFT")

# peft still asks transformers by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 24,
    "initializer_range": 0.3,
}
LABELS = 5
QUERY = "encoder.layer.{}.attention.self.query"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of the bare encoder and of the classifier."""
    config = transformers.BertConfig(**SIZES, num_labels=LABELS)
    found = {}
    for name in ("Model", "ForSequenceClassification"):
        torch.manual_seed(0)
        model = getattr(transformers, f"Bert{name}")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


class Pair:
    """One checkpoint in both libraries."""

    def __init__(self, folder: Path, head: bool, **options: Any) -> None:
        self.folder, self.head = folder, head
        labels = {"num_labels": LABELS, "pooling": "pooler"} if head else {}
        self.model, self.params, self.names = models.load(folder, **labels, **options)
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(5, SIZES["vocab_size"], (4, 9)).astype(np.int32)
        self.mask = np.ones_like(self.tokens)
        self.mask[1, 4:] = 0
        arguments = (self.tokens, self.mask)
        self.axes = pefts.infer_axes(self.model.apply, self.params, *arguments)

    def base(self) -> Any:
        kind = "BertForSequenceClassification" if self.head else "BertModel"
        return getattr(transformers, kind).from_pretrained(self.folder)

    def run_torch(self, model: Any) -> np.ndarray:
        model.eval()
        tokens, mask = (torch.from_numpy(x.astype(np.int64)) for x in (self.tokens, self.mask))
        with torch.no_grad():
            out = model(input_ids=tokens, attention_mask=mask)
        return out.logits.numpy() if self.head else self.masked(out.last_hidden_state.numpy())

    def run(self, peft: pefts.Peft, state: pefts.PeftState) -> np.ndarray:
        bound = {"params": peft.bind(self.params, state)}
        out = np.asarray(pefts.apply(self.model.apply)(bound, self.tokens, self.mask))
        return out if self.head else self.masked(out)

    def masked(self, hidden: np.ndarray) -> np.ndarray:
        return hidden * self.mask[..., None]

    def opened(self, folder: Path) -> np.ndarray:
        return self.run_torch(hf.PeftModel.from_pretrained(self.base(), folder))


@pytest.fixture(scope="module")
def encoder(bases: dict[str, Path]) -> Pair:
    return Pair(bases["Model"], False)


@pytest.fixture(scope="module")
def unrolled(bases: dict[str, Path]) -> Pair:
    return Pair(bases["Model"], False, scan_layers=False)


@pytest.fixture(scope="module")
def classifier(bases: dict[str, Path]) -> Pair:
    return Pair(bases["ForSequenceClassification"], True)


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def made(pair: Pair, method: Callable[..., pefts.Peft]) -> tuple[pefts.Peft, pefts.PeftState]:
    peft = method(pair.axes)
    fresh = peft.init(jax.random.key(0), pair.params)
    return peft, pefts.randomize(jax.random.key(1), fresh, scale=0.3)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], Any] | None = None, **fields: Any):
    """Spoil a folder's tensors, or its config."""
    if change is not None:
        tensors = tensors_of(folder)
        change(tensors)
        file = folder / "adapter_model.safetensors"
        safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    config = config_of(folder) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


EXPORTS: dict[str, Callable[[Any], pefts.Peft]] = {
    "lora": lambda axes: pefts.lora(rank=3, alpha=5.0, axes=axes),
    "patterns": lambda axes: pefts.lora(
        rank=4,
        alpha=6.0,
        targets=r"query|value|intermediate",
        rank_pattern={"query": 2},
        alpha_pattern={"query": 7.0, "value": 1.5},
        axes=axes,
    ),
    "rslora": lambda axes: pefts.lora(rank=3, alpha=5.0, rslora=True, axes=axes),
    "rslora and patterns": lambda axes: pefts.lora(
        rank=3, alpha=5.0, rslora=True, rank_pattern={"query": 2}, targets=r"query|value", axes=axes
    ),
    "embeddings": lambda axes: pefts.lora(
        rank=3, targets=r"word_embeddings|position_embeddings|key", axes=axes
    ),
    "dora": lambda axes: pefts.dora(rank=3, alpha=5.0, axes=axes),
    "dora embeddings": lambda axes: pefts.dora(rank=3, targets=r"word_embeddings", axes=axes),
    "vera": lambda axes: pefts.vera(rank=6, axes=axes),
    "adalora": lambda axes: pefts.adalora(
        total_steps=20, init_rank=4, target_rank=2, alpha=5.0, initial_warmup=1, axes=axes
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_peft_computes_what_we_compute(name: str, encoder: Pair, tmp_path: Path) -> None:
    peft, state = made(encoder, EXPORTS[name])
    pefts.export_hf(tmp_path, peft, state, encoder.params, encoder.names)
    ours = encoder.run(peft, state)
    assert np.abs(ours - encoder.run_torch(encoder.base())).max() > 1e-2
    close(ours, encoder.opened(tmp_path))
    again = pefts.import_hf(tmp_path, encoder.params, encoder.names)
    close(encoder.run(*again), ours)


@pytest.mark.parametrize("name", ["patterns", "dora", "vera"])
def test_unrolled_layers_export_the_same_names(name: str, unrolled: Pair, tmp_path: Path) -> None:
    peft, state = made(unrolled, EXPORTS[name])
    pefts.export_hf(tmp_path, peft, state, unrolled.params, unrolled.names)
    close(unrolled.run(peft, state), unrolled.opened(tmp_path))


def with_head(axes: Any) -> pefts.Peft:
    low_rank = pefts.lora(rank=3, targets=r"query|value", axes=axes)
    return pefts.chain(low_rank, pefts.full(targets=["classifier", "pooler/dense"]))


def with_all_biases(axes: Any) -> pefts.Peft:
    return pefts.chain(pefts.bitfit(), pefts.lora(rank=3, targets=r"query|value", axes=axes))


def with_own_biases(axes: Any) -> pefts.Peft:
    biases = pefts.bitfit(targets=r"query/bias")
    return pefts.chain(biases, pefts.lora(rank=3, targets=r"query|value", axes=axes))


def with_norms(axes: Any) -> pefts.Peft:
    return pefts.partition(
        {"low": pefts.dora(rank=3, axes=axes), "norms": pefts.full()},
        {r"norm/scale": "norms", r"query|value": "low"},
    )


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
@pytest.mark.parametrize(
    ("method", "bias", "saved"),
    [
        (with_head, "none", ["bert.pooler.dense", "classifier"]),
        (with_all_biases, "all", []),
        (with_own_biases, "lora_only", []),
        (with_norms, "none", 7),
    ],
)
def test_leaves_trained_outright_travel_along(
    method: Any, bias: str, saved: Any, task: str | None, classifier: Pair, tmp_path: Path
) -> None:
    """With SEQ_CLS peft wants the classifier, trained or not."""
    peft, state = made(classifier, method)
    pefts.export_hf(tmp_path, peft, state, classifier.params, classifier.names, task_type=task)
    config = config_of(tmp_path)
    found = set(config["modules_to_save"] or ())
    assert config["bias"] == bias
    assert ("classifier" in found) == (task is not None or method is with_head)
    rest = found - {"classifier"}
    assert len(rest) == saved if isinstance(saved, int) else rest == set(saved) - {"classifier"}
    ours = classifier.run(peft, state)
    close(ours, classifier.opened(tmp_path))
    chained, restored = pefts.import_hf(tmp_path, classifier.params, classifier.names)
    assert chained.config["method"] == "chain"
    close(classifier.run(chained, restored), ours)


def lora_config(**options: Any) -> Any:
    defaults = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
    return hf.LoraConfig(**(defaults | {"target_modules": ["query", "value"]} | options))


IMPORTS: dict[str, Callable[[], Any]] = {
    "lora": lora_config,
    "rslora and patterns": lambda: lora_config(
        use_rslora=True,
        rank_pattern={QUERY.format(0): 2, "layer.1.*value": 5},
        alpha_pattern={"2.attention.self.query": 2.5},
    ),
    "regular expression": lambda: lora_config(target_modules=r".*\.(key|intermediate\.dense)"),
    "every kernel": lambda: lora_config(target_modules=r"(?!pooler).*(query|key|value|dense)"),
    "some layers": lambda: lora_config(layers_to_transform=[0, 2], layers_pattern="layer"),
    "excluded": lambda: lora_config(exclude_modules=["layer.1.attention.self.query"]),
    "embeddings": lambda: lora_config(target_modules=["word_embeddings", "query"]),
    "dora": lambda: lora_config(use_dora=True, rank_pattern={QUERY.format(1): 1}),
    "dora in one layer": lambda: lora_config(use_dora=True, layers_to_transform=1),
    "biases": lambda: lora_config(bias="lora_only"),
    "norms": lambda: lora_config(modules_to_save=["LayerNorm"]),
    "adalora": lambda: hf.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, lora_alpha=5, target_modules=["query", "value"]
    ),
    "vera": lambda: hf.VeraConfig(
        r=6, target_modules=["query", "intermediate.dense"], init_weights=False
    ),
}


def trained_by_peft(pair: Pair, config: Any, folder: Path) -> np.ndarray:
    """Save an adapter with every trained tensor away from its start; what peft computes with it."""
    torch.manual_seed(1)
    model = hf.get_peft_model(pair.base(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return pair.run_torch(model)


@pytest.mark.parametrize("name", IMPORTS)
def test_we_compute_what_peft_computes(name: str, encoder: Pair, tmp_path: Path) -> None:
    theirs = trained_by_peft(encoder, IMPORTS[name](), tmp_path)
    assert np.abs(theirs - encoder.run_torch(encoder.base())).max() > 1e-2
    peft, state = pefts.import_hf(tmp_path, encoder.params, encoder.names)
    close(encoder.run(peft, state), theirs)
    pefts.export_hf(tmp_path / "again", peft, state, encoder.params, encoder.names)
    close(encoder.opened(tmp_path / "again"), theirs)


@pytest.mark.parametrize("name", ["rslora and patterns", "some layers", "excluded"])
def test_padding_and_untouched_layers_do_not_reach_the_file(
    name: str, encoder: Pair, tmp_path: Path
) -> None:
    trained_by_peft(encoder, IMPORTS[name](), tmp_path)
    peft, state = pefts.import_hf(tmp_path, encoder.params, encoder.names)
    pefts.export_hf(tmp_path / "again", peft, state, encoder.params, encoder.names)
    original, written = tensors_of(tmp_path), tensors_of(tmp_path / "again")
    assert set(original) == set(written)
    for key, value in original.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["classifier"]}, {"bias": "all"}, {"target_modules": "all-linear"}],
)
def test_peft_classifiers_are_imported(
    options: dict[str, Any], classifier: Pair, tmp_path: Path
) -> None:
    config = lora_config(task_type="SEQ_CLS", **options)
    theirs = trained_by_peft(classifier, config, tmp_path)
    peft, state = pefts.import_hf(tmp_path, classifier.params, classifier.names)
    close(classifier.run(peft, state), theirs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_are_read(dtype: str, encoder: Pair, tmp_path: Path) -> None:
    trained_by_peft(encoder, lora_config(), tmp_path)
    half = getattr(jnp, dtype)

    def cast(tensors: dict[str, Any]) -> None:
        tensors.update({key: np.asarray(jnp.asarray(t, half)) for key, t in tensors.items()})

    _, state = pefts.import_hf(edit(tmp_path, cast), encoder.params, encoder.names)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32"}
    close(
        encoder.run(*pefts.import_hf(tmp_path, encoder.params, encoder.names)),
        encoder.opened(tmp_path),
    )


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


@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* invalid shape")  # a rank of 0
def test_an_adalora_that_peft_has_pruned(encoder: Pair, tmp_path: Path) -> None:
    """After its cuts peft stores the kept triplets alone, and their places in rank_pattern."""
    torch.manual_seed(1)
    model = hf.get_peft_model(encoder.base(), IMPORTS["adalora"]())
    tokens = torch.from_numpy(encoder.tokens.astype(np.int64))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(10):
        optimizer.zero_grad()
        model(input_ids=tokens).last_hidden_state.square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
    theirs = encoder.run_torch(model)
    model.save_pretrained(tmp_path)
    kept = config_of(tmp_path)["rank_pattern"]
    assert {sum(mask) for mask in kept.values()} - {4}, "nothing was pruned"
    peft, state = pefts.import_hf(tmp_path, encoder.params, encoder.names)
    close(encoder.run(peft, state), theirs)
    pefts.export_hf(tmp_path / "again", peft, state, encoder.params, encoder.names)
    close(encoder.opened(tmp_path / "again"), theirs)
    edit(tmp_path, rank_pattern={"encoder.layer.7.attention.self.query.lora_E": [True] * 4})
    with pytest.raises(ValueError, match="rank_pattern names 'encoder.layer.7"):
        pefts.import_hf(tmp_path, encoder.params, encoder.names)


def test_the_prefix_of_the_torch_model_can_be_chosen(
    encoder: Pair, classifier: Pair, tmp_path: Path
) -> None:
    """An adapter of the bare encoder, exported for the same encoder under a classifier."""
    names = dataclasses.replace(encoder.names, prefix="bert.")
    peft, state = made(encoder, EXPORTS["lora"])
    pefts.export_hf(tmp_path, peft, state, encoder.params, names)
    model = hf.PeftModel.from_pretrained(classifier.base(), tmp_path)
    assert (
        np.abs(classifier.run_torch(model) - classifier.run_torch(classifier.base())).max() > 0.01
    )


def test_target_modules_select_exactly_the_adapted_modules() -> None:
    modules = ["score", "head.score", "layer.1.query", "layer.11.query", "query"]
    for chosen in (["score"], ["layer.1.query"], ["query"], ["layer.1.query", "layer.11.query"]):
        written = selection.targets_for(chosen, modules)
        assert selection.selected({"target_modules": written}, modules) == set(chosen)
    assert isinstance(selection.targets_for(["layer.1.query"], modules), list)
    assert isinstance(selection.targets_for(["query"], modules), str)


def test_files_are_as_peft_expects_them(encoder: Pair, tmp_path: Path) -> None:
    peft, state = made(encoder, EXPORTS["patterns"])
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state)
    pefts.export_hf(
        tmp_path, peft, half, encoder.params, encoder.names, base_model_name_or_path="some/base"
    )
    metadata, tensors = io.open_tensors(tmp_path / "adapter_model.safetensors")
    assert metadata == {"format": "pt"}
    assert {tensor.dtype.name for tensor in tensors.values()} == {"float32"}
    assert all(key.startswith("base_model.model.encoder.layer.") for key in tensors)
    text = (tmp_path / "adapter_config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    loaded = hf.PeftConfig.from_pretrained(tmp_path)
    assert loaded.base_model_name_or_path == "some/base"
    assert loaded.r == 4
    assert loaded.rank_pattern == {f"^{QUERY.format(layer)}": 2 for layer in range(3)}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


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
    refused(classifier, EXPORTS["dora"], "no format for 'dora'; exported are", tmp_path)


def test_states_that_cannot_be_exported(encoder: Pair, tmp_path: Path) -> None:
    peft, state = made(encoder, EXPORTS["lora"])
    arguments = (encoder.params, encoder.names)
    with pytest.raises(ValueError, match="every A and B of this state is zero"):
        pefts.export_hf(tmp_path, peft, jax.tree.map(jnp.zeros_like, state), *arguments)
    broken = jax.tree.map(lambda leaf: leaf / 0, state)
    with pytest.raises(ValueError, match="NaN or Inf"):
        pefts.export_hf(tmp_path, peft, broken, *arguments)
    assert not list(tmp_path.iterdir())
