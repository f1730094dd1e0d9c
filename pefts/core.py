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

from pefts import deferred, paths, targets, views
from pefts.bound import (
    Ambient,
    BoundKernel,
    Rule,
    effective_kernel,
    merged_bias,
    next_owner,
)
from pefts.targets import Selection, Site

Params = Mapping[str, Any]
Sites = tuple[Site, ...]
GRADIENTS = ("gradient", "squared_gradient")  # the statistics that are as large as their kernel
CONTEXT = "context"  # among a method's needs: arguments of `bind` that depend on the batch
FULL_PRECISION = functools.partial(jax.default_matmul_precision, "highest")
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
    decodes: bool = True  # token by token through a cache is the same as all at once
    stochastic: bool = False  # the product uses the "dropout" random stream when there is one
    needs: tuple[str, ...] = ()  # statistics of pefts.calibrate by name, and "context"
    components: int = 0  # how many of them, where "pca" is among the needs
    shapes_from_values: bool = False  # state shapes depend on the weights: no abstract init
    restart_steps: tuple[int, ...] = ()  # after these updates the optimizer's moments are void
    reads_gradients: bool = False  # `update` looks at the step's gradients


class InitFn(Protocol):
    def __call__(self, key: jax.Array, params: Params, stats: Any = None) -> PeftState: ...


class BindFn(Protocol):
    def __call__(self, params: Params, state: PeftState, **context: Any) -> dict[str, Any]: ...


class MergeFn(Protocol):
    def __call__(self, params: Params, state: PeftState) -> dict[str, Any]: ...


class PenaltyFn(Protocol):
    def __call__(self, state: PeftState, params: Params | None = None) -> jax.Array: ...


class UpdateFn(Protocol):
    def __call__(self, state: PeftState, grads: Any, step: jax.Array) -> PeftState: ...


class Peft(NamedTuple):
    """A method with its hyperparameters: pure functions and two descriptions of itself."""

    init: InitFn  # (key, params, stats) -> state
    bind: BindFn  # (params, state, **context) -> params with bound kernels
    merge: MergeFn  # (params, state) -> dense params, same structure and dtypes
    penalty: PenaltyFn  # (state, params) -> scalar to add to the loss; most need no params
    update: UpdateFn  # (state, grads, step) -> state; after each optimizer step, under jit
    traits: Traits
    config: Mapping[str, Any]  # {"method": name, **hyperparameters}: JSON-able, rebuilds the method


class PrepareFn(Protocol):
    def __call__(
        self, sites: Sites, matrix_of: Callable[[Site], jax.Array], stats: Any
    ) -> tuple[Sites, Any]: ...


class Declaration(NamedTuple):
    """What a method file hands to `lift`."""

    rule: Rule
    selection: Selection
    traits: Traits = Traits()
    rank: int = 0  # 0: the kernels have no rank of their own, and rank_pattern is refused
    alpha: float | None = None  # None: no Site.alpha is read, and alpha_pattern is refused
    # Decides over all sites before any is initialised: static facts, ranks, which sites stay. What
    # it puts into a site's stats reaches `rule.init`, one slice (*stack, ...) for each layer.
    prepare: PrepareFn | None = None
    init_shared: Callable[[jax.Array, Sites], tuple[dict, dict]] | None = None
    penalty: PenaltyFn | None = None
    update: UpdateFn | None = None
    failure: str = "its decomposition failed"  # why a finite kernel may give a state of NaN or Inf
    unmergeable: str = ""  # why, and what to do instead, where traits.mergeable is False


