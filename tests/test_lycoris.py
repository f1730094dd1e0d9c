"""LoHa and LoKr exchanged with Hugging Face PEFT itself: linear modules and convolutions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_pair
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
from pefts.methods.lokr import divisors

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)
PATTERNS = {
    "rank_pattern": {"query": 1},
    "alpha_pattern": {"query": 7.0, "value": 1.5},
    "targets": "query|key|value|mlp",
}
EXPORTS: dict[str, Callable[[Any], pefts.Peft]] = {
    "loha": lambda axes: pefts.loha(2, alpha=5.0, axes=axes),
    "loha patterns": lambda axes: pefts.loha(3, alpha=5.0, axes=axes, **PATTERNS),
    "lokr": lambda axes: pefts.lokr(2, alpha=5.0, axes=axes),
    "lokr patterns": lambda axes: pefts.lokr(3, alpha=5.0, axes=axes, **PATTERNS),
    "lokr both": lambda axes: pefts.lokr(
        1, alpha=5.0, decompose_factor=4, decompose_both=True, axes=axes
    ),
}
TARGETS = {"target_modules": ["query", "intermediate.dense"]}
IMPORTS: dict[str, Callable[[], Any]] = {
    "loha": lambda: hf.LoHaConfig(r=3, alpha=5, **TARGETS),
    "loha patterns": lambda: hf.LoHaConfig(
        r=3,
        alpha=5,
        rank_pattern={"query": 2},
        alpha_pattern={"1.attention.self.query": 2},
        **TARGETS,
    ),
    "loha in some layers": lambda: hf.LoHaConfig(
        r=2, layers_to_transform=[0, 2], layers_pattern="layer", **TARGETS
    ),
    "lokr": lambda: hf.LoKrConfig(r=8, alpha=5, **TARGETS),
    "lokr, low rank": lambda: hf.LoKrConfig(r=2, alpha=3, init_weights="lycoris", **TARGETS),
    "lokr, both": lambda: hf.LoKrConfig(
        r=1, decompose_both=True, decompose_factor=4, init_weights=False, **TARGETS
    ),
    "lokr, a factor that divides nothing": lambda: hf.LoKrConfig(
        r=2, decompose_factor=7, layers_to_transform=[1], layers_pattern="layer", **TARGETS
    ),
}


@pytest.fixture(scope="module")
def pair() -> Pair:
    return hf_pair.bare()


def test_divisors_are_those_of_peft() -> None:
    theirs = hf.tuners.lokr.layer.factorization
    for side in (1, 2, 7, 12, 24, 40, 128, 250, 384, 768, 1024, 1536, 11008):
        for factor in (None, 1, 2, 4, 6, 8, 16, 100, 128):
            expected = theirs(side, -1 if factor is None else factor)
            assert divisors(side, factor) == tuple(expected), (side, factor)


@pytest.mark.parametrize("name", EXPORTS)
def test_peft_computes_what_we_compute(name: str, pair: Pair, tmp_path: Path) -> None:
    peft, state = made(pair, EXPORTS[name])
    pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
    outputs = pair.run(peft, state)
    assert np.abs(outputs - pair.run_torch(pair.base())).max() > 1e-2
    close(outputs, pair.opened(tmp_path))
    again, restored = pefts.import_hf(tmp_path, pair.params, pair.names)
    close(pair.run(again, restored), outputs)
    for field in ("method", "rank", "alpha", "decompose_factor", "decompose_both"):
        assert again.config.get(field) == peft.config.get(field)


@pytest.mark.parametrize("name", IMPORTS)
def test_we_compute_what_peft_computes(name: str, pair: Pair, tmp_path: Path) -> None:
    theirs = trained_by_peft(pair, IMPORTS[name](), tmp_path)
    assert np.abs(theirs - pair.run_torch(pair.base())).max() > 1e-2
    peft, state = pefts.import_hf(tmp_path, pair.params, pair.names)
    close(pair.run(peft, state), theirs)
    pefts.export_hf(tmp_path / "again", peft, state, pair.params, pair.names)
    close(pair.opened(tmp_path / "again"), theirs)
    original, written = tensors_of(tmp_path), tensors_of(tmp_path / "again")
    assert set(original) == set(written)
    for key, value in original.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)


class ConvNames:
    """The name map of one convolution, in our layout and torch's."""

    def keys(self, path: str) -> list[str]:
        return ["conv.weight"]

    def path(self, key: str) -> tuple[str, int | None, str]:
        return "conv/kernel", None, "conv"


def conv2d() -> Any:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"conv": torch.nn.Conv2d(6, 8, (2, 3))})


def conv1d() -> Any:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"conv": torch.nn.Conv1d(6, 8, 3)})


