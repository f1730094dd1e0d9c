"""The contract's own parts: composition, states, counting, configs, errors."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from subject import base_params, calibrated, model_axes, row_id

import pefts
from pefts import core, paths
from pefts.bound import Call, Rule
from pefts.core import Declaration, Traits
from pefts.targets import Site, selection


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(7, name="up")(x))
        return nn.Dense(3, name="classifier")(nn.Dense(5, name="down")(x))


X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return Mlp().init(jax.random.key(0), X)["params"]


def factored(peft: pefts.Peft, params: Any, state: Any, **context: Any) -> jax.Array:
    return pefts.apply(Mlp().apply)({"params": peft.bind(params, state, **context)}, X)


def merged(peft: pefts.Peft, params: Any, state: Any) -> jax.Array:
    return Mlp().apply({"params": peft.merge(params, state)}, X)


def moved(peft: pefts.Peft, params: Any, seed: int = 1) -> pefts.PeftState:
    state = peft.init(jax.random.key(seed), params)
    return pefts.randomize(jax.random.key(seed + 10), state)


def scaling(name: str, **changes: Any) -> pefts.Peft:
    """A method whose product is the base's times a trainable factor."""

    def init(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, W, site, stats
        return {"factor": jnp.ones(())}, {}

    rule = Rule(
        init,
        effective=lambda W, p, call: W * p["factor"].astype(W.dtype),
        linear=lambda x, W, p, call: call.dot(x, W) * p["factor"].astype(x.dtype),
    )
    fields = {"rule": rule, "selection": selection(), **changes}
    return core.lift(Declaration(**fields), {"method": name})


# --- chain ---


def test_chain_adds_deltas(params: dict) -> None:
    members = pefts.lora(rank=2), pefts.lora(rank=3, alpha=6)
    both = pefts.chain(*members)
    state = moved(both, params)
    delta = sum(
        member.merge(params, core.PeftState(state.trainable[label], state.frozen[label]))["up"][
            "kernel"
        ]
        - params["up"]["kernel"]
        for label, member in zip("01", members, strict=True)
    )
    found = both.merge(params, state)["up"]["kernel"] - params["up"]["kernel"]
    assert np.allclose(found, delta, atol=1e-6)
    assert np.abs(delta).max() > 1e-3
    assert np.allclose(factored(both, params, state), merged(both, params, state), atol=1e-5)


def test_chain_keeps_its_order(params: dict) -> None:
    """(W + AB) f is not W f + AB."""
    inner = pefts.chain(pefts.lora(rank=2), scaling("scaling"))
    outer = pefts.chain(scaling("scaling"), pefts.lora(rank=2))
    state = moved(inner, params)
    swapped = core.PeftState(
        {"0": state.trainable["1"], "1": state.trainable["0"]},
        {"0": state.frozen["1"], "1": state.frozen["0"]},
    )
    for peft, own in ((inner, state), (outer, swapped)):
        assert np.allclose(factored(peft, params, own), merged(peft, params, own), atol=1e-5)
    assert not np.allclose(factored(inner, params, state), factored(outer, params, swapped))


def test_chains_nest(params: dict) -> None:
    flat = pefts.chain(pefts.lora(rank=2), pefts.lora(rank=3), scaling("s"))
    nested = pefts.chain(pefts.chain(pefts.lora(rank=2), pefts.lora(rank=3)), scaling("s"))
    state = moved(flat, params)

    def nest(group: dict) -> dict:
        return {"0": {"0": group["0"], "1": group["1"]}, "1": group["2"]}

    inside = core.PeftState(nest(state.trainable), nest(state.frozen))
    out = factored(flat, params, state)
    assert np.allclose(factored(nested, params, inside), out, atol=1e-6)
    assert np.allclose(merged(nested, params, inside), out, atol=1e-5)


def test_full_after_lora_on_one_kernel_is_refused(params: dict) -> None:
    wrong = pefts.chain(pefts.lora(rank=2), pefts.full(targets="up/kernel"))
    with pytest.raises(ValueError, match="'up/kernel' is already adapted.*before the other"):
        wrong.bind(params, wrong.init(jax.random.key(0), params))


def test_full_before_lora_trains_both(params: dict) -> None:
    peft = pefts.chain(pefts.full(targets="up/kernel"), pefts.lora(rank=2))
    state = moved(peft, params)
    assert np.allclose(factored(peft, params, state), merged(peft, params, state), atol=1e-5)
    grads = jax.grad(lambda t: factored(peft, params, state._replace(trainable=t)).sum())(
        state.trainable
    )
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_empty_chain_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one method"):
        pefts.chain()


# --- partition ---


def test_partition_gives_each_part_its_method(params: dict) -> None:
    peft = pefts.partition(
        {"low": pefts.lora(rank=1), "high": pefts.lora(rank=3), "head": pefts.head_only()},
        {"up": "low", "down": "high", "classifier": "head"},
    )
    state = moved(peft, params)
    assert state.trainable["low"]["up/kernel"]["A"].shape == (6, 1)
    assert state.trainable["high"]["down/kernel"]["A"].shape == (7, 3)
    assert set(state.trainable["head"]) == {"classifier/kernel", "classifier/bias"}
    assert np.allclose(factored(peft, params, state), merged(peft, params, state), atol=1e-5)


def test_first_label_wins(params: dict) -> None:
    methods = {"a": pefts.lora(rank=1), "b": pefts.lora(rank=2)}
    peft = pefts.partition(methods, {"up": "a", "kernel": "b"})
    state = peft.init(jax.random.key(0), params)
    assert set(state.trainable["a"]) == {"up/kernel"}
    assert set(state.trainable["b"]) == {"down/kernel"}


def test_partition_by_a_function_leaves_the_rest_frozen(params: dict) -> None:
    peft = pefts.partition({"a": pefts.lora(rank=1)}, lambda path: "a" if "up" in path else None)
    state = moved(peft, params)
    assert set(state.trainable["a"]) == {"up/kernel"}
    dense = peft.merge(params, state)
    assert np.array_equal(dense["down"]["kernel"], params["down"]["kernel"])
    with pytest.raises(ValueError, match="labelled by a function"):
        pefts.from_config(peft.config)


def test_unknown_label_is_refused() -> None:
    with pytest.raises(ValueError, match=r"labels name 'lw'; the methods given are \['low'\]"):
        pefts.partition({"low": pefts.lora(rank=1)}, {"up": "lw"})


@pytest.mark.parametrize(
    "labels",
    [
        {"kernel|bias": "low", "up": "high"},
        {"kernel": "low"},
        lambda path: "low" if "kernel" in path else None,
    ],
)
def test_method_without_parameters_is_refused(params: dict, labels: Any) -> None:
    peft = pefts.partition({"low": pefts.lora(rank=1), "high": pefts.head_only()}, labels)
    with pytest.raises(ValueError, match=r"no parameter to 'high' \(head_only\).*first match wins"):
        peft.init(jax.random.key(0), params)


def test_unknown_label_from_a_function_is_refused(params: dict) -> None:
    peft = pefts.partition({"low": pefts.lora(rank=1)}, lambda path: path.split("/")[0])
    with pytest.raises(ValueError, match=r"the label 'up'; the methods given are \['low'\]"):
        peft.init(jax.random.key(0), params)


def test_label_pattern_without_parameters_is_refused(params: dict) -> None:
    peft = pefts.partition({"low": pefts.lora(rank=1)}, {"up": "low", "dwn": "low"})
    with pytest.raises(ValueError, match=r"labels: 'dwn' matches no parameter. Near names: .*down"):
        peft.init(jax.random.key(0), params)


# --- states ---


def test_stack_refuses_other_ranks(params: dict) -> None:
    states = [pefts.lora(rank=r).init(jax.random.key(0), params) for r in (2, 3)]
    with pytest.raises(ValueError, match=r"states\[1\] has other shapes.*pad=True"):
        pefts.stack(states)


def test_stack_refuses_other_targets(params: dict) -> None:
    states = [
        pefts.lora(rank=2, targets=[name]).init(jax.random.key(0), params)
        for name in ("up", "up", "down")
    ]
    with pytest.raises(ValueError, match=r"states\[2\] has another structure"):
        pefts.stack(states)


def test_stack_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one state"):
        pefts.stack([])


def test_count_works_on_shapes(params: dict) -> None:
    peft = pefts.lora(rank=2)
    abstract = jax.eval_shape(peft.init, jax.random.key(0), params)
    expected = 2 * (6 + 7) + 2 * (7 + 5)
    assert pefts.count(abstract.trainable) == expected
    assert pefts.count(peft.init(jax.random.key(0), params).trainable) == expected
    assert pefts.count({"scalar": jnp.ones(())}) == 1


def test_randomize_moves_trainable_leaves_alone(params: dict) -> None:
    state = pefts.lora(rank=2).init(jax.random.key(0), params)
    far = pefts.randomize(jax.random.key(1), state, scale=0.5)
    assert jax.tree.structure(far) == jax.tree.structure(state)
    for old, new in zip(*map(jax.tree.leaves, (state.trainable, far.trainable)), strict=True):
        assert old.dtype == new.dtype and not np.array_equal(old, new)
    for old, new in zip(*map(jax.tree.leaves, (state.frozen, far.frozen)), strict=True):
        assert np.array_equal(old, new)
    step = np.concatenate(
        [
            np.ravel(new - old)
            for old, new in zip(
                *map(jax.tree.leaves, (state.trainable, far.trainable)), strict=True
            )
        ]
    )
    assert 0.3 < step.std() < 0.7


def test_state_of_another_model_is_refused(params: dict) -> None:
    peft = pefts.lora(rank=2)
    state = peft.init(jax.random.key(0), params)
    other = {**params, "upper": params["up"]}
    other.pop("up")
    for use in (peft.bind, peft.merge):
        with pytest.raises(ValueError, match="adapts 'up/kernel', which these parameters do not"):
            use(other, state)


def test_bind_and_merge_leave_the_base_alone(params: dict) -> None:
    before = paths.flatten(params)
    peft = pefts.chain(pefts.full(), pefts.lora(rank=2))
    state = moved(peft, params)
    peft.bind(params, state), peft.merge(params, state)
    after = paths.flatten(params)
    assert before.keys() == after.keys() and all(before[p] is after[p] for p in before)


# --- context, shared state, penalty, update, traits ---


def test_context_reaches_the_product(params: dict) -> None:
    def init(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, stats
        return {"table": jnp.zeros((2, site.d_out)) + W[:1]}, {}

    def linear(x: jax.Array, W: Any, p: Any, call: Call) -> jax.Array:
        return call.dot(x, W) + p["table"][call.context["tasks"]]

    rule = Rule(init, linear=linear)
    traits = Traits(mergeable=False, identity_at_init=False, needs=("context",))
    declaration = Declaration(rule, selection(targets="up"), traits)
    peft = core.lift(declaration, {"method": "per_task"})
    state = moved(peft, params)
    tasks = jnp.asarray([0, 1, 1, 0])
    out = jax.jit(lambda s, t: factored(peft, params, s, tasks=t))(state, tasks)
    one = factored(peft, params, state, tasks=jnp.zeros(4, jnp.int32))
    assert np.allclose(out[:1], one[:1], atol=1e-6) and not np.allclose(out[1:2], one[1:2])
    with pytest.raises(ValueError, match="per_task cannot be merged.*pefts.apply"):
        peft.merge(params, state)
    chained = pefts.chain(peft, pefts.lora(rank=2))
    fresh = chained.init(jax.random.key(0), params)
    fresh = fresh._replace(trainable={**fresh.trainable, "0": state.trainable})
    assert np.allclose(factored(chained, params, fresh, tasks=tasks), out, atol=1e-6)


def test_shared_state_reaches_every_site_and_its_own_method(params: dict) -> None:
    def init(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del key, W, site, stats
        return {"gate": jnp.ones(())}, {}

    rule = Rule(
        init,
        effective=lambda W, p, call: W * (p["gate"] * call.shared["factor"]).astype(W.dtype),
        linear=lambda x, W, p, call: call.dot(x, W) * p["gate"] * call.shared["factor"],
    )

    def make(value: float) -> pefts.Peft:
        shared = lambda key, sites: ({"factor": jnp.float32(value)}, {})  # noqa: E731
        declaration = Declaration(rule, selection(), init_shared=shared)
        return core.lift(declaration, {"method": "shared"})

    peft = pefts.chain(make(2.0), make(3.0))
    state = peft.init(jax.random.key(0), params)
    assert float(state.trainable["1"]["shared"]["factor"]) == 3.0
    dense = peft.merge(params, state)
    assert np.allclose(dense["up"]["kernel"], 6 * params["up"]["kernel"], rtol=1e-6)
    out = jax.jit(lambda s: factored(peft, params, s))(state)
    assert np.allclose(out, merged(peft, params, state), atol=1e-5)


def test_penalties_and_updates_of_members(params: dict) -> None:
    def penalty(state: pefts.PeftState, params: Any = None) -> jax.Array:
        del params
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(state.trainable))

    def update(state: pefts.PeftState, grads: Any, step: jax.Array) -> pefts.PeftState:
        moved = jax.tree.map(lambda leaf, g: leaf + g * step, state.trainable, grads)
        return state._replace(trainable=moved)

    changes = {"penalty": penalty, "update": update}
    peft = pefts.chain(scaling("a", **changes), pefts.lora(rank=2), scaling("b", **changes))
    state = peft.init(jax.random.key(0), params)
    assert float(peft.penalty(state)) == 4.0
    assert float(pefts.lora(rank=2).penalty(state)) == 0.0
    grads = jax.tree.map(jnp.ones_like, state.trainable)
    new = peft.update(state, grads, jnp.asarray(2.0))
    assert {float(leaf) for leaf in jax.tree.leaves(new.trainable["0"])} == {3.0}
    assert np.array_equal(
        new.trainable["1"]["up/kernel"]["A"], state.trainable["1"]["up/kernel"]["A"]
    )


def test_traits_combine() -> None:
    first = Traits(mergeable=False, stochastic=True, needs=("gradient",), restart_steps=(5, 2))
    second = Traits(
        identity_at_init=False,
        needs=("gradient", "second_moment"),
        shapes_from_values=True,
        restart_steps=(2, 9),
    )
    both = pefts.chain(scaling("a", traits=first), scaling("b", traits=second)).traits
    assert both == Traits(
        mergeable=False,
        identity_at_init=False,
        stochastic=True,
        needs=("gradient", "second_moment"),
        shapes_from_values=True,
        restart_steps=(2, 5, 9),
    )
    assert pefts.chain(pefts.lora(rank=2)).traits == pefts.lora(rank=2).traits


def test_missing_statistics_are_named(params: dict) -> None:
    peft = scaling("hungry", traits=Traits(needs=("second_moment",)))
    with pytest.raises(
        ValueError, match="hungry initialises from the statistic 'second_moment'.*calibrate"
    ):
        peft.init(jax.random.key(0), params)


# --- patterns ---

TARGETS = "(up|down)/kernel"


def initial(peft: pefts.Peft) -> dict[str, Any]:
    """A fresh state on the tiny model, flat."""
    needs = tuple(sorted(set(peft.traits.needs) - {core.CONTEXT}))
    stats = calibrated(needs, peft.traits.components) if needs else None
    return paths.flatten(peft.init(jax.random.key(0), base_params(), stats)._asdict())


@pytest.mark.parametrize("argument", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("row", CASES, ids=row_id)
def test_patterns_take_effect_or_are_refused(row: Case, argument: str) -> None:
    """A method whose kernels have no rank or no alpha says so by name; the others use it."""
    own = {name: value for name, value in row.kwargs.items() if not name.endswith("_pattern")}
    given = {**own, "targets": TARGETS, "axes": model_axes(True)}
    build = functools.partial(pefts.METHODS[row.method], **given)
    noun, declared = argument.partition("_")[0], pefts.METHODS[row.method].__wrapped__(**row.kwargs)
    if not getattr(declared, noun):
        refusal = rf"^{argument}=.* the kernels of {row.method} have no {noun}"
        with pytest.raises(ValueError, match=refusal):
            build(**{argument: {"up": 2}})
        return
    default = getattr(declared, noun)
    value = default - 1 if default > 1 else 2
    plain, patterned = initial(build()), initial(build(**{argument: {"up": value}}))
    # A rank may also decide which leaves there are.
    differ = set(plain) ^ set(patterned)
    both = set(plain) & set(patterned)
    differ |= {path for path in both if not np.array_equal(plain[path], patterned[path])}
    # Ranks that are divided over all kernels may move elsewhere, or stay where steps are coarse.
    if declared.prepare is None:
        sites = {path for path in differ if f"/{core.SHARED}/" not in path}
        assert sites and all("up/kernel" in path for path in sites)


def test_the_methods_with_a_rank_and_an_alpha() -> None:
    """The refusals above are not won by forgetting to declare them."""
    for name in ("adalora", "bottleneck", "dora", "lora"):
        row = next(row for row in CASES if row.method == name)
        declared = pefts.METHODS[name].__wrapped__(**row.kwargs)
        assert declared.rank in row.kwargs.values() and declared.alpha is not None
    assert pefts.bottleneck.__wrapped__(scale=0.5).alpha == 0.5


def test_no_pattern_of_an_own_method_is_ignored() -> None:
    for argument, value in (("rank_pattern", 2), ("alpha_pattern", 2.5)):
        with pytest.raises(ValueError, match=f"{argument}={{'up': {value}}}: the kernels of plain"):
            scaling("plain", selection=selection(**{argument: {"up": value}}))
    peft = scaling("ranked", selection=selection(rank_pattern={"up": 2}), rank=3)
    assert peft.config == {"method": "ranked"}


# --- configs ---


def test_configs_rebuild_compositions(params: dict) -> None:
    peft = pefts.partition(
        {
            "body": pefts.chain(pefts.lora(rank=2), pefts.lora(rank=1, targets=["up"])),
            "head": pefts.head_only(),
        },
        {"up|down": "body", "classifier": "head"},
    )
    again = pefts.from_config(peft.config)
    assert again.config == peft.config
    first, second = (p.init(jax.random.key(3), params) for p in (peft, again))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"method": "lroa"}, r"method='lroa' is unknown; near names: \[.*'lora'"),
        ({"method": "qqqq"}, r"method='qqqq' is unknown. The methods are \["),
        ({"rank": 2}, "method=None is unknown"),
        ({"method": "lora", "ranks": 2}, "lora has no argument 'ranks'"),
    ],
)
def test_bad_configs(config: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pefts.from_config(config)


def test_every_method_returns_the_contract() -> None:
    for name, build in pefts.METHODS.items():
        assert isinstance(build, type(pefts.lora)) and build.__name__ == name
    assert list(pefts.METHODS) == sorted(pefts.METHODS)
    assert isinstance(pefts.lora(), pefts.Peft)


def test_a_partition_takes_no_leaf_for_the_reserved_key(key: jax.Array) -> None:
    params = {name: {"kernel": jnp.ones((6, 4))} for name in ("pefts_body", "other")}
    split = pefts.partition(
        {"a": pefts.lora(rank=1, targets="."), "b": pefts.lora(rank=2, targets=".")},
        {"body": "a", "other": "b"},
    )
    state = split.init(key, params)
    assert set(state.trainable["a"]) == {"pefts_body/kernel"}
    assert set(state.trainable["b"]) == {"other/kernel"}
