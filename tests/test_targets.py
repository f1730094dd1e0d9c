"""Which leaves a pattern picks, and how a leaf becomes a matrix."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts import paths, targets, views

SHAPES = {
    "embed/embedding": (18, 12),
    "block/attention/query/kernel": (12, 16),
    "block/attention/query/bias": (16,),
    "block/attention/key_query/kernel": (12, 16),
    "block/mlp/up/kernel": (12, 20),
    "block/norm/scale": (12,),
    "head_norm/kernel": (12, 6),
    "lm_head/kernel": (12, 18),
    "counter/kernel": (3, 3),
}


@pytest.fixture
def params() -> dict:
    flat = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    flat["counter/kernel"] = jnp.ones((3, 3), jnp.int32)
    return paths.unflatten(flat)


QUERY, KEY_QUERY = "block/attention/query/kernel", "block/attention/key_query/kernel"
UP, EMBED, HEAD = "block/mlp/up/kernel", "embed/embedding", "lm_head/kernel"
NEAR_HEAD = "head_norm/kernel"


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ({}, [KEY_QUERY, QUERY, UP, NEAR_HEAD]),
        ({"targets": "all-linear"}, [KEY_QUERY, QUERY, UP, NEAR_HEAD]),
        ({"targets": r"query/kernel"}, [KEY_QUERY, QUERY]),
        ({"targets": r"/query/kernel"}, [QUERY]),
        ({"targets": r"(up|query)/kernel$"}, [KEY_QUERY, QUERY, UP]),
        ({"targets": ["query"]}, [QUERY]),
        ({"targets": ["attention/query", "up"]}, [QUERY, UP]),
        ({"targets": ["up/kernel"]}, [UP]),
        ({"targets": ["embed"]}, [EMBED]),
        ({"targets": "embedding$"}, [EMBED]),
        ({"targets": "lm_head"}, [HEAD]),
        ({"targets": "."}, [KEY_QUERY, QUERY, UP, EMBED, NEAR_HEAD, HEAD]),
        ({"exclude": "attention"}, [UP, NEAR_HEAD]),
        ({"exclude": ["query", "head_norm"]}, [KEY_QUERY, UP]),
        ({"targets": ["query", "up"], "exclude": "mlp"}, [QUERY]),
    ],
)
def test_patterns_pick(params: dict, select: dict, expected: list[str]) -> None:
    sites = targets.selection(**select).resolve(params)
    assert [site.path for site in sites] == expected


def test_vectors_are_candidates_on_request(params: dict) -> None:
    chosen = targets.selection(targets="bias|scale", vectors=True).resolve(params)
    assert [site.path for site in chosen] == ["block/attention/query/bias", "block/norm/scale"]
    assert all(site.is_vector and site.d_in == 1 for site in chosen)


@pytest.mark.parametrize(
    ("select", "match"),
    [
        ({"targets": "querry"}, r"targets: 'querry' matches no parameter. Near names: .*'query'"),
        ({"targets": ["query", "upp"]}, r"targets: 'upp' matches no parameter.*'up'"),
        ({"targets": ["que"]}, "'que' matches no parameter"),
        ({"targets": "bias"}, "'bias' matches no parameter"),
        ({"targets": "counter"}, "'counter' matches no parameter"),
        ({"targets": "(query"}, r"targets='\(query' is not a regular expression"),
        ({"exclude": "valu"}, "exclude: 'valu' matches no parameter"),
        ({"exclude": ["query", "valu"]}, "exclude: 'valu' matches no parameter"),
        ({"targets": ["up"], "exclude": "mlp"}, "exclude='mlp' leaves nothing"),
        ({"rank_pattern": {"lm_head": 2}}, "rank_pattern: 'lm_head' matches no parameter"),
        ({"alpha_pattern": {"vlue": 2.0}}, "alpha_pattern: 'vlue' matches no parameter"),
        ({"target": "query"}, "unknown argument 'target'"),
    ],
)
def test_patterns_that_pick_nothing(params: dict, select: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        targets.selection(**select).resolve(params)


def test_error_lists_what_can_be_targeted(params: dict) -> None:
    with pytest.raises(ValueError, match=re.escape(f"'{QUERY}'")):
        targets.selection(targets="querry").resolve(params)
    with pytest.raises(ValueError, match=re.escape(f"'{UP}'")):
        targets.selection(targets="zzz").resolve(params)


def test_rank_and_alpha_patterns(params: dict) -> None:
    select = {"rank_pattern": {"/query": 5, "query": 3}, "alpha_pattern": {"up": 32}}
    sites = targets.selection(**select).resolve(params, rank=2, alpha=8.0)
    found = {site.path: (site.rank, site.alpha) for site in sites}
    assert found == {
        QUERY: (5, 8.0),
        KEY_QUERY: (3, 8.0),
        UP: (2, 32.0),
        NEAR_HEAD: (2, 8.0),
    }


def test_patterns_reach_the_method(params: dict) -> None:
    peft = pefts.lora(rank=2, alpha=4, rank_pattern={"up": 6}, alpha_pattern={"up": 18})
    state = peft.init(jax.random.key(0), params)
    assert state.trainable[UP]["A"].shape == (12, 6)
    assert float(state.frozen[UP]["scale"]) == 3.0
    assert float(state.frozen[QUERY]["scale"]) == 2.0


@pytest.mark.parametrize("rank", [13, 10_000])
def test_rank_out_of_range(params: dict, rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank={rank} is out of range for .*choose 1 to 12"):
        targets.selection(targets=["query"]).resolve(params, rank=rank)


def test_three_axes_are_ambiguous() -> None:
    params = {"layers": {"query": {"kernel": jnp.ones((2, 12, 16))}}}
    with pytest.raises(
        ValueError, match=r"the 3 axes of 'layers/query/kernel', shape \(2, 12, 16\)"
    ):
        pefts.lora(rank=2).init(jax.random.key(0), params)
    with pytest.raises(ValueError, match=r"axes=pefts.infer_axes\(model.apply, params"):
        pefts.lora(rank=2).init(jax.random.key(0), params)
    state = pefts.lora(rank=2, axes={"query": "lio"}).init(jax.random.key(0), params)
    assert state.trainable["layers/query/kernel"]["A"].shape == (2, 12, 2)


@pytest.mark.parametrize(
    ("letters", "match"),
    [
        ("io", "one letter of"),
        ("lix", "one letter of"),
        ("lii", "names no output axis"),
        ("ilo", "stacked axes 'l' come first"),
    ],
)
def test_wrong_axes(letters: str, match: str) -> None:
    params = {"query": {"kernel": jnp.ones((2, 12, 16))}}
    with pytest.raises(ValueError, match=match):
        pefts.lora(rank=2, axes={"query": letters}).init(jax.random.key(0), params)


BODIES = ("io", "oi", "ioo", "iio", "oio", "ooi", "iioo", "ioio", "kio", "kkio", "kkoi", "o", "oo")
LETTERS = [stack + body for stack, body in itertools.product(("", "l", "ll"), BODIES)]


@pytest.mark.parametrize("axes", LETTERS)
def test_matrix_round_trip(axes: str) -> None:
    shape = (2, 3, 4, 5, 6, 7)[: len(axes)]
    kernel = jnp.arange(np.prod(shape)).reshape(shape)
    matrix = views.to_matrix(kernel, axes)
    assert matrix.shape == views.matrix_shape(axes, shape)
    assert matrix.shape[:-2] == shape[: axes.count("l")]
    assert np.array_equal(views.from_matrix(matrix, axes, shape), kernel)


@pytest.mark.parametrize("axes", [a for a in LETTERS if set(a) & set("ik")])
def test_matrix_is_the_contraction(axes: str) -> None:
    """x @ to_matrix(W) is the einsum that the letters describe."""
    shape = (2, 3, 4, 5, 6, 7)[: len(axes)]
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=shape)
    names = "abcdef"[: len(axes)]
    stack = "".join(n for n, a in zip(names, axes, strict=True) if a == "l")
    rows = "".join(n for n, a in zip(names, axes, strict=True) if a in "ik")
    columns = "".join(n for n, a in zip(names, axes, strict=True) if a == "o")
    sizes = dict(zip(names, shape, strict=True))
    x = rng.normal(size=[sizes[n] for n in stack + rows])
    expected = np.einsum(f"{stack}{rows},{names}->{stack}{columns}", x, kernel)
    matrix = np.asarray(views.to_matrix(kernel, axes), np.float64)
    flat = x.reshape(*x.shape[: len(stack)], 1, -1)
    assert np.allclose((flat @ matrix).reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


def test_site_keys_depend_on_the_path_alone(params: dict) -> None:
    key = jax.random.key(0)
    one = pefts.lora(rank=2, targets=["query"]).init(key, params)
    more = pefts.lora(rank=2, targets=["query", "up"]).init(key, params)
    assert np.array_equal(one.trainable[QUERY]["A"], more.trainable[QUERY]["A"])
    assert not np.array_equal(more.trainable[QUERY]["A"], more.trainable[UP]["A"])


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_a_quantised_kernel_is_refused_by_name(dtype: str) -> None:
    params = {"up": {"kernel": jnp.ones((4, 3), dtype)}, "down": {"kernel": jnp.ones((3, 4))}}
    with pytest.raises(ValueError, match=f"'up/kernel', which is {dtype}.*dequantise"):
        targets.selection().resolve(params)
    assert [site.path for site in targets.selection(exclude="up").resolve(params)] == [
        "down/kernel"
    ]
