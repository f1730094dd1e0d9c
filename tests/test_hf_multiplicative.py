"""(IA)3, OFT, BOFT and HiRA exchanged with Hugging Face PEFT itself, on a tiny BERT."""

import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_pair
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_pair import (
    PEFT_NOISE,
    Pair,
    close,
    config_of,
    edit,
    hf,
    made,
    tensors_of,
    torch,
    trained_by_peft,
)

import pefts
from pefts.formats import ia3

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)
SOME = r"query|mlp/output"


@pytest.fixture(scope="module")
def encoder() -> Pair:
    return hf_pair.bare()


@pytest.fixture(scope="module")
def unrolled() -> Pair:
    return hf_pair.unrolled()


@functools.cache
def forward(pair: Pair) -> Callable[[Any], jax.Array]:
    return jax.jit(lambda params: pair.model.apply({"params": params}, pair.tokens, pair.mask))


def run(pair: Pair, peft: pefts.Peft, state: pefts.PeftState) -> np.ndarray:
    """The merged model's outputs, by one program for all: merged and factored agree elsewhere."""
    return pair.masked(np.asarray(forward(pair)(peft.merge(pair.params, state))))


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft would try to compile its extension for every BOFT layer, and warn."""
    monkeypatch.setattr(hf.tuners.boft.layer, "get_fbd_cuda", lambda: None)


def extension() -> Any:
    """What peft's compiled extension computes: (N, D, H, H) -> (N, D H, D H) block-diagonal."""

    def forward(blocks: Any) -> list[Any]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    return types.SimpleNamespace(forward=forward)


