"""MiSS, Bat and mini beyond the table: cost, official golden vectors, Hugging Face's files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import hf_pair
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hf_pair import PEFT_NOISE, Pair, close, config_of, hf, made, tensors_of, trained_by_peft

import pefts
from pefts.methods.miss import group_sums

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "official" / "bone_bat" / "golden.npz"
D_IN, D_OUT = 12, 20
FORMS: dict[str, dict[str, Any]] = {
    "miss": {"rank": 5},
    "bat": {"rank": 4, "form": "bat"},
    "mini": {"rank": 5, "form": "mini", "mini_rank": 4},
}
pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)


def problem(key: jax.Array, **kwargs: Any) -> tuple:
    model = nn.Dense(D_OUT)
    x = jax.random.normal(jax.random.fold_in(key, 1), (6, D_IN))
    params = model.init(key, x)["params"]
    peft = pefts.miss(targets="kernel", **kwargs)
    return model, x, params, peft, pefts.randomize(key, peft.init(key, params))


def test_sums_over_groups_are_a_stack_of_identities(key):
    """The last group may be shorter."""
    x = jax.random.normal(key, (3, 2, 13))
    stacked = np.tile(np.eye(5), (3, 1))[:13]
    np.testing.assert_allclose(group_sums(x, 5), x @ stacked, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["miss", "mini"])
def test_the_update_repeats_its_tile(key, form):
    _, _, params, peft, state = problem(key, **FORMS[form])
    delta = np.asarray(peft.merge(params, state)["kernel"] - params["kernel"], np.float64)
    D = np.asarray(state.trainable["kernel"]["D"])
    tiled = np.tile(D, (3, D_OUT // D.shape[1]))[:D_IN]
    np.testing.assert_allclose(delta, tiled, atol=1e-6)
    assert np.linalg.matrix_rank(delta, tol=1e-4) == min(D.shape)


def test_bats_update_depends_on_the_kernel(key):
    """(I + C_b) W_ab + C_b, so that twice the kernel has another update, and zero has C_b alone."""
    _, _, params, peft, state = problem(key, **FORMS["bat"])
    C = np.asarray(state.trainable["kernel"]["C"])

    def update(scale: float) -> np.ndarray:
        kernel = {"kernel": scale * params["kernel"]}
        return np.asarray(peft.merge(kernel, state)["kernel"] - kernel["kernel"])

    np.testing.assert_allclose(update(0.0), np.tile(np.concatenate(list(C), axis=1), (3, 1)))
    linear_part = update(1.0) - update(0.0)
    np.testing.assert_allclose(update(2.0) - update(0.0), 2 * linear_part, atol=1e-5)
    assert np.abs(linear_part).max() > 0.05


def cost(peft: pefts.Peft, params: Any, model: nn.Module, x: jax.Array) -> float:
    """Floating-point operations of the adapted model's forward pass and adapter gradients."""
    state = jax.eval_shape(peft.init, jax.random.key(0), params)

    def loss(trainable: Any, params: Any, x: jax.Array) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=trainable))
        return jnp.sum(pefts.apply(model.apply)({"params": bound}, x))

    frozen = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state.frozen)
    state = state._replace(frozen=frozen)
    lowered = jax.jit(jax.grad(loss)).lower(state.trainable, params, x)
    return lowered.compile().cost_analysis()["flops"]


def test_sums_cost_less_than_a_lora(key):
    model, x = nn.Dense(96), jnp.ones((256, 128))
    params = jax.eval_shape(model.init, key, x)["params"]
    lora = cost(pefts.lora(rank=16, targets="kernel"), params, model, x)
    miss = cost(pefts.miss(rank=16, targets="kernel"), params, model, x)
    mini = cost(pefts.miss(16, form="mini", mini_rank=8, targets="kernel"), params, model, x)
    assert mini < miss < 0.9 * lora


@pytest.mark.parametrize("form", ["miss", "mini"])
def test_nothing_of_the_kernels_size_is_built(key, form):
    model, x, params, peft, state = problem(key, **FORMS[form])

    def loss(trainable: Any) -> jax.Array:
        bound = peft.bind(params, state._replace(trainable=trainable))
        return jnp.sum(pefts.apply(model.apply)({"params": bound}, x) ** 2)

    program = jax.make_jaxpr(jax.grad(loss))(state.trainable)
    sizes = [v.aval.size for equation in program.jaxpr.eqns for v in equation.outvars]
    assert max(sizes) < params["kernel"].size