def zero_penalty(state: PeftState, params: Params | None = None) -> jax.Array:
    """The penalty of a method that has none."""
    del state, params
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
    spec = inspect.getfullargspec(fn)
    named = [*spec.args, *spec.kwonlyargs]

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
        sites = select(params)
        _check_stats(traits, stats, sites, config)
        with FULL_PRECISION():
            state = _init_sites(declaration, key, flat, sites, stats)
        _check_finite(state, flat, declaration.failure, str(config["method"]))
        # A leaf may still be the base's own buffer, or twice the same; a step that donates its
        # state would then delete the base.
        return jax.tree.map(jnp.copy, state)

    def sites_of(params: Params, state: PeftState) -> tuple[dict[str, Any], list, Ambient]:
        flat, by_site = paths.flatten(params), _by_site(state)
        shared = deferred.arrays(by_site.pop(SHARED, {}))
        ambient = flat.pop(paths.RESERVED, Ambient({}, {})).extended(owner, shared)
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
            # What is not there yet is made in its layer, or it would be there for all at once.
            later = any(map(deferred.is_deferred, kernel.state.values()))
            now = not later and (rule.eager or kernel.is_vector)
            flat[kernel.path] = _dense_leaf(kernel, ambient) if now else kernel
        return paths.unflatten({**flat, paths.RESERVED: ambient})

    def merge(params: Params, state: PeftState) -> dict[str, Any]:
        if not traits.mergeable:
            why = declaration.unmergeable and f" ({declaration.unmergeable})"
            raise ValueError(
                f"{config['method']} cannot be merged into the kernels{why}; run the model with "
                "pefts.apply(...) on peft.bind(params, state) instead."
            )
        flat, bound, ambient = sites_of(params, state)
        with FULL_PRECISION():
            dense = {k.path: _dense_leaf(k, ambient) for k in bound}
            biases = _merged_biases(flat, bound, ambient)
        return paths.unflatten({**flat, **dense, **biases})

    def penalty(state: PeftState, params: Params | None = None) -> jax.Array:
        return (declaration.penalty or zero_penalty)(deferred.arrays(state), params)

    return Peft(
        init,
        bind,
        merge,
        penalty,
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


def _check_stats(traits: Traits, stats: Any, sites: Sites, config: Mapping[str, Any]) -> None:
    for need in traits.needs:
        if need == CONTEXT:
            continue
        name = "components" if need == "pca" else need
        for site in sites:
            found = (stats or {}).get(site.path, {})
            if name not in found:
                raise ValueError(
                    f"{config['method']} initialises from the statistic {need!r}, and there is "
                    f"none for {site.path!r}: call stats = pefts.calibrate(lambda variables, "
                    "batch: model.apply(variables, ...), params, batches, peft), and then "
                    "peft.init(key, params, stats)."
                )
            _check_stat(name, tuple(found[name].shape), site)


def _check_stat(name: str, shape: tuple[int, ...], site: Site) -> None:
    last = (site.d_out,) if name in GRADIENTS else (site.d_in,)
    rows = shape[-2:-1] if name == "components" else (site.d_in,)
    expected = (*site.stack, *rows, *last)
    if shape != expected:
        raise ValueError(
            f"stats: {name!r} of {site.path!r} has shape {shape}, and a kernel of shape "
            f"{site.shape} needs {expected}: they were collected from another model; call "
            "pefts.calibrate with these params."
        )


def _init_sites(
    declaration: Declaration, key: jax.Array, flat: Mapping[str, Any], sites: Sites, stats: Any
) -> PeftState:
    def matrix_of(site: Site) -> jax.Array:
        return views.to_matrix(flat[site.path], site.axes)

    if declaration.prepare is not None:
        sites, stats = declaration.prepare(sites, matrix_of, stats)
    trainable, frozen = {}, {}
    for site in sites:
        site_stats = None if stats is None else stats.get(site.path)
        pair = _init_site(declaration.rule, key, site, matrix_of(site), site_stats)
        trainable[site.path], frozen[site.path] = pair
    if declaration.init_shared is not None:
        shared_key = targets.site_key(key, SHARED)
        trainable[SHARED], frozen[SHARED] = declaration.init_shared(shared_key, sites)
    return PeftState(_without_empty(trainable), _without_empty(frozen))


def _init_site(
    rule: Rule, key: jax.Array, site: Site, matrix: jax.Array, stats: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    key = targets.site_key(key, site.path)
    keys = jax.random.split(key, site.stack) if site.stack else key

    def one(args: tuple[jax.Array, jax.Array, Any]) -> tuple[dict, dict]:
        return rule.init(args[0], args[1], site=site, stats=args[2])

    run: Callable[[Any], Any] = one
    # One layer after the other: a decomposition's workspace, and the gathering of a kernel that is
    # sharded over devices, are those of a single matrix.
    for _ in site.stack:
        run = functools.partial(jax.lax.map, run)
    return run((keys, matrix, stats))


def _check_finite(state: PeftState, flat: Mapping[str, Any], failure: str, method: str) -> None:
    """Refuse a state with NaN or Inf; inside jit, where values are unknown, nothing is checked."""
    groups = [*state.trainable.items(), *state.frozen.items()]
    for path, name, leaf in ((path, *item) for path, group in groups for item in group.items()):
        if _is_finite(leaf):
            continue
        bad_kernel = path in flat and not _is_finite(flat[path])
        reason = "the kernel itself holds NaN or infinite values" if bad_kernel else failure
        raise ValueError(
            f"{method}: the initial {name!r} of {path!r} is not finite: {reason}. Repair or "
            "exclude it."
        )


def _is_finite(leaf: Any) -> bool:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return True
    try:
        return bool(jnp.all(jnp.isfinite(leaf)))
    except jax.errors.ConcretizationTypeError:
        return True


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


def _merged_biases(
    flat: Mapping[str, Any], bound: list[BoundKernel], ambient: Ambient
) -> dict[str, jax.Array]:
    """The biases that change where their kernels are merged."""
    merged = {}
    for kernel in bound:
        path = paths.join(*kernel.path.split("/")[:-1], "bias")
        if kernel.rule.bias is not None and path in flat:
            merged[path] = merged_bias(kernel, flat[path], ambient)
        elif kernel.rule.needs_bias:
            raise ValueError(
                f"the method on {kernel.path!r} moves a part of itself into the bias {path!r}, "
                "which these parameters lack: run it unmerged, or target layers with a bias."
            )
    return merged


def _without_empty(groups: dict[str, Any]) -> dict[str, Any]:
    return {path: group for path, group in groups.items() if group}
