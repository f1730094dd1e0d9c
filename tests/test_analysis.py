"""Intruder dimensions, spectra and their report, against numpy and the released code's numbers."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl import flags
from absl.testing import flagsaver
from ml_collections import ConfigDict

import eval as evaluation
import pefts
from configs.minilm_stdlib_docs_lora import get_config
from pefts import analysis, linalg, paths
from training import analysis as run_analysis
from training import checkpoint, experiment

GOLDEN = Path(__file__).parents[2] / "shared/golden/official/intruder_dimensions/golden.npz"
Array = np.ndarray
SHAPES = [(96, 64), (64, 96), (40, 40)]


def orthogonal(n: int, k: int, seed: int) -> Array:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, k)))[0]


def unit(n: int, seed: int) -> Array:
    return orthogonal(n, 1, seed)[:, 0]


def separated(d_in: int, d_out: int, seed: int = 0) -> Array:
    """Singular values 3, 2.9, ...: none coincide, so that all vectors are well defined."""
    k = min(d_in, d_out)
    S = np.linspace(3, 0.1, k)
    return (orthogonal(d_in, k, seed) * S) @ orthogonal(d_out, k, seed + 1).T


def with_intruder(W: Array, strength: float = 20.0, seed: int = 7) -> Array:
    return W + strength * np.outer(unit(W.shape[0], seed), unit(W.shape[1], seed + 1))


def count(W: Array, changed: Array, **settings) -> int:
    with jax.enable_x64(True):
        found = analysis.intruders({"kernel": jnp.asarray(W)}, {"kernel": changed}, **settings)
        return analysis.total(found)


# --- intruders ---


@pytest.mark.parametrize("shape", SHAPES)
def test_an_unchanged_kernel_has_no_intruder(shape):
    W = separated(*shape)
    assert count(W, W) == 0
    assert count(W, W, top=1000, threshold=0.999) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_a_dominant_direction_is_one_intruder(shape, seed):
    W = separated(*shape, seed=10 * seed)
    changed = with_intruder(W, seed=100 + 10 * seed)
    assert count(W, changed) == 1
    assert count(W, changed, top=1) == 1
    assert count(W, -3.7 * changed) == 1  # scale and sign do not matter


def test_only_the_output_side_counts():
    W = separated(96, 64)
    changed, turn_in, turn_out = with_intruder(W), orthogonal(96, 96, 3), orthogonal(64, 64, 4)
    assert count(W, turn_in @ changed) == count(W, changed) == 1
    assert count(W, turn_in @ W) == 0
    assert count(W, W @ turn_out) == 10
    assert count(W, changed @ turn_out) > 1


def test_all_original_vectors_count_not_the_leading_ones_alone():
    d_in, d_out, k = 96, 64, 64
    U, V, S = orthogonal(d_in, k, 0), orthogonal(d_out, k, 1), np.linspace(3, 0.1, k)
    assert count((U * S) @ V.T, (U * S[::-1]) @ V.T) == 0


def test_top_and_threshold():
    W = separated(40, 40)
    with jax.enable_x64(True):
        found = analysis.intruders({"k": W}, {"k": with_intruder(W)}, "k")["k"]
    m = np.asarray(found.similarity)
    assert m.shape == (40,) and found.spans
    _, _, Vt0 = np.linalg.svd(W)
    _, _, Vt1 = np.linalg.svd(with_intruder(W))
    np.testing.assert_allclose(m, np.abs(Vt1 @ Vt0.T).max(1), atol=1e-9)
    for top, threshold in ((1, 0.5), (3, 0.95), (1000, 0.9)):
        expected = int((m[:top] < threshold).sum())
        settings = {"top": top, "threshold": threshold, "targets": "k"}
        with jax.enable_x64(True):
            new = analysis.intruders({"k": W}, {"k": with_intruder(W)}, **settings)
        assert analysis.total(new) == expected
        assert analysis.curve([found], [top], [threshold]) == expected


def test_a_wide_kernel_says_that_its_basis_does_not_span():
    for shape, spans in ((96, 64), True), ((64, 96), False), ((40, 40), True):
        W = {"kernel": jnp.asarray(separated(*shape), jnp.float32)}
        assert analysis.intruders(W, W)["kernel"].spans is spans


def changed_model() -> tuple[dict, dict]:
    """The tiny model, and the same with a strong direction in one slice of two kernels."""
    before = tiny.parameters()
    flat = paths.flatten(before)
    for name in ("layers/attention/query/kernel", "layers/down/kernel"):
        kernel = np.array(flat[name])
        matrix = kernel[1].reshape(-1, 16 if "query" in name else 12)
        kernel[1] = with_intruder(matrix, 50.0).reshape(kernel[1].shape)
        flat[name] = jnp.asarray(kernel)
    return before, paths.unflatten(flat)


def test_stacked_kernels_and_head_axes_are_those_of_unrolled_layers():
    before, after = changed_model()
    axes = pefts.infer_axes(tiny.Classifier().apply, before, *tiny.inputs())
    stacked = analysis.intruders(before, after, axes=axes, threshold=0.9)
    assert sorted(stacked) == sorted(
        f"layers/{name}/kernel"
        for name in ("down", "up", *(f"attention/{n}" for n in ("key", "out", "query", "value")))
    )
    unrolled = [tiny.unroll(tree) for tree in (before, after)]
    axes = pefts.infer_axes(tiny.Classifier(False).apply, unrolled[0], *tiny.inputs())
    single = analysis.intruders(*unrolled, axes=axes, threshold=0.9)
    assert len(single) == 2 * len(stacked)
    for path, kernel in stacked.items():
        assert kernel.count.shape == (2,) and kernel.similarity.shape[0] == 2
        for layer in range(2):
            alone = single[path.replace("layers/", f"layers_{layer}/")]
            np.testing.assert_allclose(alone.similarity, kernel.similarity[layer], atol=1e-5)
            assert alone.count == kernel.count[layer]
        assert int(kernel.count[0]) == 0
        changed = path.endswith(("query/kernel", "down/kernel"))
        assert (np.asarray(kernel.similarity[1]).min() < 0.95) == changed


def test_two_stacked_axes_keep_their_order():
    W = np.stack([[separated(16, 12, seed=10 * i + j) for j in range(3)] for i in range(2)])
    changed = W.copy()
    changed[1, 2] = with_intruder(W[1, 2])
    W, changed = ({"kernel": jnp.asarray(part, jnp.float32)} for part in (W, changed))
    found = analysis.intruders(W, changed, axes={"kernel": "llio"}, top=1, threshold=0.9)
    np.testing.assert_array_equal(found["kernel"].count, [[0, 0, 0], [0, 0, 1]])
    assert found["kernel"].similarity.shape == (2, 3, 12)


def test_targets_and_exclude():
    before, after = changed_model()
    axes = pefts.infer_axes(tiny.Classifier().apply, before, *tiny.inputs())
    some = analysis.intruders(before, after, ["query", "down"], axes=axes, exclude="down")
    assert list(some) == ["layers/attention/query/kernel"]
    head = analysis.intruders(before, after, "classifier/kernel")
    assert list(head) == ["classifier/kernel"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"top": 0}, "top=0: give a positive number"),
        ({"top": 2.5}, "top=2.5"),
        ({"threshold": 1.5}, "threshold=1.5: give a cosine"),
        ({"targets": "nothing"}, "'nothing' matches no parameter"),
    ],
)
@pytest.mark.parametrize("run", [analysis.intruders, analysis.mitigate, analysis.report])
def test_settings_out_of_range(run, settings, match):
    W = {"kernel": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match=match):
        run(W, W, **settings)


def test_two_models_are_refused():
    W = {"a": {"kernel": jnp.ones((4, 3))}}
    for other, shape in (
        ({"b": {"kernel": jnp.ones((4, 3))}}, "None"),
        ({"a": {"kernel": jnp.ones((3, 4))}}, r"\(3, 4\)"),
    ):
        with pytest.raises(
            ValueError, match=rf"'a/kernel' has shape \(4, 3\) before and {shape} after"
        ):
            analysis.intruders(W, other)


# --- mitigation ---


def mitigated(W: Array, changed: Array, **settings) -> Array:
    with jax.enable_x64(True):
        out = analysis.mitigate(
            {"kernel": jnp.asarray(W)}, {"kernel": jnp.asarray(changed)}, **settings
        )
        return np.asarray(out["kernel"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strength", [0.0, 0.3, 0.75])
def test_mitigation_keeps_a_share_of_the_intruder_alone(shape, strength):
    W = separated(*shape)
    changed = with_intruder(W)
    U, S, Vt = np.linalg.svd(changed, full_matrices=False)
    shrunk = mitigated(W, changed, strength=strength)
    S[0] *= strength
    np.testing.assert_allclose(shrunk, (U * S) @ Vt, atol=1e-10)
    if strength == 0:
        assert count(W, shrunk) == 0
        assert np.linalg.matrix_rank(shrunk) == min(shape) - 1


def test_mitigation_by_default_keeps_three_quarters():
    W = separated(96, 64)
    changed = with_intruder(W)
    np.testing.assert_array_equal(mitigated(W, changed), mitigated(W, changed, strength=0.75))


def test_mitigation_changes_nothing_else():
    W = separated(96, 64)
    np.testing.assert_array_equal(mitigated(W, with_intruder(W), strength=1.0), with_intruder(W))
    np.testing.assert_array_equal(mitigated(W, 1.1 * W, strength=0.0), 1.1 * W)
    np.testing.assert_array_equal(mitigated(W, with_intruder(W), threshold=0.0), with_intruder(W))
    with pytest.raises(ValueError, match="strength=1.5: give the share to keep"):
        mitigated(W, W, strength=1.5)


def test_mitigation_of_stacked_bfloat16_kernels_with_head_axes():
    before, after = (tiny.cast(tree, jnp.bfloat16) for tree in changed_model())
    axes = pefts.infer_axes(tiny.Classifier().apply, before, *tiny.inputs())
    settings = {"axes": axes, "threshold": 0.9}
    found = analysis.intruders(before, after, **settings)
    out = paths.flatten(analysis.mitigate(before, after, strength=0.0, **settings))
    flat = paths.flatten(after)
    assert out.keys() == flat.keys()
    for path, leaf in out.items():
        assert leaf.dtype == jnp.bfloat16 and leaf.shape == flat[path].shape
        layers = np.asarray(found[path].count) if path in found else [0] * len(leaf)
        for layer, number in enumerate(layers):
            same = np.array_equal(np.asarray(leaf[layer]), np.asarray(flat[path][layer]))
            assert same == (number == 0), (path, layer)
    assert analysis.total(found) > 0


# --- the released code's numbers: torch kernels are ours transposed ---


@pytest.fixture(scope="module")
def golden() -> dict[str, Array]:
    if not GOLDEN.exists():
        pytest.skip("../shared/golden/official/intruder_dimensions is not on this machine")
    return dict(np.load(GOLDEN))


@pytest.mark.parametrize("name", ["lora_like", "small"])
def test_golden_counts_and_cosines(golden, name):
    before, after = ({"kernel": golden[f"{name}_{part}"].T} for part in ("W0", "W1"))
    with jax.enable_x64(True):
        found = analysis.intruders(before, after)
    np.testing.assert_allclose(found["kernel"].similarity, golden[f"{name}_max_cosine"], atol=1e-10)
    counts = analysis.curve(found.values(), golden["top_k"].tolist(), golden["thresholds"].tolist())
    np.testing.assert_array_equal(counts, golden[f"{name}_counts"])
    assert analysis.total(found) == golden[f"{name}_counts"][1, 1]
    in_float32 = analysis.intruders(before, after).values()
    np.testing.assert_array_equal(
        analysis.curve(in_float32, golden["top_k"].tolist(), golden["thresholds"].tolist()),
        golden[f"{name}_counts"],
    )


@pytest.mark.parametrize(("strength", "name"), [(0.0, "lambda000"), (0.75, "lambda075")])
def test_golden_mitigation(golden, strength, name):
    W = golden["lora_like_W0"].T
    update = float(golden["peft_scaling"]) * (golden["peft_B"] @ golden["peft_A"]).T
    shrunk = mitigated(
        W,
        W + update,
        strength=strength,
        top=int(golden["peft_top_k"]),
        threshold=float(golden["peft_epsilon"]),
    )
    expected = golden[f"peft_{name}_mitigated_kernel_before_truncation"]
    np.testing.assert_allclose(shrunk, expected, atol=1e-12)
    with jax.enable_x64(True):
        U, S, V = map(np.asarray, linalg.svd(shrunk - W, rank=golden["peft_A"].shape[0]))
    np.testing.assert_allclose((U * S) @ V.T, golden[f"peft_{name}_delta"].T, atol=1e-12)


# --- spectra ---


def entropy_rank(W: Array) -> float:
    p = np.linalg.svd(W, compute_uv=False)
    p = p[p > 0] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def test_effective_and_stable_rank():
    W = np.random.default_rng(0).normal(size=(2, 9, 5))
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            analysis.effective_rank(W), [entropy_rank(one) for one in W], rtol=1e-12
        )
        expected = [np.sum(one**2) / np.linalg.norm(one, 2) ** 2 for one in W]
        np.testing.assert_allclose(analysis.stable_rank(W), expected, rtol=1e-12)
    for rank in (analysis.effective_rank, analysis.stable_rank):
        np.testing.assert_allclose(rank(7 * jnp.eye(6, 4)), 4, rtol=1e-6)
        np.testing.assert_allclose(rank(jnp.ones((6, 4))), 1, rtol=1e-4)
        assert rank(jnp.zeros((6, 4))) == 0
        np.testing.assert_allclose(rank(0.001 * jnp.asarray(W)), rank(jnp.asarray(W)), rtol=1e-5)


def test_spectra_and_ranks_of_a_tree():
    params = tiny.parameters()
    axes = pefts.infer_axes(tiny.Classifier().apply, params, *tiny.inputs())
    found = analysis.spectra(params, axes=axes)
    query = np.asarray(params["layers"]["attention"]["query"]["kernel"]).reshape(2, 12, 16)
    expected = np.linalg.svd(query, compute_uv=False)
    np.testing.assert_allclose(found["layers/attention/query/kernel"], expected, rtol=1e-5)
    ranks = analysis.effective_rank(params, axes=axes)
    assert ranks.keys() == found.keys()
    np.testing.assert_allclose(
        ranks["layers/attention/query/kernel"], [entropy_rank(W) for W in query], rtol=1e-5
    )
    assert list(analysis.stable_rank(params, targets="classifier/kernel")) == ["classifier/kernel"]


def test_subspace_similarity_is_the_papers():
    A, B = orthogonal(12, 3, 0), orthogonal(12, 5, 1)
    expected = np.array(
        [
            [np.linalg.norm(A[:, :i].T @ B[:, :j]) ** 2 / min(i, j) for j in range(1, 6)]
            for i in range(1, 4)
        ]
    )
    with jax.enable_x64(True):
        np.testing.assert_allclose(analysis.subspace_similarity(A, B), expected, rtol=1e-12)
        np.testing.assert_allclose(analysis.subspace_similarity(-A, B), expected, rtol=1e-12)
        own = np.asarray(analysis.subspace_similarity(B, B))
        np.testing.assert_allclose(own, 1, rtol=1e-12)
        apart = analysis.subspace_similarity(B[:, :2], B[:, 2:])
        np.testing.assert_allclose(apart, 0, atol=1e-12)
        many = analysis.subspace_similarity(np.stack([A, A]), np.stack([B, B[:, ::-1]]))
        np.testing.assert_allclose(many[0], expected, rtol=1e-12)
        assert np.abs(many[1] - expected).max() > 1e-3
    with pytest.raises(ValueError, match="columns of one length"):
        analysis.subspace_similarity(A, B[:4])


# --- report ---


def rows_of(before: dict, after: dict, **settings: Any) -> list[analysis.Row]:
    axes = pefts.infer_axes(tiny.Classifier().apply, before, *tiny.inputs())
    return analysis.report(before, after, axes=axes, **settings)


def test_a_report_has_a_row_for_every_slice():
    before, after = changed_model()
    rows = rows_of(before, after, top=3, threshold=0.9)
    assert [row.layer for row in rows] == [(0,), (1,)] * 6
    found = analysis.intruders(
        before,
        after,
        axes=pefts.infer_axes(tiny.Classifier().apply, before, *tiny.inputs()),
        top=3,
        threshold=0.9,
    )
    for row in rows:
        W, changed = (
            np.asarray(paths.flatten(tree)[row.path][row.layer]).reshape(row.shape)
            for tree in (before, after)
        )
        assert row.spans == (row.shape[1] <= row.shape[0])
        assert row.intruders == found[row.path].count[row.layer]
        spectra = [np.linalg.svd(M, compute_uv=False) for M in (W, changed, changed - W)]
        np.testing.assert_allclose(row.spectrum, spectra, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(
            row.effective_rank[:2], [entropy_rank(W), entropy_rank(changed)], rtol=1e-4
        )
        moved = np.linalg.norm(changed - W) / np.linalg.norm(W)
        np.testing.assert_allclose(row.relative_change, moved, rtol=1e-5)
        if moved:
            np.testing.assert_allclose(row.effective_rank[2], 1, rtol=1e-3)
        else:
            assert row.effective_rank[2] == 0
        Vt0, Vt1 = (np.linalg.svd(M, full_matrices=False)[2] for M in (W, changed))
        np.testing.assert_allclose(row.cosines, np.abs(Vt1 @ Vt0.T)[:6, :6], atol=1e-4)
    assert sum(row.relative_change > 0 for row in rows) == 2
    np.testing.assert_array_equal(analysis.curve(rows), analysis.curve(found.values()))


def test_layers_have_one_name_stacked_or_not():
    before, _ = changed_model()
    alone = analysis.report(before, before, "classifier/kernel")
    assert list(analysis.kinds_of(alone)) == ["classifier"]
    assert analysis.layer_of(alone[0]) == ""
    names = ["attention/query", "up"]
    stacked = [
        alone[0]._replace(path=f"encoder/layers/{name}/kernel", layer=(n,))
        for name in names
        for n in range(2)
    ]
    single = [
        alone[0]._replace(path=f"encoder/layers_{n}/{name}/kernel")
        for name in names
        for n in range(2)
    ]
    for rows in (stacked, single):
        kinds = analysis.kinds_of(rows)
        assert list(kinds) == names
        assert [analysis.layer_of(row) for row in kinds["up"]] == ["0", "1"]


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_the_figure_is_an_image(tmp_path, change):
    before, after = changed_model()
    after = jax.tree.map(lambda b, a: b + change * (a - b), before, after)
    analysis.figure(rows_of(before, after), tmp_path / "a.png")
    analysis.figure(analysis.report(before, after, "classifier/kernel"), tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_without_matplotlib_the_figure_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        analysis.figure([], tmp_path / "a.png")


# --- eval.py --analyse ---


@pytest.fixture(scope="module")
def run_folder(base: Path, tmp_path_factory) -> tuple[Path, experiment.Experiment]:
    """A run folder with an adapter that has moved far."""
    config: ConfigDict = get_config("tiny")
    config.model.source = str(base)
    folder = tmp_path_factory.mktemp("run")
    checkpoint.claim(folder, config)
    run = experiment.build(config)
    state = run.peft.init(jax.random.key(0), run.params)
    state = pefts.randomize(jax.random.key(1), state, 2.0)
    pefts.save(folder / "adapter.safetensors", run.peft, state, run.params)
    return folder, run


def test_eval_analyses_a_run(run_folder, capsys, monkeypatch):
    folder, run = run_folder
    monkeypatch.setattr(experiment, "build", lambda config: run)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["eval", f"--run={folder}"])
    with flagsaver.flagsaver(run=str(folder), split="dev", analyse=True):
        evaluation.main(["eval"])
    printed = capsys.readouterr().out
    for word in ("intruders", "attention/query", "analysis.png", "d_out > d_in"):
        assert word in printed, word
    assert (folder / "analysis.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / "analysis.json").read_text())
    assert content["intruders"] == sum(row["intruders"] for row in content["kernels"]) > 0
    at = content["curve"]["tops"].index(content["top"])
    threshold = content["curve"]["thresholds"].index(content["threshold"])
    assert content["curve"]["intruders"][at][threshold] == content["intruders"]
    assert all(row["effective_rank"]["difference"] <= 8.1 for row in content["kernels"])
    assert {row["spans"] for row in content["kernels"]} == {True, False}


def test_a_method_that_cannot_be_merged_has_nothing_to_analyse(run_folder, tmp_path):
    _, run = run_folder
    run = run._replace(peft=pefts.prompt())
    with pytest.raises(ValueError, match="cannot be merged"):
        run_analysis.write(run, pefts.PeftState({}, {}), tmp_path)
    assert not list(tmp_path.glob("analysis.*"))
