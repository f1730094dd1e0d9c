"""What every adapter method is held to: one function per property, each taking a `Subject`.

A property raises AssertionError. `REQUIRES` says which trait or row field a property needs; nothing
is excluded by a method's name.
"""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from subject import (
    Subject,
    base_bfloat16,
    base_forward,
    base_pullback,
    forward,
    model_axes,
    random_logits,
    row_id,
)

import pefts
from pefts import core, paths, views
from pefts.bound import Call
from pefts.targets import Site

GOLDEN = Path(__file__).parent / "golden" / "structures"
SECTIONS = ("Args:", "Returns:", "Raises:", "Example:", "Source:")
FLOAT32, BFLOAT16, FLOAT64 = 1e-5, 5e-2, 1e-10
Arrays = Mapping[str, np.ndarray]


def close(actual: Any, expected: Any, rtol: float, what: str) -> None:
    """Every leaf of two trees within rtol of the leaf's largest expected value."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected), f"{what}: other structure"
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), e in pairs:
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape, f"{what}{jax.tree_util.keystr(path)}: {a.shape} != {e.shape}"
        error, scale = np.max(np.abs(a - e)), np.max(np.abs(e))
        name = jax.tree_util.keystr(path)
        assert error <= rtol * scale, f"{what}{name}: off by {error / scale:.2e}, allowed {rtol}"


def same(actual: Any, expected: Any, what: str) -> None:
    """Two trees bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected), f"{what}: other structure"
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), e in pairs:
        name = f"{what}{jax.tree_util.keystr(path)}"
        assert a.dtype == e.dtype, f"{name}: {a.dtype} != {e.dtype}"
        assert np.array_equal(np.asarray(a), np.asarray(e)), f"{name} changed"


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), tree)


def double(tree: Any) -> Any:
    """Floating leaves in float64; call it inside jax.enable_x64."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            np.asarray(leaf, np.float64)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else np.asarray(leaf)
        ),
        tree,
    )


@contextlib.contextmanager
def in_float64(subject: Subject) -> Iterator[tuple[Any, Any]]:
    """The base and a state away from the identity, made in float32 and seen in float64."""
    params, state, _, _ = subject.params, subject.moved, subject.sites, subject.context
    with jax.enable_x64(True):
        yield double(params), double(state)


def leaf_name(path: Any) -> str:
    return str(path[-1].key)


# --- values ---


def starts_at_identity(subject: Subject) -> None:
    """A fresh state leaves the outputs as they are."""
    base = base_forward()(subject.params, *subject.inputs)
    close(subject.forward(subject.state), base, 1e-6, "outputs at step 0")


def random_state_changes_outputs(subject: Subject) -> None:
    """The adapter reaches the outputs."""
    base = np.asarray(base_forward()(subject.params, *subject.inputs))
    change = np.abs(np.asarray(subject.forward(subject.moved)) - base).max()
    assert change > 1e-3 * np.abs(base).max(), f"a random state changes the outputs by {change}"


def factored_equals_merged(subject: Subject) -> None:
    """The product beside the kernel and the merged kernel give the same outputs, in float32."""
    dense = base_forward()(subject.merged, *subject.inputs)
    close(subject.forward(subject.moved), dense, FLOAT32, "factored against merged outputs")
    unmoved = base_forward()(subject.params, *subject.inputs)
    assert np.abs(np.asarray(dense - unmoved)).max() > 0, "merge left the kernels as they were"


def gradients_flow(subject: Subject) -> None:
    """From a random state every trainable leaf has a gradient, and merge's is the same."""
    with in_float64(subject) as (params, state):
        cotangent = double(random_logits())

        def pullback(trainable: Any) -> tuple[jax.Array, Any]:
            run = lambda t: forward(subject, params, state._replace(trainable=t))  # noqa: E731
            out, pull = jax.vjp(run, trainable)
            return out, pull(cotangent)[0]

        out, grads = jax.jit(pullback)(state.trainable)
        _nonzero(grads, 1e-12)
        if not subject.peft.traits.mergeable:
            return

        def merge(trainable: Any) -> Any:
            return subject.peft.merge(params, state._replace(trainable=trainable))

        dense = jax.jit(merge)(state.trainable)
        expected, dense_grads = base_pullback()(dense, cotangent, *subject.inputs)
        close(out, expected, FLOAT64, "factored against merged outputs in float64")
        through = jax.jit(lambda t, g: jax.vjp(merge, t)[1](g)[0])(state.trainable, dense_grads)
        close(grads, through, 1e-8, "factored against merged gradients in float64")


