"""Adapters exchanged with Hugging Face PEFT itself, on a tiny BERT, in both directions."""

import dataclasses
import json
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
    close,
    config_of,
    edit,
    hf,
    lora_config,
    made,
    tensors_of,
    torch,
    trained_by_peft,
)

import pefts
from pefts import io
from pefts.formats import selection
from pefts.methods.adalora import prune

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)


@pytest.fixture(scope="module")
def encoder() -> Pair:
    return hf_pair.bare()


@pytest.fixture(scope="module")
def classifier() -> Pair:
    return hf_pair.classifier()


@pytest.fixture(scope="module")
def unrolled() -> Pair:
    return hf_pair.unrolled()


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


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # also of its own files
def test_an_adalora_that_we_have_pruned(encoder: Pair, tmp_path: Path) -> None:
    """The file holds the triplets that are left, other numbers of them in each layer."""
    peft = pefts.adalora(9, 4, 2, 5.0, warmup=(0, 1), targets=["query", "value"], axes=encoder.axes)
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), encoder.params), 0.3)
    query, value = sorted(state.trainable)
    kept = {query: [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]], value: [[1, 0, 1, 1]] * 3}
    for path, mask in kept.items():
        state.trainable[path]["e"] *= jnp.asarray(mask, jnp.float32)
    small = prune(state)
    assert {small.trainable[path]["e"].shape for path in kept} == {(3, 2), (3, 3)}
    whole = encoder.run(peft, state)
    close(encoder.run(peft, small), whole)
    pefts.export_hf(tmp_path, peft, small, encoder.params, encoder.names)
    shapes = {key: len(t) for key, t in tensors_of(tmp_path).items() if key.endswith("lora_E")}
    assert sorted(shapes.values()) == [1, 2, 3, 3, 3]
    pattern = config_of(tmp_path)["rank_pattern"]
    assert {f"base_model.model.{key}": sum(mask) for key, mask in pattern.items()} == shapes
    assert {len(mask) for mask in pattern.values()} == {4}
    close(encoder.opened(tmp_path), whole)
    close(encoder.run(*pefts.import_hf(tmp_path, encoder.params, encoder.names)), whole)


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


def test_a_magnitude_without_factors_is_still_an_adapter(encoder: Pair, tmp_path: Path) -> None:
    peft, state = made(encoder, EXPORTS["dora"])
    for group in state.trainable.values():
        group["A"] = group["A"].at[1].set(0.0)
        group["B"] = group["B"].at[1].set(0.0)
    pefts.export_hf(tmp_path, peft, state, encoder.params, encoder.names)
    close(encoder.run(peft, state), encoder.opened(tmp_path))


SELECTIONS: tuple[dict[str, Any], ...] = (
    {"target_modules": ["query", "model.layers.1.experts.0.up"]},
    {"target_modules": "q.*|.*up"},
    {"target_modules": r".*\.layers\.1\..*"},
    {"target_modules": ["up"], "layers_to_transform": [1]},
    {"target_modules": ["up", "query"], "layers_to_transform": 0},
    {"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": "experts"},
    {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["up", "query"], "layers_to_transform": []},
    {"target_modules": ["up", "query"], "exclude_modules": ["query"]},
    {"target_modules": ["up", "query"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["up", "query"], "modules_to_save": ["query"]},
    {"target_modules": ["up", "query"], "modules_to_save": ["experts"]},
)


@pytest.mark.parametrize("fields", SELECTIONS)
def test_modules_are_selected_as_peft_selects_them(fields: dict[str, Any]) -> None:
    names = [
        *(f"model.layers.{n}.experts.{e}.up" for n in range(2) for e in range(2)),
        *(f"model.layers.{n}.self.{m}" for n in range(12) for m in ("query", "xquery", "up")),
        *("query", "up", "h.1.up", "experts.0.up", "query.up", "layers.1.up"),
    ]
    config = hf.LoraConfig(**fields)
    check = hf.tuners.tuners_utils.check_target_module_exists
    theirs = {name for name in names if check(config, name)}
    assert theirs
    assert selection.selected(fields, names) == theirs


@pytest.mark.parametrize("name", ["a.b.query", "a.xquery", "query", "a.b", "layers.1.up"])
def test_patterns_resolve_as_peft_resolves_them(name: str) -> None:
    table = {"^a.b.query": 1, "query": 2, r"layers\.\d+\.up": 3, "b": 4}
    key = hf.utils.other.get_pattern_key(table.keys(), name)
    assert selection.by_pattern(table, name, 9) == table.get(key, 9)


class ConvNames:
    """The name map of one convolution, in our layout and torch's."""

    def keys(self, path: str) -> list[str]:
        return {"conv/kernel": ["conv.weight"], "conv/bias": ["conv.bias"]}[path]

    def modules(self, path: str) -> list[str]:
        return ["conv"]

    def path(self, key: str) -> tuple[str, int | None, str]:
        return {"conv.weight": ("conv/kernel", None, "conv"), "conv.bias": ("conv/bias", None, "")}[
            key
        ]


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions_travel_both_ways(use_dora: bool, tmp_path: Path) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"conv": torch.nn.Conv2d(6, 5, (2, 3))})

    def ours(conv: Any) -> np.ndarray:
        return conv.weight.detach().numpy().transpose(2, 3, 1, 0)

    names = ConvNames()
    config = lora_config(target_modules=["conv"], use_dora=use_dora)
    model = hf.get_peft_model(fresh(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    base = fresh()["conv"]
    params = {"conv": {"kernel": jnp.asarray(ours(base)), "bias": jnp.zeros(5)}}
    peft, state = pefts.import_hf(tmp_path, params, names)
    merged = model.merge_and_unload()["conv"]
    assert np.abs(ours(merged) - ours(base)).max() > 1e-2
    close(np.asarray(peft.merge(params, state)["conv"]["kernel"]), ours(merged))
    pefts.export_hf(tmp_path / "again", peft, state, params, names)
    original, written = tensors_of(tmp_path), tensors_of(tmp_path / "again")
    assert set(original) == set(written)
    for key, value in original.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
