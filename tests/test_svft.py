"""SVFT beyond the table: vectors of the official code, patterns, rank, start values, cost."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts import linalg
from pefts.bound import Call
from pefts.methods.svft import _scores

GOLDEN = Path(__file__).parents[2] / "shared/golden/official/svft/golden.npz"
SHAPES = ("rect", "square", "tall")
TRAINED = ("banded", "random", "top_k")
PATTERNS = ("plain", *TRAINED)


@pytest.fixture
def golden():
    if not GOLDEN.exists():
        pytest.skip("the official SVFT vectors (../shared/golden/official/svft) are absent")
    return dict(np.load(GOLDEN))


def entries(n: int, d: int) -> int:
    return n * (2 * d + 1) - d * (d + 1)


def problem(key: jax.Array, d_in: int = 9, d_out: int = 14, **kwargs) -> tuple:
    """W, the method and its state, in float64 under x64."""
    W = jax.random.normal(key, (d_in, d_out), jax.dtypes.canonicalize_dtype(jnp.float64))
    peft = pefts.svft(targets="kernel", **kwargs)
    return W, peft, peft.init(key, {"kernel": W})


def coefficients(state: pefts.PeftState) -> np.ndarray:
    """g M, from the state alone."""
    trained = {name: np.asarray(leaf) for name, leaf in state.trainable["kernel"].items()}
    frozen = {name: np.asarray(leaf) for name, leaf in state.frozen["kernel"].items()}
    n = frozen["U"].shape[1]
    M = np.zeros((n, n))
    places = (frozen.get("rows", np.arange(n)), frozen.get("columns", np.arange(n)))
    np.add.at(M, places, trained["m"])
    return M / (1 + np.exp(-trained["gate"]))


# --- the released code ---


@pytest.mark.parametrize("pattern", TRAINED)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_the_released_code(golden, x64, shape, pattern):
    """Torch's index pair (row, column) is (column, row) here, and its U our V."""
    of = lambda name: jnp.asarray(golden[f"{shape}_{name}"])  # noqa: E731
    own = lambda name: of(f"{pattern}_{name}")  # noqa: E731
    W, x, b, cotangent = of("W").T, of("x"), of("b"), of("cot")
    peft = pefts.svft(pattern, off_diagonals=int(golden["off_diag"]), targets="kernel")
    places = {"rows": own("cols"), "columns": own("rows")}
    frozen = {"kernel": {"U": of("Vh").T, "V": of("U"), **places}}
    trainable = {"kernel": {"m": own("m"), "gate": own("gate")[0]}}
    assert pefts.count(trainable) == pefts.count(
        peft.init(jax.random.key(0), {"kernel": W}).trainable
    )

    def outputs(trainable, x):
        bound = peft.bind({"kernel": W}, pefts.PeftState(trainable, frozen))["kernel"]
        return bound.rule.linear(x, W, bound.state, Call()) + b[None]

    y, pull = jax.vjp(outputs, trainable, x)
    grads, grad_x = pull(cotangent)
    state = pefts.PeftState(trainable, frozen)
    found = {
        "y": y,
        "W_eff": peft.merge({"kernel": W}, state)["kernel"].T,
        "grad_m": grads["kernel"]["m"],
        "grad_gate": grads["kernel"]["gate"][None],
        "grad_x": grad_x,
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, own(name), rtol=1e-9, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_places_are_those_of_the_released_code(golden, x64, shape, monkeypatch):
    """In its order too, so that its values fit; singular vectors are its own, whose signs count."""
    U, S, V = (golden[f"{shape}_{name}"] for name in ("Vh", "S", "U"))
    U = U.T
    np.testing.assert_allclose(_scores(U, V).T, golden[f"{shape}_top_k_scores"], atol=1e-12)
    decomposed = linalg.SVD(*map(jnp.asarray, (U, S, V)))
    monkeypatch.setattr(linalg, "svd", lambda W: decomposed)
    W = jnp.asarray(golden[f"{shape}_W"].T)
    for pattern in ("banded", "top_k"):
        peft = pefts.svft(pattern, off_diagonals=int(golden["off_diag"]), targets="kernel")
        found = peft.init(jax.random.key(0), {"kernel": W}).frozen["kernel"]
        np.testing.assert_array_equal(found["rows"], golden[f"{shape}_{pattern}_cols"])
        np.testing.assert_array_equal(found["columns"], golden[f"{shape}_{pattern}_rows"])


def test_kaiming_values_have_the_released_codes_deviation(golden, key):
    _, _, state = problem(key, 60, 50, pattern="banded", off_diagonals=12, init="kaiming")
    m = np.asarray(state.trainable["kernel"]["m"])
    assert abs(m.std() / np.sqrt(2 / len(m)) - 1) < 0.08 and abs(m.mean()) < 0.1 * m.std()
    for shape in SHAPES:
        for pattern in TRAINED:
            theirs = golden[f"{shape}_{pattern}_kaiming_init_std"]
            size = len(golden[f"{shape}_{pattern}_m"])
            assert abs(theirs / np.sqrt(2 / size) - 1) < 0.25


# --- the matrix M ---


@pytest.mark.parametrize("d", [0, 1, 3, 8])
def test_counts(key, d):
    """The same for every pattern; d = n - 1 fills M."""
    for pattern in TRAINED:
        _, _, state = problem(key, pattern=pattern, off_diagonals=d)
        assert state.trainable["kernel"]["m"].shape == (entries(9, d),)
    assert entries(9, 8) == 81


def test_plain_is_a_band_without_neighbours(key):
    W, plain, state = problem(key)
    _, banded, other = problem(key, pattern="banded", off_diagonals=0)
    moved = pefts.randomize(key, state)
    same = other._replace(trainable=moved.trainable)
    kernels = (p.merge({"kernel": W}, s)["kernel"] for p, s in ((plain, moved), (banded, same)))
    np.testing.assert_allclose(*kernels, rtol=1e-6, atol=1e-6)


def test_the_band_is_a_band_and_top_k_takes_the_largest(key):
    _, _, state = problem(key, pattern="banded", off_diagonals=2)
    places = state.frozen["kernel"]
    distance = np.abs(np.asarray(places["rows"]) - np.asarray(places["columns"]))
    assert distance.max() == 2 and len(distance) == entries(9, 2)
    for shape in ((9, 14), (14, 9), (9, 9)):
        _, _, state = problem(key, *shape, pattern="top_k", off_diagonals=2)
        U, V = (np.asarray(state.frozen["kernel"][name]) for name in "UV")
        scores = (V @ U).T if shape == (9, 9) else U if shape == (9, 14) else V.T
        taken = np.zeros((9, 9), bool)
        taken[np.asarray(state.frozen["kernel"]["rows"]), state.frozen["kernel"]["columns"]] = True
        assert taken.sum() == entries(9, 2)
        assert scores[taken].min() >= scores[~taken].max()


def test_random_places_are_drawn_independently_with_replacement(key):
    _, _, state = problem(key, 40, 50, pattern="random", off_diagonals=10)
    rows, columns = (np.asarray(state.frozen["kernel"][name]) for name in ("rows", "columns"))
    assert len(rows) == entries(40, 10)
    assert 0 <= rows.min() and rows.max() < 40 and 0 <= columns.min() and columns.max() < 40
    # 730 of 1600 places: about 586 different ones are expected, 730 without replacement
    assert 540 < len(set(zip(rows.tolist(), columns.tolist(), strict=True))) < 630
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.15
    assert (np.bincount(rows, minlength=40) > 0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_projecting_the_merged_kernel_gives_back_the_coefficients(key, x64, pattern):
    """U^T W V = diag(S), and U^T W' V = diag(S) + g M, zero off M's places."""
    d = {} if pattern == "plain" else {"off_diagonals": 1}
    W, peft, state = problem(key, pattern=pattern, **d)
    U, V = (np.asarray(state.frozen["kernel"][name]) for name in "UV")
    S = np.linalg.svd(np.asarray(W), compute_uv=False)
    np.testing.assert_allclose(U.T @ np.asarray(W) @ V, np.diag(S), atol=1e-12)
    moved = pefts.randomize(key, state, 0.7)
    merged = np.asarray(peft.merge({"kernel": W}, moved)["kernel"])
    wanted = coefficients(moved)
    assert np.count_nonzero(wanted) <= entries(9, d.get("off_diagonals", 0))
    np.testing.assert_allclose(U.T @ merged @ V - np.diag(S), wanted, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_a_rank_leaves_the_rest_of_the_spectrum_alone(key, x64, pattern, shape):
    d = {} if pattern == "plain" else {"off_diagonals": 1}
    W, peft, state = problem(key, *shape, pattern=pattern, rank=4, **d)
    np.testing.assert_array_equal(peft.merge({"kernel": W}, state)["kernel"], W)
    assert state.trainable["kernel"]["m"].shape == (entries(4, d.get("off_diagonals", 0)),)
    moved = pefts.randomize(key, state, 0.7)
    U, S, V = (np.asarray(part) for part in linalg.svd(W))
    change = U.T @ np.asarray(peft.merge({"kernel": W}, moved)["kernel"]) @ V - np.diag(S)
    np.testing.assert_allclose(change[:4, :4], coefficients(moved), atol=1e-12)
    np.testing.assert_allclose(change[4:], 0, atol=1e-12)
    np.testing.assert_allclose(change[:, 4:], 0, atol=1e-12)


# --- start values ---


@pytest.mark.parametrize("pattern", PATTERNS)
def test_zeros_are_the_identity_with_a_gradient_and_kaiming_is_not(key, pattern):
    x = jax.random.normal(jax.random.fold_in(key, 1), (5, 9))
    for init, is_identity in (("zeros", True), ("kaiming", False)):
        d = {} if pattern == "plain" else {"off_diagonals": 1}
        W, peft, state = problem(key, pattern=pattern, init=init, **d)
        assert peft.traits.identity_at_init is is_identity
        bound = peft.bind({"kernel": W}, state)["kernel"]

        def loss(trained, bound=bound, W=W):
            return jnp.sum(jnp.sin(bound.rule.linear(x, W, {**bound.state, **trained}, Call())))

        grads = jax.grad(loss)(state.trainable["kernel"])
        assert np.any(grads["m"]) and bool(np.any(grads["gate"])) is not is_identity
        assert np.array_equal(peft.merge({"kernel": W}, state)["kernel"], W) is is_identity


def test_the_band_is_sixteen_wide_unless_it_is_said(key):
    _, _, state = problem(key, 40, 50, pattern="banded")
    assert state.trainable["kernel"]["m"].shape == (entries(40, 16),)


# --- cost ---


def products(fn, *args) -> list[tuple]:
    """The shapes of the results of all matrix products of fn."""
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(equation.outvars[0].aval.shape)
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", None)
                if inner is not None:
                    walk(inner)

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


def step(peft: pefts.Peft, W: jax.Array, state: pefts.PeftState):
    """(x, cotangent) -> the gradients of the trainable leaves and of x."""
    bound = peft.bind({"kernel": W}, state)["kernel"]

    def run(trained, x):
        return bound.rule.linear(x, W, {**bound.state, **trained}, Call())

    def pulled(trained, x, cotangent):
        return jax.vjp(run, trained, x)[1](cotangent)

    return functools.partial(pulled, state.trainable["kernel"])


def test_the_diagonal_takes_two_products_less_than_lora(key):
    """Of its own: x U, (.) V^T, and two for the gradient of x; beside those of W."""
    x, cotangent = jnp.ones((30, 9)), jnp.ones((30, 14))
    own = []
    for peft in (pefts.svft(targets="kernel"), pefts.lora(rank=9, targets="kernel")):
        W = jax.random.normal(key, (9, 14))
        own.append(products(step(peft, W, peft.init(key, {"kernel": W})), x, cotangent))
    diagonal, lora = own
    assert len(diagonal) == 6 and len(lora) == 8


@pytest.mark.parametrize("pattern", TRAINED)
@pytest.mark.parametrize("sides", [(384, 384), (384, 1536), (1536, 384)])
def test_a_sparse_matrix_costs_no_more_than_lora_of_that_rank(key, pattern, sides):
    """Floating-point operations of a training step of 1500 tokens, from the unoptimised program."""
    W = jax.ShapeDtypeStruct(sides, jnp.float32)
    x, cotangent = (jax.ShapeDtypeStruct((1500, side), jnp.float32) for side in sides)
    flops = []
    for peft in (pefts.svft(pattern, targets="kernel"), pefts.lora(rank=384, targets="kernel")):
        state = jax.eval_shape(peft.init, key, {"kernel": W})

        def run(W, state, x, cotangent, peft=peft):
            return step(peft, W, state)(x, cotangent)

        lowered = jax.jit(run).lower(W, state, x, cotangent)
        flops.append(lowered.cost_analysis()["flops"])
    assert flops[0] < flops[1]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nothing_of_the_kernels_size_is_built_in_training(key, pattern):
    d = {} if pattern == "plain" else {"off_diagonals": 1}
    W, peft, state = problem(key, pattern=pattern, rank=4, **d)
    shapes = products(step(peft, W, state), jnp.ones((30, 9)), jnp.ones((30, 14)))
    assert (9, 14) not in shapes and (14, 9) not in shapes
    assert (30, 4) in shapes
