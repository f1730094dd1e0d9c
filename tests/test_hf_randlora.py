"""RandLoRA exchanged with Hugging Face PEFT, on a tiny BERT, in both directions."""

from pathlib import Path
from typing import Any

import hf_pair
import jax
import numpy as np
import pytest
from hf_pair import PEFT_NOISE, Pair, close, edit, hf, tensors_of, trained_by_peft

import pefts

# peft misses the copies in each module, which are one buffer with the pair that it has found.
ONE_PAIR = r"ignore:Found missing adapter keys .*\['base_model.model[\w.]*randlora_[AB].default', "
pytestmark = [pytest.mark.filterwarnings(PEFT_NOISE), pytest.mark.filterwarnings(ONE_PAIR)]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return hf_pair.bare()


EXPORTED: tuple[dict[str, Any], ...] = (
    {},
    {"alpha": 9.0, "scaling": "hf", "bases": "sparse", "targets": r"query|intermediate"},
)
IMPORTED: tuple[dict[str, Any], ...] = (
    {"target_modules": ["query", "intermediate.dense"], "randlora_alpha": 2},
    {"target_modules": ["output.dense"], "randlora_alpha": 2, "sparse": True, "very_sparse": True},
    {
        "target_modules": ["query"],
        "randlora_alpha": 2,
        "layers_to_transform": [0, 2],
        "sparse": True,
    },
)


@pytest.mark.parametrize("options", EXPORTED)
def test_peft_computes_what_we_compute(options: Any, pair: Pair, tmp_path: Path) -> None:
    """With the official scaling too, whose 1 / sqrt(n) differs from module to module."""
    peft = pefts.randlora(rank=5, axes=pair.axes, **options)
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), pair.params))
    pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
    ours = pair.run(peft, state)
    assert np.abs(ours - pair.run_torch(pair.base())).max() > 1e-2
    close(ours, pair.opened(tmp_path))
    close(pair.run(*pefts.import_hf(tmp_path, pair.params, pair.names)), ours)


@pytest.mark.parametrize("options", IMPORTED)
def test_we_compute_what_peft_computes(options: Any, pair: Pair, tmp_path: Path) -> None:
    config = hf.RandLoraConfig(r=5, **options)
    theirs = trained_by_peft(pair, config, tmp_path)
    assert np.abs(theirs - pair.run_torch(pair.base())).max() > 1e-2
    peft, state = pefts.import_hf(tmp_path, pair.params, pair.names)
    close(pair.run(peft, state), theirs)
    again = tmp_path / "again"
    pefts.export_hf(again, peft, state, pair.params, pair.names)
    close(pair.opened(again), theirs)


def test_both_layouts_of_the_pair_are_read_and_one_is_written(pair: Pair, tmp_path: Path) -> None:
    config = hf.RandLoraConfig(r=5, randlora_alpha=2, target_modules=["query", "value"])
    theirs = trained_by_peft(pair, config, tmp_path)
    held = tensors_of(tmp_path)
    names = ("randlora_A", "randlora_B")
    ours = {f"base_model.{name}": held[f"base_model.{name}"] for name in names}
    kept = {key: value for key, value in held.items() if not key.endswith(names)}
    modules = {key.rpartition(".")[0] for key in kept}
    copies = {f"{m}.{name}": ours[f"base_model.{name}"] for m in modules for name in names}
    for layout in (ours, copies, ours | copies):
        edit(tmp_path, lambda tensors, new=layout: (tensors.clear(), tensors.update(kept | new)))
        peft, state = pefts.import_hf(tmp_path, pair.params, pair.names)
        np.testing.assert_allclose(pair.run(peft, state), theirs, rtol=1e-5, atol=1e-5)
        pefts.export_hf(tmp_path / "again", peft, state, pair.params, pair.names)
        assert set(tensors_of(tmp_path / "again")) == set(kept | ours)
    name = min(copies)
    edit(tmp_path, lambda tensors: tensors.update({name: tensors[name] + 1}))
    with pytest.raises(ValueError, match="randlora_A differs from the randlora_A of the other"):
        pefts.import_hf(tmp_path, pair.params, pair.names)
    edit(tmp_path, lambda tensors: (tensors.clear(), tensors.update(kept)))
    with pytest.raises(ValueError, match=r"missing \['randlora_A', 'randlora_B'\]"):
        pefts.import_hf(tmp_path, pair.params, pair.names)
    edit(tmp_path, save_projection=False)
    with pytest.raises(ValueError, match="save_projection=False cannot be imported: .* torch's"):
        pefts.import_hf(tmp_path, pair.params, pair.names)


def test_biases_travel_along(pair: Pair, tmp_path: Path) -> None:
    peft = pefts.chain(pefts.bitfit(), pefts.randlora(rank=5, targets="query", axes=pair.axes))
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), pair.params))
    pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
    close(pair.run(peft, state), pair.opened(tmp_path))
    again = pefts.import_hf(tmp_path, pair.params, pair.names)
    close(pair.run(*again), pair.run(peft, state))


def test_what_peft_cannot_represent_is_not_exported(pair: Pair, tmp_path: Path) -> None:
    for options, message in (
        ({"rank_pattern": {"query": 3}}, "rank_pattern=.* one rank for all modules"),
        ({"targets": "word_embeddings"}, "linear modules alone, and '.*word_embeddings"),
    ):
        peft = pefts.randlora(rank=5, axes=pair.axes, **options)
        state = peft.init(jax.random.key(0), pair.params)
        with pytest.raises(ValueError, match=message):
            pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