EXPORTS: dict[str, Callable[[Any], pefts.Peft]] = {
    "ia3": lambda axes: pefts.ia3(axes=axes),
    "ia3 on outputs": lambda axes: pefts.ia3([], targets="query|mlp", axes=axes),
    "ia3 on inputs": lambda axes: pefts.ia3(r"query|mlp", targets="query|mlp", axes=axes),
    "oft": lambda axes: pefts.oft(block_size=4, dropout=0.1, targets=SOME, axes=axes),
    "oft, exact": lambda axes: pefts.oft(blocks=2, terms=None, targets=SOME, axes=axes),
    "oft, 7 terms, shared": lambda axes: pefts.oft(
        block_size=4, terms=7, block_share=True, targets=SOME, axes=axes
    ),
    "oft, constrained": lambda axes: pefts.oft(block_size=4, coft_eps=0.5, targets=SOME, axes=axes),
    "boft": lambda axes: pefts.boft(block_size=4, dropout=0.1, targets=SOME, axes=axes),
    "boft, two factors": lambda axes: pefts.boft(block_size=2, factors=2, targets=SOME, axes=axes),
    "hira": lambda axes: pefts.hira(rank=3, dropout=0.1, targets=SOME, axes=axes),
    "hira and patterns": lambda axes: pefts.hira(
        rank=4, rank_pattern={"query": 2}, targets="query|value|word_embeddings", axes=axes
    ),
    "boft, two factors by number": lambda axes: pefts.boft(
        blocks=2, factors=2, targets=SOME, axes=axes
    ),
}
IMPORTS: dict[str, Callable[[], Any]] = {
    "ia3": lambda: hf.IA3Config(
        target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
    ),
    "ia3 by expressions": lambda: hf.IA3Config(
        target_modules=r".*(query|intermediate\.dense)", feedforward_modules=r".*\.query"
    ),
    **{
        f"oft, {terms} terms": lambda terms=terms: hf.OFTConfig(
            oft_block_size=4,
            target_modules=["query", "output.dense"],
            num_cayley_neumann_terms=terms,
        )
        for terms in (3, 5, 8)
    },
    "oft, exact": lambda: hf.OFTConfig(
        r=2, oft_block_size=0, target_modules=["query", "output.dense"], use_cayley_neumann=False
    ),
    "oft, shared and constrained": lambda: hf.OFTConfig(
        oft_block_size=4, target_modules=["value"], block_share=True, coft=True, eps=0.5
    ),
    "oft in one layer": lambda: hf.OFTConfig(
        oft_block_size=4, target_modules=["layer.1.attention.self.query"], coft=True, eps=0.4
    ),
    "boft": lambda: hf.BOFTConfig(boft_block_size=4, target_modules=["query", "output.dense"]),
    "boft by number": lambda: hf.BOFTConfig(
        boft_block_size=0, boft_block_num=2, target_modules=["query", "layer.2.output.dense"]
    ),
    "hira": lambda: hf.HiraConfig(
        r=3, target_modules=["query", "output.dense", "word_embeddings"], hira_dropout=0.1
    ),
    "hira and patterns": lambda: hf.HiraConfig(
        r=4, target_modules=["query", "value"], rank_pattern={"layer.1.attention.self.query": 2}
    ),
    "hira in one layer": lambda: hf.HiraConfig(
        r=4, target_modules=["query", "value"], layers_to_transform=[1]
    ),
    "ia3 in one layer": lambda: hf.IA3Config(
        target_modules=["layer.1.attention.self.query", "layer.2.output.dense"],
        feedforward_modules=["layer.2.output.dense"],
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_peft_computes_what_we_compute(name: str, encoder: Pair, tmp_path: Path) -> None:
    peft, state = made(encoder, EXPORTS[name])
    pefts.export_hf(tmp_path, peft, state, encoder.params, encoder.names)
    ours = run(encoder, peft, state)
    assert np.abs(ours - encoder.run_torch(encoder.base())).max() > 1e-2
    close(ours, encoder.opened(tmp_path))
    close(run(encoder, *pefts.import_hf(tmp_path, encoder.params, encoder.names)), ours)


@pytest.mark.parametrize("name", IMPORTS)
def test_we_compute_what_peft_computes(name: str, encoder: Pair, tmp_path: Path) -> None:
    theirs = trained_by_peft(encoder, IMPORTS[name](), tmp_path)
    assert np.abs(theirs - encoder.run_torch(encoder.base())).max() > 1e-2
    peft, state = pefts.import_hf(tmp_path, encoder.params, encoder.names)
    close(run(encoder, peft, state), theirs)
    again = tmp_path / "again"
    pefts.export_hf(again, peft, state, encoder.params, encoder.names)
    original, written = tensors_of(tmp_path), tensors_of(again)
    for key, value in original.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    close(encoder.opened(again), theirs)


def refused(
    pair: Pair, method: Callable[[Any], pefts.Peft], message: str, folder: Path, **info: Any
) -> None:
    peft, state = made(pair, method)
    with pytest.raises(ValueError, match=message):
        pefts.export_hf(folder, peft, state, pair.params, pair.names, **info)
    assert not list(folder.iterdir())


def test_what_ia3_cannot_say_is_refused(encoder: Pair, tmp_path: Path) -> None:
    refused(
        encoder,
        lambda axes: pefts.ia3(targets="query|word_embeddings", axes=axes),
        "IA3 adapts no embeddings, and 'embeddings/word_embeddings/embedding' is one",
        tmp_path,
    )
    refused(
        encoder,
        lambda axes: pefts.chain(pefts.bitfit(), pefts.ia3(axes=axes)),
        "bias='all'.*peft stores none beside IA3: merge them",
        tmp_path,
    )


def test_which_side_a_module_has_is_read_from_the_config(
    encoder: Pair, unrolled: Pair, tmp_path: Path
) -> None:
    config = hf.IA3Config(
        target_modules=r".*\.(query|key)", feedforward_modules=["layer.1.attention.self.query"]
    )
    theirs = trained_by_peft(encoder, config, tmp_path)
    with pytest.raises(ValueError, match="attention/query/kernel' are stacked in one leaf"):
        pefts.import_hf(tmp_path, encoder.params, encoder.names)
    peft, state = pefts.import_hf(tmp_path, unrolled.params, unrolled.names)
    close(run(unrolled, peft, state), theirs)
    pefts.export_hf(tmp_path / "again", peft, state, unrolled.params, unrolled.names)
    close(unrolled.opened(tmp_path / "again"), theirs)
    edit(tmp_path, feedforward_modules=None)
    with pytest.raises(ValueError, match="feedforward_modules is null, which stands for peft's"):
        pefts.import_hf(tmp_path, unrolled.params, unrolled.names)
    edit(tmp_path, feedforward_modules=[])
    with pytest.raises(ValueError, match=r"ia3_l has shape \(1, 12\) in the file; .* \(12, 1\)"):
        pefts.import_hf(tmp_path, unrolled.params, unrolled.names)


def test_names_that_end_alike_become_an_expression() -> None:
    """peft looks at the end of a name, wherever a word begins."""
    assert ia3._named(["up"], ["gate_up", "up"]) == "^(up)$"
    assert ia3._named(["gate_up"], ["gate_up", "up"]) == ["gate_up"]
    assert ia3._named([], ["up"]) == []


@pytest.mark.parametrize("terms", [None, 5])
def test_both_signs_of_pefts_rotation(terms: int | None, encoder: Pair, tmp_path: Path) -> None:
    """The same file turns the other way under its other setting, and is imported as that."""
    peft, state = made(encoder, lambda axes: pefts.oft(4, terms=terms, targets="query", axes=axes))
    pefts.export_hf(tmp_path, peft, state, encoder.params, encoder.names)
    Q = np.asarray(state.trainable["encoder/layers/attention/query/kernel"]["Q"])
    written = np.stack([tensors_of(tmp_path)[key] for key in sorted(tensors_of(tmp_path))])
    np.testing.assert_array_equal(written, Q if terms is None else -Q)
    edit(tmp_path, use_cayley_neumann=terms is None)
    _, toggled = pefts.import_hf(tmp_path, encoder.params, encoder.names)
    np.testing.assert_array_equal(
        toggled.trainable["encoder/layers/attention/query/kernel"]["Q"], -Q
    )
    close(
        run(encoder, *pefts.import_hf(tmp_path, encoder.params, encoder.names)),
        encoder.opened(tmp_path),
    )


@pytest.mark.parametrize("terms", [2, 3])
def test_series_that_peft_lacks_are_refused(terms: int, encoder: Pair, tmp_path: Path) -> None:
    refused(
        encoder,
        lambda axes: pefts.oft(4, terms=terms, targets="query", axes=axes),
        f"terms={terms}: peft's shortest series",
        tmp_path,
    )


@pytest.mark.parametrize(("terms", "what"), [(2, r"I \+ 2 Q"), (1, "the identity")])
def test_series_of_pefts_that_are_none_are_refused(
    terms: int, what: str, encoder: Pair, tmp_path: Path
) -> None:
    trained_by_peft(encoder, IMPORTS["oft, 5 terms"](), tmp_path)
    edit(tmp_path, num_cayley_neumann_terms=terms)
    with pytest.raises(ValueError, match=f"num_cayley_neumann_terms={terms} .* R is then {what}"):
        pefts.import_hf(tmp_path, encoder.params, encoder.names)


@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")
def test_the_block_size_that_peft_really_took_is_imported(encoder: Pair, tmp_path: Path) -> None:
    """peft turns 5 into 4 or 6 for 12 inputs, and keeps 5 for 20."""
    config = hf.OFTConfig(oft_block_size=5, target_modules=["query", "value"])
    theirs = trained_by_peft(encoder, config, tmp_path)
    assert config_of(tmp_path)["oft_block_size"] == 5
    peft, state = pefts.import_hf(tmp_path, encoder.params, encoder.names)
    assert peft.config["block_size"] in (4, 6)
    close(run(encoder, peft, state), theirs)
    config = hf.OFTConfig(oft_block_size=5, target_modules=["query", "layer.1.output.dense"])
    trained_by_peft(encoder, config, tmp_path / "mixed")
    with pytest.raises(ValueError, match="blocks have neither one size nor one number"):
        pefts.import_hf(tmp_path / "mixed", encoder.params, encoder.names)


class LinearNames:
    """The name map of one linear module."""

    def keys(self, path: str) -> list[str]:
        return {"fc/kernel": ["fc.weight"], "fc/bias": ["fc.bias"]}[path]

    def modules(self, path: str) -> list[str]:
        return ["fc"]

    def path(self, key: str) -> tuple[str, int | None, str]:
        return {"fc.weight": ("fc/kernel", None, "T"), "fc.bias": ("fc/bias", None, "")}[key]


def linear() -> Any:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"fc": torch.nn.Linear(16, 5)})