def test_dropout_takes_inputs_of_the_adapter_alone(key):
    """Of a single input group, a dropped input is a row of D less."""
    model, x, params, peft, state = problem(key, rank=D_IN, dropout=0.5)
    variables = {"params": peft.bind(params, state)}
    one = jnp.zeros((1, D_IN)).at[0, 3].set(2.0)
    base = model.apply({"params": params}, one)
    row = 2 * state.trainable["kernel"]["D"][3]
    seen = set()
    for seed in range(12):
        y = pefts.apply(model.apply)(variables, one, rngs={"dropout": jax.random.key(seed)})
        update = np.asarray(y - base)[0]
        seen.add(bool(np.abs(update).max() > 1e-6))
        expected = row / 0.5 if np.abs(update).max() > 1e-6 else np.zeros(D_OUT)
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-5)
    assert seen == {True, False}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["conv", "embed"])
def test_convolutions_and_embeddings_use_the_whole_kernel(key, form, kind):
    if kind == "conv":
        model, x = nn.Conv(8, (3,)), jax.random.normal(key, (2, 9, 4))
    else:
        model, x = nn.Embed(12, 8), jnp.arange(8).reshape(2, 4)
    params = model.init(key, x)["params"]
    axes = pefts.infer_axes(model.apply, params, x)
    peft = pefts.miss(targets="kernel|embedding", axes=axes, **FORMS[form])
    state = pefts.randomize(key, peft.init(key, params))
    factored = pefts.apply(model.apply)({"params": peft.bind(params, state)}, x)
    merged = model.apply({"params": peft.merge(params, state)}, x)
    np.testing.assert_allclose(factored, merged, rtol=2e-5, atol=2e-6)
    assert not np.allclose(merged, model.apply({"params": params}, x), atol=1e-2)


# --- official golden vectors: torch kernels are ours transposed, and so is every C_b ---


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("../shared/golden/official/bone_bat is not on this machine")
    return dict(np.load(GOLDEN))


def ours(form: str, block: np.ndarray) -> dict[str, jax.Array]:
    return {"C": jnp.asarray(block.swapaxes(1, 2))} if form == "bat" else {"D": jnp.asarray(block)}


@pytest.mark.parametrize("form", FORMS)
def test_golden_output_gradient_and_merge(golden, form):
    with jax.enable_x64(True):
        W, b, x, cot, y, block, grad, merged = (
            golden[f"{form}_{name}"]
            for name in ("W", "b", "x", "cot", "y", "param", "grad", "W_merged")
        )
        mini_rank = block.shape[1] if form == "mini" else None
        rank = int(golden[f"{form}_r"])
        peft = pefts.miss(rank, form=form, mini_rank=mini_rank, targets="kernel")
        params = {"kernel": jnp.asarray(W.T), "bias": jnp.asarray(b)}
        start = peft.init(jax.random.key(0), params)
        assert float(golden[f"{form}_init_max"]) == 0 == _largest(start.trainable)
        state = start._replace(trainable={"kernel": ours(form, block)})
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, start)
        model = nn.Dense(len(b), param_dtype=jnp.float64)

        def run(trainable: Any) -> jax.Array:
            bound = peft.bind(params, state._replace(trainable=trainable))
            return pefts.apply(model.apply)({"params": bound}, jnp.asarray(x))

        out, pull = jax.vjp(run, state.trainable)
        np.testing.assert_allclose(out, y, rtol=0, atol=1e-9)
        expected = {"kernel": ours(form, grad)}
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-9),
            pull(jnp.asarray(cot))[0],
            expected,
        )
        dense = peft.merge(params, state)["kernel"]
        np.testing.assert_allclose(dense, merged.T, rtol=0, atol=1e-9)


def _largest(tree: Any) -> float:
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


# --- Hugging Face PEFT ---

EXPORTS: dict[str, Callable[[Any], pefts.Peft]] = {
    "miss": lambda axes: pefts.miss(5, dropout=0.1, axes=axes),
    "bat": lambda axes: pefts.miss(4, form="bat", axes=axes),
    "mini": lambda axes: pefts.miss(5, form="mini", mini_rank=2, axes=axes),
}
IMPORTS: dict[str, dict[str, Any]] = {
    "miss": {"r": 5, "init_weights": True, "miss_dropout": 0.2},
    "random start": {"r": 7, "init_weights": False},
    "bat": {"r": 2, "init_weights": "bat"},
    "mini": {"r": 5, "init_weights": "mini", "mini_r": 4},
    "one column": {"r": 4, "init_weights": "mini"},
    "some layers": {"r": 4, "layers_to_transform": [0, 2], "layers_pattern": "layer"},
}


