"""Every low-rank method of the table as a LoRA on the untouched base: here, and in peft itself."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hf_pair
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from conformance import FLOAT32, close
from hf_pair import PEFT_NOISE, Pair, config_of, hf, tensors_of
from subject import row_id

import pefts
from pefts import core
from pefts.convert import direction_of
from pefts.registry import declare

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)


def is_low_rank(case: Case) -> bool:
    """Whether its kernels are sums of W and a product, or DoRAs of such sums."""
    config = {"method": case.method, **case.kwargs}
    return declare(direction_of(config) or config).rule.factors is not None


ROWS = [case for case in CASES if is_low_rank(case) and case.method != "lora"]
RESIDUAL = ("corda", "olora", "pissa")


@pytest.fixture(scope="module")
def pair() -> Pair:
    return hf_pair.bare()


def initial(peft: pefts.Peft, pair: Pair) -> pefts.PeftState:
    needs = set(peft.traits.needs) - {core.CONTEXT}
    stats = statistics(tuple(sorted(needs)), peft.traits.components) if needs else None
    return peft.init(jax.random.key(0), pair.params, stats)


@functools.cache
def statistics(needs: tuple[str, ...], components: int) -> Any:
    """Of the bare encoder, on its own tokens."""
    pair = hf_pair.bare()
    return pefts.calibrate(
        lambda variables, tokens: pair.model.apply(variables, tokens, pair.mask),
        pair.params,
        [pair.tokens],
        axes=pair.axes,
        collect=needs,
        components=components or None,
        loss=(lambda hidden, _: jnp.mean(hidden**2)) if set(needs) & set(core.GRADIENTS) else None,
    )


class Adapter(NamedTuple):
    peft: pefts.Peft
    state: pefts.PeftState
    outputs: np.ndarray  # of the adapted encoder


@pytest.fixture(params=ROWS, ids=row_id, scope="module")
def adapter(request: pytest.FixtureRequest, pair: Pair) -> Adapter:
    """A row's method on the bare encoder, away from where it starts."""
    peft = pefts.METHODS[request.param.method](**request.param.kwargs, axes=pair.axes)
    state = pefts.randomize(jax.random.key(1), initial(peft, pair), scale=0.1)
    return Adapter(peft, state, pair.run(peft, state))


def test_the_rows_are_those_of_low_rank_methods() -> None:
    found = {case.method for case in ROWS}
    assert found >= {*RESIDUAL, "dora"}
    assert not found & {"adalora", "full", "sara", "vera"}


def test_a_lora_computes_the_same(adapter: Adapter, pair: Pair) -> None:
    peft, state, outputs = adapter
    assert np.abs(outputs - pair.run_torch(pair.base())).max() > 1e-2
    lora, converted = pefts.to_lora(peft, state, pair.params)
    assert lora.config["method"] == ("dora" if direction_of(peft.config) else "lora")
    close(pair.run(lora, converted), outputs, FLOAT32, "outputs of the LoRA")


def test_peft_computes_the_same_on_the_untouched_base(
    adapter: Adapter, pair: Pair, tmp_path: Path
) -> None:
    peft, state, outputs = adapter
    pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
    config = config_of(tmp_path)
    # Any other value makes peft start the adapter anew, and some of them change the base then.
    assert config["init_lora_weights"] is True
    assert config["use_dora"] == bool(direction_of(peft.config))
    assert config["peft_type"] == "LORA"
    base = pair.base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = hf.PeftModel.from_pretrained(base, tmp_path)
    close(outputs, pair.run_torch(model), FLOAT32, "outputs against peft's")
    after = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.base_model.model.state_dict().items()
        if ".lora_" not in name
    }
    assert before.keys() == after.keys()
    assert all(bool((before[name] == after[name]).all()) for name in before)


def test_a_saved_file_gives_the_same_outputs_on_the_original_base(
    adapter: Adapter, pair: Pair, tmp_path: Path
) -> None:
    """What a method took over from the base is in the file, not in the base."""
    peft, state, outputs = adapter
    file = tmp_path / "adapter.safetensors"
    pefts.save(file, peft, state, pair.params)
    np.testing.assert_array_equal(pair.run(*pefts.load(file, pair.params)), outputs)


PATTERNS: dict[str, Callable[..., pefts.Peft]] = {
    "pissa": functools.partial(pefts.pissa, rank=3, alpha=5.0),
    "olora": functools.partial(pefts.olora, rank=3, alpha=5.0),
    "dora": functools.partial(pefts.dora, direction={"method": "pissa", "rank": 3}),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_ranks_and_scales_of_their_own_reach_the_file(name: str, tmp_path: Path) -> None:
    """Beside a head that is trained outright."""
    pair = hf_pair.classifier()
    patterns = {"rank_pattern": {"query": 1}, "alpha_pattern": {"query|value": 7.0}}
    low_rank = PATTERNS[name](axes=pair.axes, **patterns)
    peft = pefts.chain(low_rank, pefts.full(targets="classifier"))
    state = peft.init(jax.random.key(0), pair.params)
    state = pefts.randomize(jax.random.key(1), state, scale=0.1)
    pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
    assert set(config_of(tmp_path)["rank_pattern"].values()) == {2}
    ours = pair.run(peft, state)
    close(ours, pair.opened(tmp_path), FLOAT32, "outputs against peft's")
    again = pefts.import_hf(tmp_path, pair.params, pair.names)
    close(pair.run(*again), ours, FLOAT32, "outputs of what was exported")


@pytest.mark.parametrize("name", RESIDUAL)
def test_the_rank_is_doubled_up_to_the_smaller_side(name: str, pair: Pair, tmp_path: Path) -> None:
    method = pefts.METHODS[name]
    for rank, doubled in ((5, 10), (7, 12)):
        peft = method(rank=rank, alpha=3.0, targets="query", axes=pair.axes)
        state = pefts.randomize(jax.random.key(1), initial(peft, pair), scale=0.1)
        pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
        config = config_of(tmp_path)
        assert (config["r"], config["lora_alpha"]) == (doubled, doubled)
        shapes = {tensor.shape for tensor in tensors_of(tmp_path).values()}
        assert shapes == {(doubled, 12), (12, doubled)}
        close(pair.run(peft, state), pair.opened(tmp_path), FLOAT32, "outputs against peft's")


def test_two_methods_on_one_kernel_are_no_lora(pair: Pair) -> None:
    low_rank = pefts.pissa(rank=2, targets="query", axes=pair.axes)
    peft = pefts.chain(low_rank, pefts.bottleneck(width=3, targets="query", axes=pair.axes))
    state = peft.init(jax.random.key(0), pair.params)
    with pytest.raises(ValueError, match="bottleneck does not change .* by a low-rank product"):
        pefts.to_lora(peft, state, pair.params)


def test_compositions_inside_compositions_keep_every_part(pair: Pair) -> None:
    low_rank = pefts.pissa(rank=2, targets="query", axes=pair.axes)
    inner = pefts.chain(pefts.full(targets="key"), low_rank)
    peft = pefts.chain(inner, pefts.bitfit())
    state = pefts.randomize(jax.random.key(1), peft.init(jax.random.key(0), pair.params))
    lora, converted = pefts.to_lora(peft, state, pair.params)
    assert [member["method"] for member in lora.config["members"]] == ["chain", "bitfit"]
    close(pair.run(lora, converted), pair.run(peft, state), FLOAT32, "outputs of the LoRA")
