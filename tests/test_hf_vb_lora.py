"""VB-LoRA exchanged with Hugging Face PEFT, on a tiny BERT, in both directions."""

from pathlib import Path
from typing import Any

import hf_pair
import jax
import numpy as np
import pytest
from hf_pair import PEFT_NOISE, Pair, close, hf, made, trained_by_peft

import pefts

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)
SIZES = {"vectors": 9, "length": 4}


@pytest.fixture(scope="module")
def pair() -> Pair:
    return hf_pair.bare()


def config(**options: Any) -> Any:
    given = {"r": 3, "num_vectors": 9, "vector_length": 4, "init_vector_bank_bound": 0.5}
    return hf.VBLoRAConfig(**(given | {"target_modules": ["query", "output.dense"]} | options))


@pytest.mark.parametrize("options", [{}, {"top": 4, "targets": r"query|intermediate"}])
def test_peft_computes_what_we_compute(options: Any, pair: Pair, tmp_path: Path) -> None:
    peft, state = made(pair, lambda axes: pefts.vb_lora(rank=3, axes=axes, **SIZES, **options))
    pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
    ours = pair.run(peft, state)
    assert np.abs(ours - pair.run_torch(pair.base())).max() > 1e-2
    close(ours, pair.opened(tmp_path))
    close(pair.run(*pefts.import_hf(tmp_path, pair.params, pair.names)), ours)


@pytest.mark.parametrize("options", [{}, {"topk": 3, "target_modules": ["value"]}])
def test_we_compute_what_peft_computes(options: Any, pair: Pair, tmp_path: Path) -> None:
    theirs = trained_by_peft(pair, config(**options), tmp_path)
    assert np.abs(theirs - pair.run_torch(pair.base())).max() > 1e-2
    peft, state = pefts.import_hf(tmp_path, pair.params, pair.names)
    close(pair.run(peft, state), theirs)
    again = tmp_path / "again"
    pefts.export_hf(again, peft, state, pair.params, pair.names)
    close(pair.opened(again), theirs)


def test_layers_one_by_one_can_be_left_alone_and_stacked_ones_not(
    pair: Pair, tmp_path: Path
) -> None:
    theirs = trained_by_peft(pair, config(layers_to_transform=[1]), tmp_path)
    with pytest.raises(ValueError, match=r"leaves 'encoder.layer.0.* stacked must be adapted to"):
        pefts.import_hf(tmp_path, pair.params, pair.names)
    single = hf_pair.unrolled()
    close(single.run(*pefts.import_hf(tmp_path, single.params, single.names)), theirs)


def test_files_without_the_logits_are_refused(pair: Pair, tmp_path: Path) -> None:
    trained_by_peft(pair, config(save_only_topk_weights=True), tmp_path)
    message = "save_only_topk_weights=True cannot be imported: .* lacks the logits"
    with pytest.raises(ValueError, match=message):
        pefts.import_hf(tmp_path, pair.params, pair.names)


def test_what_peft_cannot_represent_is_not_exported(pair: Pair, tmp_path: Path) -> None:
    for options, message in (
        ({"rank_pattern": {"query": 2}}, "rank_pattern=.* one rank for all modules"),
        (
            {"targets": "token_type_embeddings", "length": 2},
            "linear modules alone, and '.*token_type_embeddings",
        ),
    ):
        given = {"rank": 2, "axes": pair.axes, **SIZES, **options}
        peft = pefts.vb_lora(**given)
        state = peft.init(jax.random.key(0), pair.params)
        with pytest.raises(ValueError, match=message):
            pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