@pytest.fixture(scope="module")
def pair() -> Pair:
    return hf_pair.bare()


@pytest.mark.parametrize("form", EXPORTS)
def test_peft_computes_what_we_compute(form: str, pair: Pair, tmp_path: Path) -> None:
    peft, state = made(pair, EXPORTS[form])
    pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
    outputs = pair.run(peft, state)
    assert np.abs(outputs - pair.run_torch(pair.base())).max() > 1e-2
    close(outputs, pair.opened(tmp_path))
    again = pefts.import_hf(tmp_path, pair.params, pair.names)
    assert {**again[0].config, "targets": ""} == {
        **json.loads(json.dumps(peft.config)),
        "axes": again[0].config["axes"],
        "targets": "",
    }
    close(pair.run(*again), outputs)


@pytest.mark.parametrize("name", IMPORTS)
def test_we_compute_what_peft_computes(name: str, pair: Pair, tmp_path: Path) -> None:
    config = hf.MissConfig(target_modules=["query", "intermediate.dense"], **IMPORTS[name])
    theirs = trained_by_peft(pair, config, tmp_path)
    assert np.abs(theirs - pair.run_torch(pair.base())).max() > 1e-2
    peft, state = pefts.import_hf(tmp_path, pair.params, pair.names)
    close(pair.run(peft, state), theirs)
    pefts.export_hf(tmp_path / "again", peft, state, pair.params, pair.names)
    close(pair.opened(tmp_path / "again"), theirs)
    written = config_of(tmp_path / "again")
    for field in ("r", "miss_dropout"):
        assert written[field] == config_of(tmp_path)[field]


@pytest.mark.parametrize("form", ["miss", "bat"])
def test_files_under_the_old_name_are_read(form: str, pair: Pair, tmp_path: Path) -> None:
    """peft wrote bone_block, and no mini_r, before it renamed both."""
    peft, state = made(pair, EXPORTS[form])
    state = state._replace(trainable={k: v for k, v in state.trainable.items() if "query" in k})
    pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
    old = {key.replace("miss_", "bone_"): value for key, value in tensors_of(tmp_path).items()}
    safetensors.numpy.save_file(old, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    config = config_of(tmp_path) | {"peft_type": "BONE"}
    for field in ("mini_r", "miss_dropout", "peft_version"):
        del config[field]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found, restored = pefts.import_hf(tmp_path, pair.params, pair.names)
    assert (found.config["method"], found.config["form"]) == ("miss", form)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    pefts.export_hf(tmp_path / "new", found, restored, pair.params, pair.names)
    assert config_of(tmp_path / "new")["peft_type"] == "MISS"


class TransposedNames:
    """The name map of one kernel that torch keeps as we do, like GPT-2's Conv1D."""

    def keys(self, path: str) -> list[str]:
        return ["conv1d.weight"]

    def path(self, key: str) -> tuple[str, int | None, str]:
        return "conv1d/kernel", None, ""


def test_a_transposed_linear_is_none_that_peft_adapts(tmp_path: Path) -> None:
    params = {"conv1d": {"kernel": jnp.ones((8, 6))}}
    peft = pefts.miss(2)
    state = peft.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="adapts torch.nn.Linear alone, and 'conv1d/kernel'"):
        pefts.export_hf(tmp_path, peft, state, params, TransposedNames())


def test_what_cannot_be_exchanged_is_named(pair: Pair, tmp_path: Path) -> None:
    peft, state = made(pair, lambda axes: pefts.miss(4, targets="word_embeddings", axes=axes))
    with pytest.raises(ValueError, match="MiSS adapts torch.nn.Linear alone.*word_embeddings"):
        pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
    peft, state = made(pair, EXPORTS["bat"])
    pefts.export_hf(tmp_path, peft, state, pair.params, pair.names)
    for fields, message in (
        ({"init_weights": "olora"}, "init_weights='olora' cannot be imported"),
        ({"init_weights": True}, r"miss_block has shape \(3, 4, 4\) in the file; .* \(4, 12\)"),
        ({"r": 6}, r"miss_block has shape \(3, 4, 4\) in the file; .* \(2, 6, 6\)"),
    ):
        before = (tmp_path / "adapter_config.json").read_text()
        hf_pair.edit(tmp_path, **fields)
        with pytest.raises(ValueError, match=message):
            pefts.import_hf(tmp_path, pair.params, pair.names)
        (tmp_path / "adapter_config.json").write_text(before)