def _largest(tree: Any) -> float:
    return max(float(np.abs(np.asarray(leaf)).max()) for leaf in jax.tree.leaves(tree))


def _nonzero(grads: Any, floor: float) -> None:
    largest = _largest(grads)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert _largest(leaf) > floor * largest, (
            f"no gradient reaches {jax.tree_util.keystr(path)} from a random state"
        )


def matches_oracle(subject: Subject) -> None:
    """Every slice of every site, against the row's numpy formula in float64."""
    case = subject.case
    oracles = (case.oracle, case.output_oracle, case.linear_oracle, case.attend_oracle)
    assert any(oracles), "the row has no oracle"
    with in_float64(subject) as (params, state):
        merged = jax.jit(subject.peft.merge)(params, state) if case.oracle else params
        flat, merged = paths.flatten(params), paths.flatten(merged)
        for site in subject.sites:
            matrix, dense = (
                np.asarray(views.to_matrix(tree[site.path], site.axes)) for tree in (flat, merged)
            )
            _check_slices(subject, site, matrix, dense, state)


def _check_slices(
    subject: Subject, site: Site, matrix: np.ndarray, dense: np.ndarray, state: Any
) -> None:
    shared, oracle = _arrays(state, core.SHARED, ()), subject.case.oracle
    for index in np.ndindex(site.stack):
        W, p = matrix[index], _arrays(state, site.path, index)
        if oracle is not None:
            where = f"merge at {site.path}{list(index)}"
            close(dense[index], oracle(W, p, shared), FLOAT64, where)
        _check_products(subject, site, W, p, shared)


def _check_products(subject: Subject, site: Site, W: np.ndarray, p: Arrays, shared: Arrays) -> None:
    case, rule = subject.case, subject.declaration.rule
    rng = np.random.default_rng(0)
    call = Call(shared=double(shared), context=subject.context)
    known = {**shared, **{name: np.asarray(value) for name, value in subject.context.items()}}
    if case.linear_oracle is not None:
        x = rng.normal(size=(tiny.BATCH, 3, site.d_in))
        actual = rule.linear(jnp.asarray(x), jnp.asarray(W), double(p), call)
        close(actual, case.linear_oracle(x, W, p, known), FLOAT64, f"product at {site.path}")
    if case.output_oracle is not None:
        y = rng.normal(size=(tiny.BATCH, 3, site.d_out))
        actual = rule.output(jnp.asarray(y), double(p), call)
        close(actual, case.output_oracle(y, p, known), FLOAT64, f"output at {site.path}")
    if case.attend_oracle is not None:
        q, k, v = rng.normal(size=(3, tiny.BATCH, 5, tiny.HEADS, tiny.HEAD_SIZE))
        mask = np.tril(np.ones((1, 1, 5, 5), bool))
        project = lambda x: (x @ jnp.asarray(W), x @ jnp.asarray(2 * W))  # noqa: E731
        attend = lambda *tensors: tiny.Attend().apply({}, *tensors)  # noqa: E731
        actual = rule.attend(
            attend,
            *(jnp.asarray(x) for x in (q, k, v, mask)),
            double(p),
            call._replace(attention=attend, project=project),
        )
        expected = case.attend_oracle(q, k, v, W, p, known)
        close(actual, expected, FLOAT64, f"attention at {site.path}")


def _arrays(state: Any, path: str, index: tuple[int, ...]) -> dict[str, np.ndarray]:
    both = {**state.frozen.get(path, {}), **state.trainable.get(path, {})}
    return {name: np.asarray(leaf)[index] for name, leaf in both.items()}


def jit_equals_eager(subject: Subject) -> None:
    eager = forward(subject, subject.params, subject.moved)
    close(eager, subject.forward(subject.moved), FLOAT32, "eager against jitted outputs")


