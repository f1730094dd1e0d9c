"""Poly exchanged with Hugging Face PEFT itself, on a tiny BERT, in both directions."""

from pathlib import Path
from typing import Any

import hf_pair
import numpy as np
import pytest
from hf_pair import PEFT_NOISE, QUERY, Pair, close, config_of, edit, hf, made, tensors_of, torch

import pefts
from pefts.methods.poly import lora_of

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)
IDS = np.array([2, 0, 1, 2])
TARGETS = r"query|intermediate"


@pytest.fixture(scope="module")
def encoder() -> Pair:
    return hf_pair.bare()


def poly(axes: Any, **options: Any) -> pefts.Peft:
    given = {"rank": 3, "skills": 2, "splits": 2, "tasks": 3, "targets": TARGETS, **options}
    return pefts.poly(**given, axes=axes)


def ours(pair: Pair, peft: pefts.Peft, state: pefts.PeftState) -> np.ndarray:
    bound = {"params": peft.bind(pair.params, state, task_ids=IDS)}
    return pair.masked(np.asarray(pefts.apply(pair.model.apply)(bound, pair.tokens, pair.mask)))


def theirs(pair: Pair, model: Any) -> np.ndarray:
    model.eval()
    tokens, mask = (torch.from_numpy(a.astype(np.int64)) for a in (pair.tokens, pair.mask))
    with torch.no_grad():
        # PeftModel.forward would go past the model that hands the ids to its layers
        out = model.base_model(
            input_ids=tokens, attention_mask=mask, task_ids=torch.from_numpy(IDS)
        )
    return pair.masked(out.last_hidden_state.numpy())


def opened(pair: Pair, folder: Path) -> np.ndarray:
    return theirs(pair, hf.PeftModel.from_pretrained(pair.base(), folder))


def trained(pair: Pair, folder: Path, **options: Any) -> np.ndarray:
    """Save an adapter that peft made, moved away from its start; what peft computes with it."""
    torch.manual_seed(1)
    given = {"r": 3, "n_skills": 2, "n_splits": 2, "n_tasks": 3, **options}
    config = hf.PolyConfig(target_modules=["query", "intermediate.dense"], **given)
    model = hf.get_peft_model(pair.base(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return theirs(pair, model)


@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_peft_computes_what_we_compute(alpha: float, encoder: Pair, tmp_path: Path) -> None:
    peft, state = made(encoder, lambda axes: poly(axes, alpha=alpha))
    pefts.export_hf(tmp_path, peft, state, encoder.params, encoder.names)
    out = ours(encoder, peft, state)
    assert np.abs(out - encoder.run_torch(encoder.base())).max() > 1e-2
    close(out, opened(encoder, tmp_path))
    again = pefts.import_hf(tmp_path, encoder.params, encoder.names)
    close(ours(encoder, *again), out)
    assert again[0].config["alpha"] == 1.0


@pytest.mark.parametrize("options", [{}, {"n_splits": 1, "n_skills": 3, "r": 2}])
def test_we_compute_what_peft_computes(options: Any, encoder: Pair, tmp_path: Path) -> None:
    expected = trained(encoder, tmp_path, **options)
    assert np.abs(expected - encoder.run_torch(encoder.base())).max() > 1e-2
    peft, state = pefts.import_hf(tmp_path, encoder.params, encoder.names)
    close(ours(encoder, peft, state), expected)
    pefts.export_hf(tmp_path / "again", peft, state, encoder.params, encoder.names)
    original, written = tensors_of(tmp_path), tensors_of(tmp_path / "again")
    assert set(original) == set(written)
    for key, value in original.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    fields = ("r", "n_tasks", "n_skills", "n_splits", "poly_type", "peft_type", "init_weights")
    before, after = config_of(tmp_path), config_of(tmp_path / "again")
    assert {f: after[f] for f in fields} == {f: before[f] for f in fields}


def test_a_layer_without_tensors_is_left_alone(encoder: Pair, tmp_path: Path) -> None:
    trained(encoder, tmp_path)
    gone = QUERY.format(1)

    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if gone in name]:
            del tensors[name]

    modules = [QUERY.format(n) for n in (0, 2)]
    modules += [f"encoder.layer.{n}.intermediate.dense" for n in range(3)]
    edit(tmp_path, drop, target_modules=modules)
    close(
        ours(encoder, *pefts.import_hf(tmp_path, encoder.params, encoder.names)),
        opened(encoder, tmp_path),
    )


def test_a_lora_of_one_task_is_that_task(encoder: Pair, tmp_path: Path) -> None:
    """What lora_of makes of an imported adapter, opened by peft as a LoRA."""
    expected = trained(encoder, tmp_path)
    peft, state = pefts.import_hf(tmp_path, encoder.params, encoder.names)
    lora, converted = lora_of(peft, state, encoder.params, task=2)
    pefts.export_hf(tmp_path / "lora", lora, converted, encoder.params, encoder.names)
    out = encoder.opened(tmp_path / "lora")
    close(out[IDS == 2], expected[IDS == 2])
    assert np.abs(out[IDS == 0] - expected[IDS == 0]).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": 1}, "task=1: peft's Poly is told the task at every call"),
        ({"task": "uniform"}, "task='uniform': peft's Poly"),
        ({"rank_pattern": {"query": 2}}, "one rank for all modules, .*query.*: 2"),
        ({"targets": "word_embeddings", "splits": 1}, "torch.nn.Linear alone, .*word_embeddings"),
    ],
)
def test_what_peft_cannot_say_is_refused(
    options: Any, message: str, encoder: Pair, tmp_path: Path
) -> None:
    peft, state = made(encoder, lambda axes: poly(axes, **options))
    with pytest.raises(ValueError, match=message):
        pefts.export_hf(tmp_path, peft, state, encoder.params, encoder.names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"poly_type": "moe"}, "poly_type='moe' cannot be imported"),
        ({"n_tasks": 4}, r"module_logits has shape \(3, 4\) in the file; .* \(4, 4\)"),
        ({"n_splits": 1}, r"poly_lora_A has shape \(2, 2, 6, 3\) in the file"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    fields: Any, message: str, encoder: Pair, tmp_path: Path
) -> None:
    trained(encoder, tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        pefts.import_hf(tmp_path, encoder.params, encoder.names)
