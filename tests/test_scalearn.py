"""ScaLearn beyond the table: its four forms, sources and their files, one adapter of them all."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import safetensors.numpy
import tiny
from cases import CASES, Case, slices
from conformance import (
    counts_its_parameters,
    gradients_flow,
    matches_oracle,
    random_state_changes_outputs,
    saves_and_loads,
    scanned_equals_unrolled,
    trains_only_trainable,
)
from safetensors import safe_open
from subject import base_inputs, base_params, model_axes, subject_of

import pefts
from pefts.methods.scalearn import FORMS, to_bottleneck

ROW = next(row for row in CASES if row.method == "scalearn")
KERNEL = "mlp/output/kernel"


class Net(nn.Module):
    """A block whose second feed-forward kernel is 6 x 8, and a head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        class Mlp(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                return nn.Dense(8, name="output")(jnp.tanh(nn.Dense(6, name="intermediate")(x)))

        return nn.Dense(3, name="classifier")(Mlp(name="mlp")(x))


@dataclasses.dataclass(frozen=True)
class Sources:
    """Three adapters of different widths on one base, in files."""

    params: Any
    x: jax.Array
    files: list[str]
    states: list[pefts.PeftState]

    def run(self, peft: pefts.Peft, state: pefts.PeftState) -> jax.Array:
        return pefts.apply(Net().apply)({"params": peft.bind(self.params, state)}, self.x)

    def build(self, **kwargs: Any) -> pefts.Peft:
        return pefts.scalearn(**{"sources": self.files, **kwargs})


def adapter(width: int, **kwargs: Any) -> pefts.Peft:
    return pefts.bottleneck(width, **{"placement": "pfeiffer", "scale": width / 2.0, **kwargs})


def saved(file: Path, peft: pefts.Peft, params: Any, seed: int = 0) -> tuple[str, pefts.PeftState]:
    """A file of an adapter away from its start."""
    state = pefts.randomize(jax.random.key(seed), peft.init(jax.random.key(9), params), 0.5)
    pefts.save(file, peft, state, params)
    return str(file), state


@pytest.fixture
def sources(key: jax.Array, tmp_path: Path) -> Sources:
    x = jax.random.normal(key, (5, 4))
    params = Net().init(key, x)["params"]
    made = [saved(tmp_path / f"{n}", adapter(n + 1), params, n) for n in range(3)]
    return Sources(params, x, [file for file, _ in made], [state for _, state in made])


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def with_omega(state: pefts.PeftState, omega: Any) -> pefts.PeftState:
    (path,) = state.trainable
    return state._replace(trainable={path: {"omega": jnp.asarray(omega, jnp.float32)}})


# --- the four forms ---


SHARED = {"plus", "plus_uniform"}
PROPERTIES = (
    random_state_changes_outputs,
    gradients_flow,
    matches_oracle,
    trains_only_trainable,
    counts_its_parameters,
    scanned_equals_unrolled,
    saves_and_loads,
)


@pytest.mark.parametrize("form", FORMS[1:])
def test_every_form_has_the_properties_of_a_method(form: str) -> None:
    """The table has one form, as its rows are named by their arguments and files lie anywhere."""

    def formula(sites: Any) -> int:
        columns = 1 if form.endswith("uniform") else sites[0].d_out
        return 3 * columns * (1 if form in SHARED else sum(map(slices, sites)))

    case = Case(
        "scalearn",
        {**ROW.kwargs, "form": form},
        count=formula,
        output_oracle=lambda y, p, known: oracles.scalearn(
            y, p, known["omega"] if form in SHARED else p["omega"]
        ),
    )
    subject = subject_of(case)
    for prop in PROPERTIES:
        prop(subject)


@pytest.mark.parametrize(
    ("form", "published"),
    [("plain", 73_728), ("uniform", 96), ("plus", 6_144), ("plus_uniform", 8)],
)
def test_published_counts_of_roberta_base(form: str, published: int, tmp_path: Path) -> None:
    """Eight sources, twelve layers of width 768; the rest of the shapes does not matter."""
    params = {"layers": {"mlp": {"down_proj": {"kernel": jnp.ones((12, 2, 768))}}}}
    source = adapter(1, axes={"kernel": "lio"})
    file, _ = saved(tmp_path / "source", source, params)
    peft = pefts.scalearn([file] * 8, form, axes={"kernel": "lio"})
    assert pefts.count(peft.init(jax.random.key(0), params).trainable) == published
    if form == "plain":  # the paper: 0.35% of AdapterFusion's three matrices a layer
        assert round(100 * published / (3 * 768**2 * 12), 2) == 0.35


@pytest.mark.parametrize("form", FORMS)
def test_scales_start_around_two_over_the_number_of_sources(form: str, sources: Sources) -> None:
    peft = sources.build(sources=sources.files * 40, form=form)
    (group,) = peft.init(jax.random.key(0), sources.params).trainable.values()
    omega = np.asarray(group["omega"])
    assert omega.shape == (120, 1 if form.endswith("uniform") else 8)
    assert omega.mean() == pytest.approx(2 / 120, abs=5e-4)
    assert omega.std() == pytest.approx(1e-3, rel=0.25)


def test_it_starts_as_the_doubled_mean(sources: Sources) -> None:
    peft = sources.build(std=0.0)
    assert not peft.traits.identity_at_init
    state = peft.init(jax.random.key(0), sources.params)
    model = {"params": sources.params}
    hidden = Net().apply(model, sources.x, capture_intermediates=True)[1]["intermediates"]
    y = np.asarray(hidden["mlp"]["__call__"][0], np.float64)
    added = [adapted_by(n, source, y) - y for n, source in enumerate(sources.states, start=1)]
    head = {name: np.asarray(leaf) for name, leaf in sources.params["classifier"].items()}
    expected = (y + 2 / 3 * sum(added)) @ head["kernel"] + head["bias"]
    close(sources.run(peft, state), expected)


def adapted_by(width: int, state: pefts.PeftState, y: np.ndarray) -> np.ndarray:
    """What the source of this width makes of an output, by a Dense of its own."""
    eye = {"params": {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}}
    one = adapter(width, targets="kernel")
    own = pefts.PeftState(*({"kernel": group[KERNEL]} for group in state))
    bound = one.bind(eye["params"], own)
    out = pefts.apply(nn.Dense(8).apply)({"params": bound}, jnp.asarray(y, jnp.float32))
    return np.asarray(out, np.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chosen", range(3))
def test_one_hot_scales_are_a_single_adapter(chosen: int, form: str, sources: Sources) -> None:
    peft = sources.build(form=form)
    state = peft.init(jax.random.key(0), sources.params)
    width = 1 if form.endswith("uniform") else 8
    only = with_omega(state, np.eye(3)[chosen][:, None] * np.ones(width))
    expected = sources.run(adapter(chosen + 1), sources.states[chosen])
    close(sources.run(peft, only), expected)
    base = np.asarray(Net().apply({"params": sources.params}, sources.x))
    assert np.abs(np.asarray(expected) - base).max() > 0.05


def test_only_the_scales_are_trained(sources: Sources) -> None:
    state = sources.build().init(jax.random.key(0), sources.params)
    assert {name for group in state.trainable.values() for name in group} == {"omega"}
    assert set(state.frozen[KERNEL]) == {"D", "U", "b_D", "b_U", "source"}
    np.testing.assert_array_equal(state.frozen[KERNEL]["source"], [0, 1, 1, 2, 2, 2])


def test_a_head_beside_the_sources_is_left_out(sources: Sources, tmp_path: Path) -> None:
    """train.py saves a chain of the head and the adapter."""
    chained = pefts.chain(pefts.full(targets="classifier"), adapter(2))
    file, state = saved(tmp_path / "chain", chained, sources.params, 1)
    peft = sources.build(sources=[file])
    ours = with_omega(peft.init(jax.random.key(0), sources.params), np.ones((1, 8)))
    inner = pefts.PeftState(state.trainable["1"], state.frozen["1"])
    close(sources.run(peft, ours), sources.run(adapter(2), inner))


# --- one adapter ---


@pytest.mark.parametrize("form", FORMS)
def test_they_become_one_adapter(form: str, sources: Sources) -> None:
    peft = sources.build(form=form)
    state = pefts.randomize(jax.random.key(3), peft.init(jax.random.key(0), sources.params), 0.5)
    one, merged = to_bottleneck(peft, state)
    assert (one.config["method"], one.config["width"]) == ("bottleneck", 6)
    assert merged.trainable[KERNEL]["D"].shape == (8, 6)
    close(sources.run(one, merged), sources.run(peft, state))


@pytest.mark.parametrize("form", ["plain", "plus"])
def test_stacked_kernels_become_stacked_adapters(form: str, key: jax.Array, tmp_path: Path) -> None:
    """Houlsby's placement, with a width of its own at each of the two sites."""
    params, inputs, axes = base_params(), base_inputs(), model_axes(True)
    source = pefts.bottleneck(3, rank_pattern={"down": 2}, scale=0.7, axes=axes)
    files = [saved(tmp_path / f"{n}", source, params, n)[0] for n in range(2)]
    peft = pefts.scalearn(files, form, placement="houlsby", axes=axes)
    state = pefts.randomize(key, peft.init(key, params), 0.5)
    one, merged = to_bottleneck(peft, state)
    widths = {path: group["U"].shape for path, group in merged.trainable.items()}
    assert widths == {"layers/attention/out/kernel": (2, 6, 12), "layers/down/kernel": (2, 4, 12)}

    def run(peft: pefts.Peft, state: pefts.PeftState) -> jax.Array:
        bound = peft.bind(params, state)
        return jax.jit(pefts.apply(tiny.Classifier().apply))({"params": bound}, *inputs)

    close(run(one, merged), run(peft, state))
    pefts.save(tmp_path / "one", one, merged, params)
    assert pefts.load(tmp_path / "one", params)[0].config == one.config


def test_kernels_cannot_hold_it(sources: Sources) -> None:
    peft = sources.build()
    with pytest.raises(ValueError, match="cannot be merged .*scalearn.to_bottleneck makes one"):
        peft.merge(sources.params, peft.init(jax.random.key(0), sources.params))


# --- files ---


def test_a_state_needs_its_files_no_longer(sources: Sources, tmp_path: Path) -> None:
    peft = sources.build()
    state = peft.init(jax.random.key(0), sources.params)
    pefts.save(tmp_path / "target", peft, state, sources.params)
    for file in sources.files:
        Path(file).unlink()
    again, restored = pefts.load(tmp_path / "target", sources.params)
    np.testing.assert_array_equal(sources.run(again, restored), sources.run(peft, state))
    with pytest.raises(ValueError, match="0 does not exist"):
        again.init(jax.random.key(0), sources.params)


def edited(file: str, change: Any) -> str:
    """The file with its tensors changed in place."""
    with safe_open(file, "np") as handle:
        metadata, tensors = handle.metadata(), {n: handle.get_tensor(n) for n in handle.keys()}
    change(tensors)
    safetensors.numpy.save_file(tensors, file, metadata)
    return file


def refused(sources: Sources, match: str, files: list[str] | None = None, **kwargs: Any) -> None:
    peft = sources.build(**kwargs, **({} if files is None else {"sources": files}))
    with pytest.raises(ValueError, match=match):
        peft.init(jax.random.key(0), sources.params)


def test_files_of_another_kind_are_refused(sources: Sources, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    safetensors.numpy.save_file({"a": np.ones(2)}, plain)
    refused(sources, "plain was not written by pefts.save", [sources.files[0], str(plain)])
    (tmp_path / "text").write_text("{}")
    refused(sources, "text is not a complete safetensors file", [str(tmp_path / "text")])
    lora = pefts.lora(rank=2, targets="output")
    refused(sources, r"holds \['lora'\]", [saved(tmp_path / "l", lora, sources.params)[0]])
    twice = pefts.chain(adapter(1), adapter(2))
    refused(
        sources,
        r"holds \['bottleneck', 'bottleneck'\]; sources are files of one",
        [saved(tmp_path / "twice", twice, sources.params)[0]],
    )


def test_what_a_source_trained_besides_would_be_lost(sources: Sources, tmp_path: Path) -> None:
    both = pefts.chain(adapter(1), pefts.bitfit(targets="mlp"))
    file, _ = saved(tmp_path / "both", both, sources.params)
    refused(sources, "both trains 'mlp/.*/bias' beside .* which is no head", [file])


def test_a_source_of_another_base_is_refused(sources: Sources) -> None:
    other = jax.tree.map(lambda leaf: 2 * leaf, sources.params)
    with pytest.raises(ValueError, match=r"0 is an adapter for another base: .*mlp/output/kernel"):
        sources.build().init(jax.random.key(0), other)


def test_insertion_points_have_to_agree(sources: Sources, tmp_path: Path) -> None:
    wide = pefts.bottleneck(1, targets=["mlp/output", "mlp/intermediate"])
    file, _ = saved(tmp_path / "wide", wide, sources.params)
    refused(sources, "wide adapts 'mlp/intermediate/kernel' too", [sources.files[0], file])
    refused(
        sources,
        "0 does not adapt 'mlp/intermediate/kernel', which is targeted",
        [file, sources.files[0]],
        targets="mlp",
    )


def test_a_part_that_this_model_lacks_is_left_out(sources: Sources, tmp_path: Path) -> None:
    """The encoder's adapters serve without the decoder's."""
    params = {**sources.params, "decoder": {"mlp": {"output": {"kernel": jnp.ones((6, 8))}}}}
    file, state = saved(tmp_path / "pair", adapter(2), params)
    peft = sources.build(sources=[file])
    ours = with_omega(peft.init(jax.random.key(0), sources.params), np.ones((1, 8)))
    kept = pefts.PeftState(*({KERNEL: group[KERNEL]} for group in state))
    close(sources.run(peft, ours), sources.run(adapter(2), kept))


def test_shapes_are_checked_by_file_and_path(sources: Sources) -> None:
    def widen(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"trainable:{KERNEL}:U"] = np.ones((2, 9), np.float32)

    refused(
        sources,
        rf"1 holds arrays of shapes .*\(2, 9\).* for '{KERNEL}'",
        [sources.files[0], edited(sources.files[1], widen)],
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_source_that_diverged_is_refused(value: float, sources: Sources) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"trainable:{KERNEL}:D"][0, 0] = value

    refused(sources, "2 has NaN or Inf in 'trainable:mlp", [edited(sources.files[2], spoil)])


def test_activations_have_to_agree(sources: Sources, tmp_path: Path) -> None:
    file, _ = saved(tmp_path / "relu", adapter(1, activation="relu"), sources.params)
    refused(sources, "relu was trained with activation='relu', and activation='gelu'", [file])
    refused(sources, "0 was trained with activation='gelu'", activation="relu")


def test_rows_are_shared_by_kernels_of_one_width_alone(sources: Sources, tmp_path: Path) -> None:
    wide = pefts.bottleneck(1, targets=["mlp/output", "mlp/intermediate"])
    file, _ = saved(tmp_path / "wide", wide, sources.params)
    given = {"targets": "mlp"}
    several = "form='plus' shares rows .*intermediate/kernel': 6.*: 8"
    refused(sources, several, [file], form="plus", **given)
    for form, count in (("plus_uniform", 1), ("plain", 14)):
        state = sources.build(sources=[file], form=form, **given).init(
            jax.random.key(0), sources.params
        )
        assert pefts.count(state.trainable) == count