def uses_dropout_stream(subject: Subject) -> None:
    """Noise only with the stream, and a function of its key."""

    def noisy(seed: int) -> jax.Array:
        rngs = {"dropout": jax.random.key(seed)}
        return forward(subject, subject.params, subject.moved, rngs=rngs)

    first = noisy(0)
    same(noisy(0), first, "outputs of one key")
    assert not np.array_equal(noisy(1), first), "two keys gave the same outputs"
    assert not np.array_equal(subject.forward(subject.moved), first), "no noise with a stream"


# --- training ---


def compiles_once(subject: Subject) -> None:
    """Three training steps trace the step one time."""
    assert len(subject.trained.history) == 3
    traces = subject.trained.traces
    assert traces == 1, f"the training step was traced {traces} times in three steps"


def trains_only_trainable(subject: Subject) -> None:
    """After three updates every trainable leaf has moved and no other has, nor the base."""
    before = dict(paths.flatten(subject.params))
    subject.peft.bind(subject.params, subject.state, **subject.context)
    start, end = subject.state, subject.trained.history[-1][0]
    assert jax.tree.structure(start) == jax.tree.structure(end), "training changed the structure"
    for path, old, new in _leaves(start.trainable, end.trainable):
        assert np.isfinite(new).all(), f"{jax.tree_util.keystr(path)} is not finite"
        assert not np.array_equal(old, new), f"{jax.tree_util.keystr(path)} never moved"
    for path, old, new in _leaves(start.frozen, end.frozen):
        allowed = leaf_name(path) in subject.case.updated
        assert allowed or np.array_equal(old, new), f"frozen {jax.tree_util.keystr(path)} moved"
    after = paths.flatten(subject.params)
    assert before.keys() == after.keys(), "bind changed the base tree"
    assert all(before[path] is after[path] for path in before), "bind changed a base leaf"


def _leaves(start: Any, end: Any) -> list[tuple[Any, np.ndarray, np.ndarray]]:
    pairs = zip(jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(end), strict=True)
    return [(path, np.asarray(old), np.asarray(new)) for (path, old), new in pairs]


def gradient_reaches_leaves(subject: Subject) -> None:
    """At step 0 the leaves without a gradient are those the row declares, and no others."""
    grads = subject.trained.history[0][3]
    assert shapes(grads) == shapes(subject.state.trainable), "gradients of another structure"
    largest = _largest(grads)
    assert largest > 0, "no leaf has a gradient"
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        is_zero = _largest(leaf) <= 1e-7 * largest
        declared = leaf_name(path) in subject.case.zero_grad_at_start
        assert is_zero == declared, (
            f"the gradient of {jax.tree_util.keystr(path)} at step 0 is "
            f"{'zero' if is_zero else 'not zero'}; zero_grad_at_start says otherwise"
        )


def carries_through_scan(subject: Subject) -> None:
    """Two updates inside lax.scan: the carry keeps its structure, shapes and dtypes."""

    def body(carry: Any, index: jax.Array) -> tuple[Any, jax.Array]:
        state, moments, loss, _ = subject.trained.step(
            subject.params, *carry, index, subject.inputs, subject.context
        )
        return (state, moments), loss

    steps, traces = jnp.arange(2, dtype=jnp.int32), subject.trained.traces
    carry = jax.eval_shape(lambda c: jax.lax.scan(body, c, steps)[0], subject.trained.start())
    subject.trained.traces = traces
    assert shapes(carry) == shapes(subject.trained.start())


# --- structure ---


def counts_its_parameters(subject: Subject) -> None:
    """The trainable scalars are those of the card's formula, abstractly too."""
    counted, formula = pefts.count(subject.state.trainable), subject.case.count(subject.sites)
    assert counted == formula, f"{counted} trainable scalars, the formula says {formula}"
    if subject.peft.traits.shapes_from_values:
        return
    abstract = jax.eval_shape(
        lambda: subject.peft.init(jax.random.key(0), subject.params, subject.stats)
    )
    assert shapes(abstract) == shapes(subject.state), "abstract init has other shapes"