@pytest.mark.parametrize("factors", [2, 3, 4])
@pytest.mark.parametrize("size", [{"boft_block_size": 2}, {"boft_block_num": 8}])
def test_factors_are_those_of_pefts_extension(
    factors: int, size: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft's own code around a stand-in for the compiled product; without it peft cannot load."""
    monkeypatch.setattr(hf.tuners.boft.layer, "get_fbd_cuda", extension)
    size = {"boft_block_size": 0, "boft_block_num": 0, **size}
    config = hf.BOFTConfig(boft_n_butterfly_factor=factors, target_modules=["fc"], **size)
    model, x = hf.get_peft_model(linear(), config), np.random.default_rng(0).normal(size=(7, 16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "boft" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    tokens = torch.from_numpy(x.astype(np.float32))
    theirs = model.base_model.model["fc"](tokens).detach().numpy()
    fc, names = linear()["fc"], LinearNames()
    weight, offset = fc.weight.detach().numpy(), fc.bias.detach().numpy()
    params = {"fc": {"kernel": jnp.asarray(weight.T), "bias": jnp.asarray(offset)}}
    peft, state = pefts.import_hf(tmp_path, params, names)
    assert peft.config["factors"] == factors
    close(x @ np.asarray(peft.merge(params, state)["fc"]["kernel"]) + offset, theirs)

    monkeypatch.setattr(hf.tuners.boft.layer, "get_fbd_cuda", lambda: None)
    with pytest.raises(RuntimeError, match="size mismatch"):
        hf.PeftModel.from_pretrained(linear(), tmp_path)
    pefts.export_hf(tmp_path / "again", peft, state, params, names)
    fields = config_of(tmp_path / "again")
    assert fields["boft_n_butterfly_factor"] == 1
    assert fields["boft_block_size"] == (2**factors if size["boft_block_size"] else 0)
    assert fields["boft_block_num"] == (2 ** (4 - factors) if size["boft_block_num"] else 0)
    loaded = hf.PeftModel.from_pretrained(linear(), tmp_path / "again")
    close(loaded.base_model.model["fc"](tokens).detach().numpy(), theirs)


def test_a_product_that_turns_by_half_is_refused(tmp_path: Path) -> None:
    """Two quarter turns, one after the other, have no Cayley form."""
    params = {"fc": {"kernel": jnp.ones((8, 5)), "bias": jnp.ones(5)}}
    peft = pefts.boft(block_size=4, factors=2, targets="fc/kernel")
    state = peft.init(jax.random.key(0), params)
    turn = np.zeros((2, 2, 4, 4), np.float32)
    turn[:, 0, 0, 1] = 2.0
    state.trainable["fc/kernel"]["A"] = jnp.asarray(turn)
    with pytest.raises(ValueError, match="2 factors of 'fc' .*half a turn.*CUDA"):
        pefts.export_hf(tmp_path, peft, state, params, LinearNames())


@pytest.mark.parametrize("name", ["oft", "boft"])
def test_biases_beside_rotations_are_refused(name: str, encoder: Pair, tmp_path: Path) -> None:
    refused(
        encoder,
        lambda axes: pefts.chain(pefts.bitfit(), pefts.METHODS[name](4, axes=axes)),
        f"peft stores none beside {name.upper()}",
        tmp_path,
    )


@pytest.mark.parametrize("name", ["oft", "boft"])
def test_convolutions_are_cut_otherwise_by_peft(name: str, tmp_path: Path) -> None:
    class ConvNames(LinearNames):
        def path(self, key: str) -> tuple[str, int | None, str]:
            return {"fc.weight": ("fc/kernel", None, "conv"), "fc.bias": ("fc/bias", None, "")}[key]

    params = {"fc": {"kernel": jnp.ones((2, 2, 3, 5)), "bias": jnp.ones(5)}}
    peft = pefts.METHODS[name](2, targets="kernel", axes={"kernel": "kkio"})
    state = peft.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match=f"peft's {name.upper()} cuts the inputs of a convolution"):
        pefts.export_hf(tmp_path, peft, state, params, ConvNames())


def test_ranks_of_hira_are_those_of_its_tensors(encoder: Pair, tmp_path: Path) -> None:
    """peft reads no rank_pattern: it makes every module of rank r, and its files say otherwise."""
    trained_by_peft(encoder, IMPORTS["hira and patterns"](), tmp_path)
    assert {min(tensor.shape) for tensor in tensors_of(tmp_path).values()} == {4}
    peft, state = made(encoder, EXPORTS["hira and patterns"])
    shapes = {path: group["A"].shape[-1] for path, group in state.trainable.items()}
    assert set(shapes.values()) == {2, 4}
    pefts.export_hf(tmp_path / "ours", peft, state, encoder.params, encoder.names)
    ours = [t for key, t in tensors_of(tmp_path / "ours").items() if "hira" in key]
    assert {min(tensor.shape) for tensor in ours} == {4}
    assert config_of(tmp_path / "ours")["rank_pattern"] == {}

    def cut(tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if "layer.2" in key and "query" in key]:
            short = tensors[key][:2] if key.endswith("A") else tensors[key][:, :2]
            tensors[key] = np.ascontiguousarray(short)
        for key in [key for key in tensors if "value" in key]:
            short = tensors[key][:3] if key.endswith("A") else tensors[key][:, :3]
            tensors[key] = np.ascontiguousarray(short)

    peft, state = pefts.import_hf(edit(tmp_path, cut), encoder.params, encoder.names)
    shapes = {path.split("/")[-2]: group["A"].shape for path, group in state.trainable.items()}
    assert shapes == {"query": (3, 12, 4), "value": (3, 12, 3)}
    query = next(group for path, group in state.trainable.items() if "query" in path)
    assert not np.asarray(query["A"][2, :, 2:]).any() and not np.asarray(query["B"][2, 2:]).any()
    edit(tmp_path, lambda tensors: tensors.pop(min(tensors)))
    with pytest.raises(ValueError, match=r"missing \['hira_A'\]"):
        pefts.import_hf(tmp_path, encoder.params, encoder.names)


def test_a_hira_of_zeros_is_no_adapter(encoder: Pair, tmp_path: Path) -> None:
    peft, state = made(encoder, EXPORTS["hira"])
    zeros = jax.tree.map(jnp.zeros_like, state)
    with pytest.raises(ValueError, match="every A and B of this state is zero"):
        pefts.export_hf(tmp_path, peft, zeros, encoder.params, encoder.names)
    for group in state.trainable.values():
        group.update({name: leaf.at[1].set(0.0) for name, leaf in group.items()})
    pefts.export_hf(tmp_path, peft, state, encoder.params, encoder.names)
    assert not any("layer.1." in key for key in tensors_of(tmp_path))
    close(run(encoder, peft, state), encoder.opened(tmp_path))


def test_convolutions_of_hira_travel_both_ways(tmp_path: Path) -> None:
    class ConvNames(LinearNames):
        def path(self, key: str) -> tuple[str, int | None, str]:
            return {"fc.weight": ("fc/kernel", None, "conv"), "fc.bias": ("fc/bias", None, "")}[key]

    def fresh() -> Any:
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"fc": torch.nn.Conv2d(6, 5, (2, 3))})

    def ours(conv: Any) -> np.ndarray:
        return conv.weight.detach().numpy().transpose(2, 3, 1, 0)

    model = hf.get_peft_model(fresh(), hf.HiraConfig(r=3, target_modules=["fc"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hira" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    base = fresh()["fc"]
    params = {"fc": {"kernel": jnp.asarray(ours(base)), "bias": jnp.zeros(5)}}
    peft, state = pefts.import_hf(tmp_path, params, ConvNames())
    merged = model.merge_and_unload()["fc"]
    assert np.abs(ours(merged) - ours(base)).max() > 1e-3
    close(np.asarray(peft.merge(params, state)["fc"]["kernel"]), ours(merged))
    pefts.export_hf(tmp_path / "again", peft, state, params, ConvNames())
    original, written = tensors_of(tmp_path), tensors_of(tmp_path / "again")
    assert set(original) == set(written)
    for key, value in original.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