def flax_kernel(conv: Any) -> np.ndarray:
    return np.moveaxis(conv.weight.detach().numpy(), (0, 1), (-1, -2))


@pytest.mark.parametrize(
    ("kind", "options", "base"),
    [
        ("LoHaConfig", {"r": 2}, conv2d),
        ("LoHaConfig", {"r": 2}, conv1d),
        ("LoKrConfig", {"r": 8}, conv2d),
        ("LoKrConfig", {"r": 1}, conv2d),
        ("LoKrConfig", {"r": 1, "decompose_both": True, "decompose_factor": 2}, conv1d),
    ],
)
def test_convolutions_travel_both_ways(kind: str, options: Any, base: Any, tmp_path: Path) -> None:
    names, axes = ConvNames(), {"conv": "k" * (base()["conv"].weight.ndim - 2) + "io"}
    model = hf.get_peft_model(base(), getattr(hf, kind)(target_modules=["conv"], **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    W = flax_kernel(base()["conv"])
    params = {"conv": {"kernel": jnp.asarray(W)}}
    peft, state = pefts.import_hf(tmp_path, params, names, axes=axes)
    merged = flax_kernel(model.merge_and_unload()["conv"])
    assert np.abs(merged - W).max() > 1e-2
    close(np.asarray(peft.merge(params, state)["conv"]["kernel"]), merged)
    pefts.export_hf(tmp_path / "again", peft, state, params, names)
    original, written = tensors_of(tmp_path), tensors_of(tmp_path / "again")
    assert set(original) == set(written)
    for key, value in original.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)


def test_a_whole_product_of_a_conv1d_is_refused(tmp_path: Path) -> None:
    """peft's own depends on the order of axes that torch.kron makes of matrices and cubes."""
    model = hf.get_peft_model(conv1d(), hf.LoKrConfig(r=8, target_modules=["conv"]))
    model.save_pretrained(tmp_path)
    params = {"conv": {"kernel": jnp.asarray(flax_kernel(conv1d()["conv"]))}}
    with pytest.raises(ValueError, match="Kronecker product of the Conv1d 'conv'"):
        pefts.import_hf(tmp_path, params, ConvNames(), axes={"conv": "kio"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_dropout": 0.1}, "rank_dropout=0.1 cannot be imported.*in training alone"),
        ({"module_dropout": 0.1}, "module_dropout=0.1 cannot be imported"),
        ({"use_effective_conv2d": True}, "use_effective_conv2d=True cannot be imported"),
        ({"r": 4}, r"hada_w1_b has shape \(3, 12\) in the file; .* \(4, 12\)"),
        (
            {"rank_pattern": {"0.attention.self.query": 2}},
            r"stacked in one leaf, the ranks \[2, 3\]",
        ),
    ],
)
def test_what_cannot_be_imported_is_named(
    fields: dict[str, Any], message: str, pair: Pair, tmp_path: Path
) -> None:
    trained_by_peft(pair, IMPORTS["loha"](), tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        pefts.import_hf(tmp_path, pair.params, pair.names)


def test_what_cannot_be_exported_is_named(pair: Pair, tmp_path: Path) -> None:
    for method, message in (
        (pefts.loha, "LOHA adapts torch's Linear, Conv1d and Conv2d alone"),
        (pefts.lokr, "LOKR adapts torch's Linear, Conv1d and Conv2d alone"),
    ):
        peft, state = made(pair, lambda axes, m=method: m(2, targets="word_embed", axes=axes))
        with pytest.raises(ValueError, match=message):
            pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
    peft, state = made(pair, EXPORTS["loha"])
    zeros = state._replace(trainable={p: _zeros(g) for p, g in state.trainable.items()})
    with pytest.raises(ValueError, match="every factor of this state is zero"):
        pefts.export_hf(tmp_path, peft, zeros, pair.params, pair.names)


def _zeros(group: Any) -> Any:
    return {name: jnp.zeros_like(leaf) for name, leaf in group.items()}


def test_the_config_has_the_fields_of_its_type(pair: Pair, tmp_path: Path) -> None:
    """peft warns of any other."""
    for name, kind in (("loha", hf.LoHaConfig), ("lokr both", hf.LoKrConfig)):
        folder = tmp_path / name
        peft, state = made(pair, EXPORTS[name])
        pefts.export_hf(folder, peft, state, pair.params, pair.names)
        loaded = hf.PeftConfig.from_pretrained(folder)
        assert type(loaded) is kind
        written = json.loads((folder / "adapter_config.json").read_text())
        assert not set(written) - set(loaded.to_dict())
        assert config_of(folder)["alpha"] == 5