def keeps_bfloat16(subject: Subject) -> None:
    """A bfloat16 base stays so through merge and forward; the state stays float32."""
    params, moved = base_bfloat16(), subject.moved
    if not subject.peft.traits.shapes_from_values:
        state = jax.eval_shape(subject.peft.init, jax.random.key(1), params, subject.stats)
        assert shapes(state) == shapes(moved), "a bfloat16 base changes the state"
    out = jax.jit(lambda s: forward(subject, params, s))(moved)
    base = jax.eval_shape(base_forward(), params, *subject.inputs)
    assert out.dtype == base.dtype, f"outputs are {out.dtype}, the base model's {base.dtype}"
    if subject.peft.traits.mergeable:
        dense = jax.jit(subject.peft.merge)(params, moved)
        assert shapes(dense) == shapes(params), "merge changed a shape, a dtype or the structure"
        expected = base_forward()(dense, *subject.inputs)
        close(out, expected, BFLOAT16, "factored against merged outputs in bfloat16")


def scanned_equals_unrolled(subject: Subject) -> None:
    """One state, as scanned layers and sliced into unrolled ones, gives the same outputs."""
    peft = subject.build(model_axes(False))

    def unrolled(params: Any, state: Any) -> tuple[Any, Any]:
        return tiny.unroll(params), pefts.PeftState(*(_sliced(group) for group in state))

    def run(base: Any, stacked: Any) -> jax.Array:
        params, state = unrolled(base, stacked)
        return forward(subject, params, state, peft=peft, scanned=False)

    if subject.stats is None and not subject.peft.traits.shapes_from_values:
        params, state = jax.eval_shape(unrolled, subject.params, subject.moved)
        own = jax.eval_shape(peft.init, jax.random.key(1), params)
        assert shapes(own) == shapes(state), "init on unrolled layers has other shapes"
    out = jax.jit(run)(subject.params, subject.moved)
    close(out, subject.forward(subject.moved), FLOAT32, "unrolled against scanned outputs")


