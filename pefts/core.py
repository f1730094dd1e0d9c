"""The contract: a parameter-efficient method is a pure transform of a parameter pytree.

    state  = peft.init(key, params)                  # PeftState(trainable, frozen)
    bound  = peft.bind(params, state)                # adapted kernels in the dense ones' places
    logits = pefts.apply(model.apply)({"params": bound}, tokens)
    dense  = peft.merge(params, state)               # plain parameters again

A method's own file says what happens to one kernel, seen as a matrix W (d_in, d_out), as a `Rule`.
`lift` turns the rule into a `Peft`: it picks the kernels, views them as matrices, maps over stacked
layers and builds init, bind and merge. The base parameters are never changed.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pefts import paths, targets, views
from pefts.bound import Ambient, BoundKernel, Rule, effective_kernel, next_owner
from pefts.targets import Selection, Site

Params = Mapping[str, Any]
SHARED = "shared"  # the key of a state under which lies what belongs to all sites at once


class PeftState(NamedTuple):
    """What a method adds to a model: {site path: {name: array}}, and {"shared": {name: array}}."""

    trainable: Any
    frozen: Any


@dataclasses.dataclass(frozen=True)
class Traits:
    """What holds for a method; tests and tools filter by these, never by name."""

    mergeable: bool = True  # `merge` exists
    identity_at_init: bool = True  # a fresh state leaves the model's outputs unchanged
    stochastic: bool = False  # the product uses the "dropout" random stream when there is one
    needs: tuple[str, ...] = ()  # of "activations", "gradients" (calibrate) and "context"
    shapes_from_values: bool = False  # state shapes depend on the weights: no abstract init
    restart_steps: tuple[int, ...] = ()  # after these updates the optimizer's moments are void


class InitFn(Protocol):
    def __call__(self, key: jax.Array, params: Params, stats: Any = None) -> PeftState: ...


class BindFn(Protocol):
    def __call__(self, params: Params, state: PeftState, **context: Any) -> dict[str, Any]: ...


class MergeFn(Protocol):
    def __call__(self, params: Params, state: PeftState) -> dict[str, Any]: ...


class PenaltyFn(Protocol):
    def __call__(self, state: PeftState) -> jax.Array: ...


class UpdateFn(Protocol):
    def __call__(self, state: PeftState, grads: Any, step: jax.Array) -> PeftState: ...


class Peft(NamedTuple):
    """A method with its hyperparameters: pure functions and two descriptions of itself."""

    init: InitFn  # (key, params, stats) -> state
    bind: BindFn  # (params, state, **context) -> params with bound kernels
    merge: MergeFn  # (params, state) -> dense params, same structure and dtypes
    penalty: PenaltyFn  # (state) -> scalar to add to the loss
    update: UpdateFn  # (state, grads, step) -> state; after each optimizer step, under jit
    traits: Traits
    config: Mapping[str, Any]  # {"method": name, **hyperparameters}: JSON-able, rebuilds the method


class Declaration(NamedTuple):
    """What a method file hands to `lift`."""

    rule: Rule
    selection: Selection
    traits: Traits = Traits()
    rank: int = 0  # 0: the kernels have no rank of their own, and rank_pattern is refused
    alpha: float | None = None  # None: no Site.alpha is read, and alpha_pattern is refused
    init_shared: Callable[[jax.Array, tuple[Site, ...]], tuple[dict, dict]] | None = None
    penalty: PenaltyFn | None = None
    update: UpdateFn | None = None


def zero_penalty(state: PeftState) -> jax.Array:
    """The penalty of a method that has none."""
    del state
    return jnp.zeros((), jnp.float32)


def no_update(state: PeftState, grads: Any, step: jax.Array) -> PeftState:
    """The update of a method without a schedule."""
    del grads, step
    return state


def factory(fn: Callable[..., Declaration]) -> Callable[..., Peft]:
    """Turn a function (hyperparameters, **select) -> Declaration into one that returns a `Peft`.

    The call's arguments become `Peft.config`, from which `pefts.from_config` rebuilds the method.
    """
    signature = inspect.signature(fn)
    named = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]

    @functools.wraps(fn)
    def build(*args: Any, **kwargs: Any) -> Peft:
        unknown = sorted(set(kwargs) - set(named) - set(targets.Select.__annotations__))
        if unknown:
            known = sorted([*named, *targets.Select.__annotations__])
            raise ValueError(f"{fn.__name__} has no argument {unknown[0]!r}; it takes {known}.")
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        select = call.arguments.pop("select", {})
        given = {**call.arguments, **select}
        # As JSON gives it back, so that a rebuilt method carries an equal config.
        given = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}
        config = {"method": fn.__name__, **given}
        return lift(fn(*args, **kwargs), config)

    return build


def lift(declaration: Declaration, config: Mapping[str, Any]) -> Peft:
    """Build a `Peft` from the mathematics of one kernel.

    Raises:
      ValueError: a rank_pattern or an alpha_pattern, for a method without a rank or an alpha.
    """
    _check_patterns(declaration, str(config["method"]))
    rule, traits, owner = declaration.rule, declaration.traits, next_owner()
    select = functools.partial(
        declaration.selection.resolve, rank=declaration.rank, alpha=declaration.alpha
    )

    def init(key: jax.Array, params: Params, stats: Any = None) -> PeftState:
        flat = paths.flatten(params)
        sites = tuple(_plan(rule, site, flat[site.path]) for site in select(params))
        _check_stats(traits, stats, sites, config)
        trainable, frozen = {}, {}
        for site in sites:
            site_stats = None if stats is None else stats.get(site.path)
            pair = _init_site(rule, key, site, flat[site.path], site_stats)
            trainable[site.path], frozen[site.path] = pair
        if declaration.init_shared is not None:
            shared_key = targets.site_key(key, SHARED)
            trainable[SHARED], frozen[SHARED] = declaration.init_shared(shared_key, sites)
        state = PeftState(_without_empty(trainable), _without_empty(frozen))
        # A leaf may still be the base's own buffer, or twice the same; a step that donates its
        # state would then delete the base.
        return jax.tree.map(jnp.copy, state)

    def sites_of(params: Params, state: PeftState) -> tuple[dict[str, Any], list, Ambient]:
        flat, by_site = paths.flatten(params), _by_site(state)
        ambient = flat.pop(paths.RESERVED, Ambient({}, {})).extended(owner, by_site.pop(SHARED, {}))
        axes = _site_axes(declaration.selection, flat, by_site)
        bound = [
            BoundKernel(flat[path], site_state, rule, axes[path], path, owner)
            for path, site_state in by_site.items()
        ]
        return flat, bound, ambient

    def bind(params: Params, state: PeftState, **context: Any) -> dict[str, Any]:
        flat, bound, ambient = sites_of(params, state)
        ambient = ambient.with_context(context)
        for kernel in bound:
            now = rule.eager or kernel.is_vector
            flat[kernel.path] = _dense_leaf(kernel, ambient) if now else kernel
        return paths.unflatten({**flat, paths.RESERVED: ambient})

    def merge(params: Params, state: PeftState) -> dict[str, Any]:
        if not traits.mergeable:
            raise ValueError(
                f"{config['method']} cannot be merged into the kernels; run the model with "
                "pefts.apply(...) on peft.bind(params, state) instead."
            )
        flat, bound, ambient = sites_of(params, state)
        return paths.unflatten({**flat, **{k.path: _dense_leaf(k, ambient) for k in bound}})

    return Peft(
        init,
        bind,
        merge,
        declaration.penalty or zero_penalty,
        declaration.update or no_update,
        traits,
        config,
    )


def count(tree: Any) -> int:
    """The number of scalars in a tree; works on abstract shapes too."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def randomize(key: jax.Array, state: PeftState, scale: float = 0.1) -> PeftState:
    """The state moved away from the identity: each trainable leaf plus N(0, scale^2)."""
    leaves, treedef = jax.tree.flatten(state.trainable)
    keys = jax.random.split(key, len(leaves))
    moved = [
        leaf + scale * jax.random.normal(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return state._replace(trainable=jax.tree.unflatten(treedef, moved))


def stack(states: list[PeftState]) -> PeftState:
    """K states of one structure as one with a leading axis K on every leaf, for jax.vmap.

    Raises:
      ValueError: the states differ in structure or in a leaf's shape.
    """
    if not states:
        raise ValueError("pefts.stack needs at least one state; it was given none.")
    shapes = [jax.tree.map(jnp.shape, state) for state in states]
    for index, other in enumerate(shapes[1:], start=1):
        if other != shapes[0]:
            raise ValueError(
                f"states[{index}] has another structure or other shapes than states[0]; stack only "
                "states that one method made with the same ranks and targets."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _check_patterns(declaration: Declaration, method: str) -> None:
    select = declaration.selection
    for argument, given, known in (
        ("rank", select.rank_pattern, declaration.rank != 0),
        ("alpha", select.alpha_pattern, declaration.alpha is not None),
    ):
        if given and not known:
            raise ValueError(
                f"{argument}_pattern={dict(given)!r}: the kernels of {method} have no {argument} "
                "of their own; leave it out, or give them two methods by pefts.partition."
            )


def _check_stats(
    traits: Traits, stats: Any, sites: tuple[Site, ...], config: Mapping[str, Any]
) -> None:
    wanted = [need for need in traits.needs if need in ("activations", "gradients")]
    missing = [site.path for site in sites if site.path not in (stats or {})]
    if wanted and missing:
        raise ValueError(
            f"{config['method']} initialises from {' and '.join(wanted)}, and there are none for "
            f"{missing[0]!r}: call stats = pefts.calibrate(lambda variables, batch: "
            "model.apply(variables, ...), params, batches, targets=...) with the method's own "
            "targets, and then peft.init(key, params, stats)."
        )


def _plan(rule: Rule, site: Site, leaf: jax.Array) -> Site:
    if rule.plan is None:
        return site
    static = rule.plan(views.to_matrix(leaf, site.axes), site)
    return dataclasses.replace(site, static=tuple(sorted(static.items())))


def _init_site(
    rule: Rule, key: jax.Array, site: Site, leaf: Any, stats: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    key = targets.site_key(key, site.path)
    matrix = views.to_matrix(leaf, site.axes)
    one = functools.partial(rule.init, site=site)
    if not site.stack:
        return one(key, matrix, stats=stats)
    keys = jax.random.split(key, site.stack)
    for _ in site.stack:
        one = jax.vmap(one)
    return one(keys, matrix, stats=stats)


def _by_site(state: PeftState) -> dict[str, dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {path: dict(group) for path, group in state.frozen.items()}
    for path, group in state.trainable.items():
        merged.setdefault(path, {}).update(group)
    return merged


def _site_axes(
    selection: Selection, flat: Mapping[str, Any], by_site: Mapping[str, Any]
) -> dict[str, str]:
    missing = sorted(set(by_site) - set(flat))
    if missing:
        raise ValueError(
            f"the state adapts {missing[0]!r}, which these parameters do not have: it was made by "
            "peft.init for another model."
        )
    return {path: selection.axes_of(path, tuple(flat[path].shape)) for path in by_site}


def _dense_leaf(kernel: BoundKernel, ambient: Ambient) -> jax.Array:
    if isinstance(kernel.base, BoundKernel):
        raise ValueError(
            f"{kernel.path!r} is already adapted, and this method replaces the whole leaf: put it "
            "before the other methods in pefts.chain, or give it other targets."
        )
    return effective_kernel(kernel, ambient)


def _without_empty(groups: dict[str, Any]) -> dict[str, Any]:
    return {path: group for path, group in groups.items() if group}
