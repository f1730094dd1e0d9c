"""Low-rank subspaces of gradients: how they are found, which leaves have them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import aligned, close, decaying, full_tree, near, run, tree_of

from pefts import linalg
from pefts.optimizers.galore import GaloreState, galore, scale_by_galore
from pefts.optimizers.projection import Projector

pytestmark = pytest.mark.usefixtures("optax_promotes_its_step_count")


# --- the subspace ---


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (300, 40)], ids=str)
def test_subspace_iteration_finds_the_leading_triplets(shape: tuple, key: jax.Array) -> None:
    W = decaying(*shape, ratio=0.8)
    start = linalg.orthonormal(key, (shape[0], 5))
    U, S, V = linalg.svd_near(jnp.asarray(W, jnp.float32), start, oversample=6)
    left, values, right = np.linalg.svd(W, full_matrices=False)
    left, values, right = left[:, :5], values[:5], right[:5].T
    assert linalg.projector_distance(U, left.astype(np.float32)) < 1e-4
    np.testing.assert_allclose(S, values, rtol=1e-5)
    # The vectors themselves, in order, and in signs that belong together.
    near(aligned(U, left), left, 3e-4)
    near((np.asarray(U) * np.asarray(S)) @ np.asarray(V).T, left * values @ right.T, 1e-4)


def test_subspace_iteration_gains_from_a_good_start(key: jax.Array) -> None:
    U, S, Vt = np.linalg.svd(decaying(60, 50))
    S = 0.97 ** np.arange(50)  # so flat that a few iterations do not do
    W = jnp.asarray((U[:, :50] * S) @ Vt, jnp.float32)
    exact = jnp.asarray(U[:, :5], jnp.float32)
    cold, warm = linalg.orthonormal(key, (60, 5)), exact + 0.02 * jnp.cos(jnp.arange(5.0))[None]

    def distance(start: Any) -> float:
        found = linalg.svd_near(W, start, iterations=2, oversample=4).U
        return float(linalg.projector_distance(found, exact))

    assert distance(warm) < 0.1 < 0.5 < distance(cold)


def test_subspace_iteration_is_exact_where_the_matrix_is_small(key: jax.Array) -> None:
    W = jnp.asarray(decaying(9, 7), jnp.float32)
    near(linalg.svd_near(W, jnp.ones((9, 2)), oversample=5).U, linalg.svd(W, 2).U, 0)
    with pytest.raises(ValueError, match=r"start of shape \(7, 2\) does not fit W of shape"):
        linalg.svd_near(W, jnp.ones((7, 2)))
    with pytest.raises(ValueError, match="give one matrix W"):
        linalg.svd_near(W[None], jnp.ones((1, 9, 2)))
    with pytest.raises(ValueError, match="iterations=0"):
        linalg.svd_near(W, jnp.ones((9, 2)), iterations=0)
    with pytest.raises(ValueError, match="oversample=-1"):
        linalg.svd_near(W, jnp.ones((9, 2)), oversample=-1)


@pytest.mark.parametrize("projection", ["std", "reverse_std", "full"])
def test_the_projectors_of_both_decompositions_are_one(projection: str) -> None:
    grads = [jnp.asarray(decaying(60, 40, seed=t, ratio=0.75), jnp.float32) for t in (0, 1)]
    ends = []
    for decomposition in ("subspace", "svd"):
        tx = scale_by_galore(
            rank=4, update_interval=1, projection=projection, decomposition=decomposition
        )
        ends.append(run(tx, jnp.zeros((60, 40)), grads)[1])
    pairs = [jax.tree.leaves(end.projectors) for end in ends]
    assert len(pairs[0]) == (2 if projection == "full" else 1)
    for one, other in zip(*pairs, strict=True):
        assert float(linalg.projector_distance(one, other)) < 1e-4


# --- which leaves ---


def projected(state: GaloreState) -> dict[str, tuple]:
    """{path: shapes of P and Q} of the leaves that are projected."""
    return {
        path: jax.tree.map(jnp.shape, tuple(leaf["value"]))
        for path, leaf in state.projectors.items()
        if isinstance(leaf["value"], Projector)
    }


def test_leaves_of_full_fine_tuning_are_chosen_by_path_and_axes() -> None:
    trainable = full_tree()
    make = functools.partial(scale_by_galore, rank=3, axes={"^output/kernel$": "iio"})
    state = make().init(trainable)
    query, output = {"layers/query/kernel": ((2, 6, 3), None)}, {"output/kernel": (None, (6, 3))}
    assert projected(state) == query | output
    assert projected(make(targets="kernel|embed").init(trainable)) == query | output | {
        "embed/embedding": (None, (6, 3)),
        "classifier/kernel": (None, (5, 3)),
    }
    assert projected(make(targets=["query"]).init(trainable)) == query
    assert state.inner_state.mu["output/kernel"]["value"].shape == (8, 3)


def test_other_leaves_go_through_the_same_transformation() -> None:
    trainable = full_tree()
    grads = jax.tree.map(jnp.sin, trainable)
    tx = galore(0.1, rank=3, targets="query", scale=1.0)
    end, _, _ = run(tx, trainable, [grads] * 3)
    adam, _, _ = run(optax.adam(0.1), trainable, [grads] * 3)
    for path in trainable:
        if path != "layers/query/kernel":
            jax.tree.map(np.testing.assert_array_equal, end[path], adam[path])
    assert not np.allclose(
        end["layers/query/kernel"]["value"], adam["layers/query/kernel"]["value"], atol=1e-3
    )


def test_a_kernel_with_heads_is_projected_as_its_matrix() -> None:
    grads = {"kernel": jnp.asarray(decaying(8, 6), jnp.float32)}
    heads = {"kernel": grads["kernel"].reshape(2, 4, 6)}
    make = functools.partial(scale_by_galore, rank=3)
    (flat, _), (whole, _) = (
        tx.update(tree, tx.init(tree))
        for tx, tree in ((make(), grads), (make(axes={"kernel": "iio"}), heads))
    )
    assert whole["kernel"].shape == (2, 4, 6)
    close(whole["kernel"].reshape(8, 6), flat["kernel"])


@pytest.mark.parametrize("projection", ["std", "full"])
def test_each_layer_of_a_stack_is_projected_alone(projection: str) -> None:
    params, grads = tree_of(3, 6, 9, steps=5)
    inner = optax.scale_by_adam(eps=1e-2)  # see the test of "full" above
    tx = scale_by_galore(
        rank=3, update_interval=2, projection=projection, decomposition="svd", inner=inner
    )
    together, state, _ = run(tx, params, grads)
    for layer in range(3):
        alone, own, _ = run(
            tx,
            {"kernel": params["layers"]["kernel"][layer]},
            [{"kernel": grad["layers"]["kernel"][layer]} for grad in grads],
        )
        close(together["layers"]["kernel"][layer], alone["kernel"], 1e-4, 1e-5)
        ours = jax.tree.map(lambda leaf: leaf[layer], state.projectors["layers"]["kernel"])  # noqa: B023
        close(ours, own.projectors["kernel"], 1e-4, 1e-5)


def test_one_subtree_for_each_layer_is_no_stack() -> None:
    params = {"layers": {"0": {"kernel": jnp.ones((6, 9))}}}
    state = scale_by_galore(rank=2).init(params)
    assert state.projectors["layers"]["0"]["kernel"].P.shape == (6, 2)


BAD = {
    "rank=0": {"rank": 0},
    "rank=2.0": {"rank": 2.0},
    "rank=True": {"rank": True},
    "update_interval=0": {"update_interval": 0},
    "update_interval=1.5": {"update_interval": 1.5},
    "scale=0": {"scale": 0},
    "projection='both' is unknown; choose one of": {"projection": "both"},
    "decomposition='qr' is unknown; choose one of": {"decomposition": "qr"},
    "is no gradient transformation: call it": {"inner": optax.scale_by_adam},
}


@pytest.mark.parametrize("message", BAD)
def test_arguments_out_of_range_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        galore(0.1, **{"rank": 2, **BAD[message]})


BAD_TREE: dict[str, tuple[dict, dict]] = {
    "rank=7 is out of range for 'kernel', a 6 x 9": ({"rank": 7}, {"kernel": (6, 9)}),
    "targets: 'bias' matches no parameter": ({"targets": "bias"}, {"kernel": (6, 9), "bias": (9,)}),
    "targets: 'norm' matches no": (
        {"targets": "norm"},
        {"kernel": (6, 9), "layers/norm/m": (2, 9)},
    ),
    "the 3 axes of 'kernel'.* are ambiguous": ({}, {"kernel": (2, 6, 9)}),
    "leaves nothing of what targets='all-linear' matches": ({}, {"bias": (9,)}),
}


@pytest.mark.parametrize("message", BAD_TREE)
def test_trees_that_do_not_fit_are_refused(message: str) -> None:
    options, shapes = BAD_TREE[message]
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        galore(0.1, **{"rank": 2, **options}).init(params)


def test_integers_are_refused_by_name_and_passed_over_otherwise() -> None:
    params = {"kernel": jnp.ones((6, 9)), "table": jnp.ones((6, 9), jnp.int32)}
    assert scale_by_galore(rank=2).init(params).inner_state.mu["table"].shape == (6, 9)
    with pytest.raises(ValueError, match="targets: 'table' matches no parameter"):
        scale_by_galore(rank=2, targets="table").init(params)
    params["table"] = params["table"].astype(jnp.int8)
    with pytest.raises(ValueError, match="targets match 'table', which is int8"):
        scale_by_galore(rank=2, targets="table").init(params)