def _sliced(groups: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, group in groups.items():
        if not path.startswith("layers/"):
            out[path] = group
            continue
        for index in range(tiny.LAYERS):
            unrolled = path.replace("layers/", f"layers_{index}/", 1)
            out[unrolled] = {name: leaf[index] for name, leaf in group.items()}
    return out


def mixes_in_a_batch(subject: Subject) -> None:
    """A batch whose examples have one adapter, another or none is the separate runs' rows."""
    states = [subject.moved, jax.jit(pefts.randomize)(jax.random.key(8), subject.state)]
    mixed = pefts.per_example(pefts.apply(tiny.Classifier().apply), subject.peft)
    which = np.arange(tiny.BATCH) % 3 - 1

    def run(stacked: Any, which: Any) -> jax.Array:
        args = (subject.params, stacked, which, *subject.inputs)
        return mixed(*args, context=subject.context)

    if subject.declaration.rule.inputs is not None:
        with pytest.raises(ValueError, match="batches of their own"):
            run(pefts.stack(states), which)
        return
    together = jax.jit(run)(pefts.stack(states), which)
    alone = [*map(subject.forward, states), base_forward()(subject.params, *subject.inputs)]
    expected = np.stack([np.asarray(alone[index])[row] for row, index in enumerate(which)])
    close(together, expected, FLOAT32, "outputs of a mixed batch")


def shards(subject: Subject) -> None:
    """Eight devices, the batch over all and kernels cut along d_in, do one device's step."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    axes = model_axes(True)

    def kernel_spec(path: str, leaf: jax.Array) -> P:
        letters = next((v for pattern, v in axes.items() if re.search(pattern, path)), "")
        cut = letters.find("i")
        return P(*["fsdp" if n == cut else None for n in range(leaf.ndim)])

    def put(tree: Any, spec: P) -> Any:
        return jax.device_put(tree, NamedSharding(mesh, spec))

    flat = paths.flatten(subject.params)
    params = paths.unflatten({k: put(v, kernel_spec(k, v)) for k, v in flat.items()})
    state, moments = put(subject.trained.start(), P())
    batch = put((subject.inputs, dict(subject.context)), P(("data", "fsdp")))
    index = put(jnp.asarray(0, jnp.int32), P())
    traces = subject.trained.traces
    _, _, loss, grads = jax.jit(lambda *args: subject.trained.step(*args))(
        params, state, moments, index, *batch
    )
    subject.trained.traces = traces
    _, _, expected, expected_grads = subject.trained.history[0]
    close(loss, expected, FLOAT32, "loss on eight devices")
    largest = _largest(expected_grads)
    for path, one, many in _leaves(expected_grads, grads):
        error = np.abs(one - many).max()
        assert error <= FLOAT32 * largest, (
            f"eight devices: gradient of {jax.tree_util.keystr(path)} off by {error / largest:.1e}"
        )


def rejects_bad_inputs(subject: Subject) -> None:
    """Each documented bad input raises ValueError with the documented text."""
    assert subject.case.bad, "the row documents no bad input"
    build = pefts.METHODS[subject.case.method]
    for kwargs, match in subject.case.bad:
        with pytest.raises(ValueError, match=match):
            arguments = {"axes": model_axes(True), **subject.case.kwargs, **kwargs}
            build(**arguments).init(jax.random.key(0), subject.params, subject.stats)


def rebuilds_from_config(subject: Subject) -> None:
    """The config survives JSON and makes the same state."""
    peft = pefts.from_config(json.loads(json.dumps(subject.peft.config)))
    assert peft.config == json.loads(json.dumps(subject.peft.config))
    same(subject.started(peft), subject.state, "state of the rebuilt method")


def saves_and_loads(subject: Subject) -> None:
    """A file gives back the method and every bit of the state."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "adapter.safetensors")
        pefts.save(file, subject.peft, subject.moved, subject.params)
        peft, state = pefts.load(file, subject.params)
    assert peft.config == json.loads(json.dumps(subject.peft.config)), "the config changed"
    same(state, subject.moved, "loaded state")


def documents_itself(subject: Subject) -> None:
    build = pefts.METHODS[subject.case.method]
    text = build.__doc__ or ""
    missing = [section for section in SECTIONS if section not in text]
    assert not missing, f"the docstring of {subject.case.method} lacks {missing}"


def keeps_its_structure(subject: Subject) -> None:
    """Names, shapes and dtypes of the state are those that were committed."""
    found = {
        part: {path: [list(s), d] for path, (s, d) in _flat_shapes(tree).items()}
        for part, tree in subject.state._asdict().items()
    }
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    file = GOLDEN / f"{row_id(subject.case)}.json"
    if os.environ.get("PEFTS_REGENERATE") == "1":
        GOLDEN.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    where = f"tests/golden/structures/{file.name}"
    assert file.exists(), f"{where} is missing: run with PEFTS_REGENERATE=1, or add it as\n{text}"
    assert json.loads(file.read_text()) == found, (
        f"the state of {subject.case.method} differs from {where}. Adapters that users saved have "
        "the old structure: undo the change or, if it is meant, run with PEFTS_REGENERATE=1 and "
        f"commit\n{text}"
    )


def _flat_shapes(tree: Any) -> dict[str, tuple]:
    return {path: (leaf.shape, str(leaf.dtype)) for path, leaf in paths.flatten(tree).items()}


Property = Callable[[Subject], None]
PROPERTIES: tuple[Property, ...] = (
    starts_at_identity,
    random_state_changes_outputs,
    factored_equals_merged,
    gradients_flow,
    matches_oracle,
    jit_equals_eager,
    uses_dropout_stream,
    compiles_once,
    trains_only_trainable,
    gradient_reaches_leaves,
    carries_through_scan,
    counts_its_parameters,
    keeps_bfloat16,
    scanned_equals_unrolled,
    mixes_in_a_batch,
    shards,
    rejects_bad_inputs,
    rebuilds_from_config,
    saves_and_loads,
    documents_itself,
    keeps_its_structure,
)
REQUIRES: dict[Property, tuple[str, Callable[[Subject], bool]]] = {
    starts_at_identity: ("traits.identity_at_init", lambda s: s.peft.traits.identity_at_init),
    factored_equals_merged: ("traits.mergeable", lambda s: s.peft.traits.mergeable),
    uses_dropout_stream: ("traits.stochastic", lambda s: s.peft.traits.stochastic),
    scanned_equals_unrolled: ("not row.layers_share", lambda s: not s.case.layers_share),
}
# What compiles much and tells little of a method's second row: it runs on the first one.
ONCE_A_METHOD: frozenset[Property] = frozenset(
    {
        compiles_once,
        jit_equals_eager,
        keeps_bfloat16,
        mixes_in_a_batch,
        scanned_equals_unrolled,
        shards,
    }
)
