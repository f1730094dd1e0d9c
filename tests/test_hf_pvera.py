"""PVeRA exchanged with Hugging Face PEFT, on a tiny BERT, in both directions."""

from pathlib import Path
from typing import Any

import hf_pair
import numpy as np
import pytest
from hf_pair import PEFT_NOISE, Pair, close, edit, hf, made, trained_by_peft

import pefts

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return hf_pair.bare()


def test_peft_computes_what_we_compute(pair: Pair, tmp_path: Path) -> None:
    peft, state = made(pair, lambda axes: pefts.pvera(rank=6, axes=axes))
    pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
    ours = pair.run(peft, state)
    assert np.abs(ours - pair.run_torch(pair.base())).max() > 1e-2
    close(ours, pair.opened(tmp_path))
    close(pair.run(*pefts.import_hf(tmp_path, pair.params, pair.names)), ours)


@pytest.mark.parametrize("options", [{}, {"layers_to_transform": [0, 2]}])
def test_we_compute_what_peft_computes(options: Any, pair: Pair, tmp_path: Path) -> None:
    """The mean, as peft does in evaluation."""
    config = hf.PveraConfig(r=6, target_modules=["query", "intermediate.dense"], **options)
    theirs = trained_by_peft(pair, config, tmp_path)
    assert np.abs(theirs - pair.run_torch(pair.base())).max() > 1e-2
    peft, state = pefts.import_hf(tmp_path, pair.params, pair.names)
    close(pair.run(peft, state), theirs)
    again = tmp_path / "again"
    pefts.export_hf(again, peft, state, pair.params, pair.names)
    close(pair.opened(again), theirs)


def test_what_we_cannot_represent_is_refused(pair: Pair, tmp_path: Path) -> None:
    trained_by_peft(pair, hf.PveraConfig(r=6, target_modules=["query"]), tmp_path)
    refused: tuple[tuple[str, Any, str], ...] = (
        ("sample_at_inference", True, "sample_at_inference=True .* given a random stream"),
        ("save_projection", False, "save_projection=False .* torch's generator"),
        ("r", 5, r"pvera_A has shape \(12, 12\) in the file; .* \(10, 12\)"),
    )
    for field, value, message in refused:
        spoiled: Any = {field: value}
        with pytest.raises(ValueError, match=message):
            pefts.import_hf(edit(tmp_path, **spoiled), pair.params, pair.names)
        edit(tmp_path, sample_at_inference=False, save_projection=True, r=6)
