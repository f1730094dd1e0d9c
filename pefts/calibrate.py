"""Statistics of a model's kernels on data, for the methods that start from them: `calibrate`.

Every targeted kernel is bound to a probe: dummy leaves of zeros beside it, and a product that is
the kernel's own. The probe's backward pass hands back, as the cotangent of the dummy leaves, the
statistic of the inputs it saw. One reverse pass over the probed model is then the whole tree of
statistics, layer axis in front, through nn.scan and nn.remat and with no change to the model.

    second_moment   E[x xT] (d_in, d_in) over unmasked rows
    sample_moment   E[X^T X] (d_in, d_in) over examples X (tokens, d_in), each scaled by its maximum
    gradient        dLoss/dW (d_in, d_out), averaged over batches
    squared_gradient  (dLoss/dW)^2 entry by entry, averaged over batches
    components      the k leading principal directions of the centred inputs (k, d_in)

Kernels that multiply the same input (query, key and value) have one probe for its statistics, and
get the same arrays.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefts import paths, shared_inputs
from pefts.bound import Call, Rule, State
from pefts.core import GRADIENTS, Declaration, Params, Peft, PeftState, lift
from pefts.inject import apply
from pefts.principal import matmul, merge
from pefts.targets import Selection, Site, Targets, first, selection

OF_INPUTS = ("pca", "sample_moment", "second_moment")
COLLECTIONS = (*GRADIENTS, *OF_INPUTS)
Stats = dict[str, dict[str, jax.Array]]
Groups = Mapping[str, Mapping[str, jax.Array]]
Keep = Callable[[str], bool]


@jax.tree_util.register_static
class _Path(str):
    """A site's path in its state, for error messages: no leaf, so scan and vmap let it pass."""


class _Request(NamedTuple):
    """What to collect, and where."""

    collect: tuple[str, ...]
    components: int | None
    selection: Selection
    keep: Keep  # the paths that a method's part of the parameters holds


class _Plan(NamedTuple):
    """What one call of `calibrate` decided before it saw any data."""

    collect: tuple[str, ...]
    components: int
    sites: tuple[Site, ...]
    leader: Mapping[str, str]  # site path -> path of the site that carries its input's probe
    probe: Peft
    run: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any], jax.Array]
    weights: Callable[[Any], jax.Array] | None


def calibrate(
    fn: Callable[[Any, Any], Any],
    params: Params,
    batches: Iterable[Any],
    targets: Targets | Peft = "all-linear",
    *,
    collect: Sequence[str] | None = None,
    components: int | None = None,
    loss: Callable[[Any, Any], jax.Array] | None = None,
    weights: Callable[[Any], jax.Array] | str | None = None,
    exclude: Targets = (),
    axes: Mapping[str, str] | None = None,
    adapted: bool = False,
) -> Stats:
    """Collect statistics of the targeted kernels over batches: {path: {name: (*stack, ...) array}}.

        second_moment = sum_n w_n x_n x_nT / sum_n w_n        x_n (d_in,), w_n in {0, 1}

    Every result is float32 with the stacked (scanned) axes in front, as peft.init takes them.
    Batches stream: nothing of a batch is kept but the statistics, and all batches of one shape
    share one compiled call. Batches may be sharded over devices.

    Args:
      fn: `fn(variables, batch)` runs the model, e.g. lambda variables, batch:
        model.apply(variables, batch["tokens"]). Best called without dropout.
      params: the base parameters.
      batches: pytrees of arrays, read once.
      targets: as in every method, see pefts.targets.Select; also `exclude` and `axes`. Or a method:
        what it needs is then collected where it will adapt, and `collect`, `components`, `exclude`
        and `axes` are its own. Of a chain or a partition, the one member that needs anything.
      collect: any of the following; ("second_moment",) by default.
        "second_moment": "second_moment" (d_in, d_in), "mean" (d_in,), "count" (); the covariance is
          second_moment - outer(mean, mean).
        "sample_moment": "sample_moment" (d_in, d_in), the mean over examples (axis 0 of the input)
          of X^T X, where X (tokens, d_in) was divided by |its largest entry|, with the sign in the
          comparison; by 1 if that is 0. "samples" (), the examples with an unmasked row; "count".
        "gradient": "gradient" (d_in, d_out), the mean over batches of the gradient of `loss`.
        "squared_gradient": "squared_gradient" (d_in, d_out), the mean over batches of the square of
          each entry of that gradient; over examples, for batches of one.
        "pca": "components" (k, d_in), orthonormal rows, the largest entry of each positive;
          "explained_variance" (k,), with divisor count - 1; "explained_variance_ratio" (k,), of the
          total variance, the same with either divisor; "cosine" (k,), |cos| between each component
          and the one in its place before the last batch, 0 after a single batch; "mean"; "count".
          Exact for k = d_in and for data of rank k. A module that runs twice in a batch is refused
          here, and adds up in the others.
      components: k, for "pca".
      loss: `loss(outputs, batch)`, a scalar, for "gradient" and "squared_gradient".
      weights: `weights(batch)`, or the name of a batch entry: (batch, length), 1 for the rows that
        count and 0 for padding. A site with one row for each example counts the examples that have
        any row. The gradient has no weights but those in `loss`.
      adapted: fn runs bound kernels by itself, as one that ends in pefts.nnx.apply does. Shared
        inputs are not looked for then.

    Returns:
      {site path: {statistic: array}}. Sites with the same input hold the same arrays (`is`), but
      for the two of gradients.

    Raises:
      ValueError: no batches, only padding, no match for targets, embeddings or convolutions among
        them (unless for gradients alone), params of another model, a site that the model never
        runs as a linear module, activations that are not finite, fewer rows than components,
        weights that fit no rows, a method that needs nothing, or several that do.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, pefts
      >>> model, x = nn.Dense(3), jnp.ones((2, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> stats = pefts.calibrate(lambda v, batch: model.apply(v, batch), params, [x, x], "kernel")
      >>> stats["kernel"]["second_moment"].shape, float(stats["kernel"]["count"])
      ((5, 5), 4.0)

    Source: the second moments serve CorDA (arXiv 2406.05223; its own are the sample moments), the
      gradients LoRA-GA (2407.05000) and LoRA-SB (2411.19557), their squares SensZOQ (2406.02913),
      the components EVA (2410.07170).
    """
    request = _request(targets, collect, components, exclude, axes)
    _check_collect(request.collect, request.components, loss, weights)
    sites = request.selection.resolve(paths.keep(params, request.keep))
    _check_sites(sites, request.collect, request.components)
    stream = iter(batches)
    batch = next(stream, None)
    if batch is None:
        raise ValueError("batches is empty: pefts.calibrate needs at least one batch.")
    leader = {site.path: site.path for site in sites}
    if not adapted:
        leader = shared_inputs.leaders(fn, params, batch, sites)
    plan = _Plan(
        request.collect,
        request.components or 0,
        sites,
        leader,
        probe=lift(
            Declaration(_probe_rule(request.collect), request.selection), {"method": "probe"}
        ),
        run=fn if adapted else shared_inputs.checked(apply(fn), leader),
        loss=loss or _sum_of_outputs,
        weights=_from_entry(weights) if isinstance(weights, str) else weights,
    )
    stream = itertools.chain([batch], stream)
    del batch  # or it would stay to the end
    total, used = _totals(plan, params, stream)
    _check_total(plan, total, used)
    return _results(plan, total["sites"], used)


def _totals(plan: _Plan, params: Params, batches: Iterable[Any]) -> tuple[dict[str, Any], int]:
    """What the probes have seen in all batches, and how many those were."""
    step = jax.jit(functools.partial(_step, plan), donate_argnums=0)
    total, used = _empty(plan), 0
    for batch in batches:
        # Waits, or the host would run ahead and hold every batch until its turn.
        total, used = jax.block_until_ready(step(total, params, batch)), used + 1
    return total, used


# What is asked for


def _request(
    targets: Targets | Peft,
    collect: Sequence[str] | None,
    components: int | None,
    exclude: Targets,
    axes: Mapping[str, str] | None,
) -> _Request:
    if isinstance(targets, Peft):
        given = {"collect": collect, "components": components, "exclude": exclude, "axes": axes}
        more = [name for name, value in given.items() if value is not None and value != ()]
        if more:
            raise ValueError(
                f"{more[0]}={given[more[0]]!r}: {targets.config['method']} brings its own; leave "
                "it out, or give the method's targets instead of the method."
            )
        return _of_method(targets)
    names = ("second_moment",) if collect is None else collect
    names = (names,) if isinstance(names, str) else tuple(names)
    chosen = selection(targets=targets, exclude=exclude, axes=axes)
    return _Request(names, components, chosen, _everywhere)


def _of_method(peft: Peft) -> _Request:
    """What the one method with needs asks for, itself or as a member of a composition."""
    # Inside, because the registry imports every method.
    from pefts.registry import from_config

    name, found = peft.config["method"], []
    for config, keep in _methods(peft.config, _everywhere):
        traits = peft.traits if config is peft.config else from_config(config).traits
        names = tuple(need for need in traits.needs if need in COLLECTIONS)
        if names:
            found.append((config, keep, names, traits.components if "pca" in names else None))
    if not found:
        raise ValueError(f"{name} starts from no statistics: call peft.init(key, params) as it is.")
    if len(found) > 1:
        needy = [config["method"] for config, *_ in found]
        raise ValueError(
            f"{needy} in this {name} all start from statistics: calibrate each of them by itself, "
            "and join the dicts of each path."
        )
    config, keep, names, components = found[0]
    where = {argument: config.get(argument) for argument in ("targets", "exclude", "axes")}
    return _Request(names, components, selection(**where), keep)


def _everywhere(path: str) -> bool:
    del path
    return True


def _methods(config: Mapping[str, Any], keep: Keep) -> Iterator[tuple[Mapping[str, Any], Keep]]:
    """The configs of all methods in a composition, each with the paths of its part."""
    members = config.get("members")
    if members is None:
        yield config, keep
    elif isinstance(members, Mapping):
        for label, member in members.items():
            yield from _methods(member, _part(keep, config["labels"], label))
    else:
        for member in members:
            yield from _methods(member, keep)


def _part(keep: Keep, labels: Mapping[str, str] | None, label: str) -> Keep:
    if labels is None:  # they were given as a function, which no config holds
        return keep
    return lambda path: keep(path) and first(labels.items(), path, None) == label


def _check_collect(names: tuple[str, ...], components: int | None, loss: Any, weights: Any) -> None:
    unknown = sorted(set(names) - set(COLLECTIONS))
    if unknown or not names:
        raise ValueError(f"collect={names!r}: give one or more of {COLLECTIONS}.")
    if bool(set(names) & set(GRADIENTS)) != (loss is not None):
        raise ValueError(
            f"collect={names!r} with loss={loss!r}: 'gradient' and loss(outputs, batch) go "
            "together, and so do 'squared_gradient' and loss."
        )
    if ("pca" in names) != (components is not None):
        raise ValueError(
            f"collect={names!r} with components={components!r}: 'pca' and a number of components "
            "go together."
        )
    if weights is not None and not set(names) & set(OF_INPUTS):
        raise ValueError("weights do not reach a gradient: leave them out, and mask inside `loss`.")


def _check_sites(sites: Iterable[Site], collect: tuple[str, ...], components: int | None) -> None:
    of_inputs = sorted(set(collect) & set(OF_INPUTS))
    for site in sites:
        if of_inputs and (site.is_embedding or "k" in site.axes):
            kind = "an embedding" if site.is_embedding else "a convolution"
            raise ValueError(
                f"collect: {of_inputs[0]!r} is not defined for {site.path!r}, {kind}: exclude it "
                '("gradient" and "squared_gradient" work there, by themselves).'
            )
        if components is not None and not 1 <= components <= site.d_in:
            raise ValueError(
                f"components={components!r} is out of range for {site.path!r}, whose inputs have "
                f"{site.d_in} features: choose 1 to {site.d_in}."
            )


def _from_entry(name: str) -> Callable[[Any], jax.Array]:
    def read(batch: Any) -> jax.Array:
        if not isinstance(batch, Mapping) or name not in batch:
            keys = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"weights={name!r} names no entry of the batch, which is {keys}.")
        return batch[name]

    return read


def _sum_of_outputs(outputs: Any, batch: Any) -> jax.Array:
    """A loss whose gradient reaches every probe; its value does not matter."""
    del batch
    leaves = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not leaves:
        raise ValueError(
            "fn returned no floating-point output: calibrate needs one to run backward from."
        )
    return sum((jnp.sum(x.astype(jnp.float32)) for x in leaves), start=jnp.zeros((), jnp.float32))


# One batch


def _empty(plan: _Plan) -> dict[str, Any]:
    shapes = {site.path: _shapes(plan, site) for site in plan.sites}
    zeros = {
        site.path: {
            name: jnp.zeros((*site.stack, *shape), jnp.float32)
            for name, shape in shapes[site.path].items()
        }
        for site in plan.sites
        if shapes[site.path]
    }
    return {"sites": zeros, "weights": jnp.zeros((), jnp.float32)}


def _shapes(plan: _Plan, site: Site) -> dict[str, tuple[int, ...]]:
    """Of one slice of a site's statistics, each of which is a dummy leaf of its probe."""
    d_in, k = site.d_in, plan.components
    shapes: dict[str, tuple[int, ...]] = {}
    for name in set(plan.collect) & set(GRADIENTS):
        shapes[name] = (d_in, site.d_out)
    if plan.leader[site.path] != site.path or not set(plan.collect) & set(OF_INPUTS):
        return shapes
    shapes |= {"calls": (), "count": ()}
    if "second_moment" in plan.collect:
        shapes |= {"second_moment": (d_in, d_in), "sum": (d_in,)}
    if "sample_moment" in plan.collect:
        shapes |= {"sample_moment": (d_in, d_in), "samples": ()}
    if "pca" in plan.collect:
        shapes |= {"components": (k, d_in), "singular": (k,), "cosine": (k,)}
        shapes |= {"center": (d_in,), "scatter": ()}
    return shapes


# Replaced by each batch, not added to.
MERGED = ("components", "singular", "cosine", "center", "scatter")


def _step(plan: _Plan, total: dict[str, Any], params: Params, batch: Any) -> dict[str, Any]:
    weights, before = None, total["sites"]
    if plan.weights is not None:
        weights = jnp.asarray(plan.weights(batch)).astype(jnp.float32)
    frozen = {
        path: {
            "path": _Path(path),
            "so_far": {name: group[name] for name in ("count", *MERGED) if name in group},
        }
        for path, group in before.items()
    }

    def run(dummies: Groups) -> jax.Array:
        bound = plan.probe.bind(params, PeftState(dummies, frozen), weights=weights)
        return plan.loss(plan.run({"params": bound}, batch), batch)

    seen = jax.grad(run)(jax.tree.map(jnp.zeros_like, before))
    new = {path: _accumulate(before[path], group) for path, group in seen.items()}
    rows = jnp.ones(()) if weights is None else jnp.sum(weights)
    return {"sites": new, "weights": total["weights"] + rows}


def _accumulate(before: State, seen: State) -> dict[str, jax.Array]:
    """Sums add up; what the probe has merged already replaces, unless the module did not run.

    A gradient is squared here, where it is the whole batch's: a module may run more than once.
    """

    def one(name: str, x: jax.Array) -> jax.Array:
        if name == "squared_gradient":
            return before[name] + x * x
        if name not in MERGED:
            return before[name] + x
        ran = seen["calls"] > 0
        return jnp.where(ran.reshape(*ran.shape, *[1] * (x.ndim - ran.ndim)), x, before[name])

    return {name: one(name, x) for name, x in seen.items()}


# The probe


def _probe_rule(collect: tuple[str, ...]) -> Rule:
    """A product that changes nothing and whose backward pass measures."""
    of_inputs = bool(set(collect) & set(OF_INPUTS))
    gradients = sorted(set(collect) & set(GRADIENTS))

    def init(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        raise NotImplementedError("the states of a probe are made by calibrate.")

    def linear(x: jax.Array, W: Any, p: State, call: Call) -> jax.Array:
        if x.shape[-1] != W.shape[0]:
            raise ValueError(
                f"{p['path']!r} has {W.shape[0]} rows in these params, and the model gives it "
                f"{x.shape[-1]} features: pass the parameters that belong to this model."
            )
        if "count" in p:
            weights = _row_weights(x, call.context.get("weights"), p["path"])
            known = ("path", "so_far", *GRADIENTS)
            dummies = {name: p[name] for name in p if name not in known}
            x = _see_inputs(x, weights, dummies, p["so_far"])
        y = call.dot(x, W)
        for name in gradients:
            y = _see_gradient(y, x, p[name])
        return y

    def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
        del call
        return functools.reduce(lambda W, name: W + p[name].astype(W.dtype), gradients, W)

    return Rule(init, linear=linear, effective=None if of_inputs else effective)


def _row_weights(x: jax.Array, weights: jax.Array | None, path: str) -> jax.Array:
    """One weight for each row of x (..., d_in)."""
    rows = x.shape[:-1]
    if weights is None:
        return jnp.ones(rows, jnp.float32).reshape(-1)
    shared = min(len(rows), weights.ndim)
    if not shared or rows[:shared] != weights.shape[:shared]:
        raise ValueError(
            f"weights of shape {weights.shape} do not fit the inputs of {path!r}, of shape "
            f"{x.shape}: their leading axes must agree, (batch, length) with (batch, length, ..., "
            "features)."
        )
    kept = jnp.max(weights, axis=tuple(range(shared, weights.ndim)))
    kept = kept.reshape(*kept.shape, *[1] * (len(rows) - shared))
    return jnp.broadcast_to(kept, rows).reshape(-1)


@jax.custom_vjp
def _see_inputs(x: jax.Array, weights: jax.Array, dummies: State, so_far: State) -> jax.Array:
    """x itself; the cotangent of the dummies is what there is to know of x."""
    del weights, dummies, so_far
    return x


def _see_inputs_forward(
    x: jax.Array, weights: jax.Array, dummies: State, so_far: State
) -> tuple[jax.Array, Any]:
    return x, (x, weights, dummies, so_far)


def _see_inputs_backward(saved: Any, g: jax.Array) -> tuple[Any, ...]:
    x, weights, dummies, so_far = saved
    # Padding may hold anything, NaN included: choose, do not multiply.
    x_NxI = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    x_NxI = jnp.where(weights[:, None] > 0, x_NxI, jnp.zeros_like(x_NxI))
    new = {"calls": jnp.ones((), jnp.float32), "count": jnp.sum(weights)}
    if "second_moment" in dummies:
        weighted = x_NxI * weights[:, None]
        new["second_moment"] = matmul(weighted.T, x_NxI)
        new["sum"] = jnp.sum(weighted, axis=0)
    if "sample_moment" in dummies:
        examples = x.shape[0] if x.ndim > 1 else 1
        new |= _sample_moment(x_NxI, weights > 0, examples)
    if "components" in dummies:
        new |= merge(so_far, x_NxI, weights)
    return g, None, new, None


_see_inputs.defvjp(_see_inputs_forward, _see_inputs_backward)


def _sample_moment(x_NxI: jax.Array, kept_N: jax.Array, examples: int) -> dict[str, jax.Array]:
    """The sum of X^T X over examples X / |max X|, from rows that are zero where not kept."""
    X_BxTxI = x_NxI.reshape(examples, -1, x_NxI.shape[1])
    kept_BxT = kept_N.reshape(examples, -1)
    # NOTE(paper): the released code divides by the maximum even where that is zero.
    max_B = jnp.max(X_BxTxI, axis=(1, 2), where=kept_BxT[:, :, None], initial=-jnp.inf)
    usable_B = jnp.isfinite(max_B) & (jnp.abs(max_B) >= jnp.finfo(max_B.dtype).tiny)
    scale_B = jnp.where(usable_B, jnp.abs(max_B), jnp.ones_like(max_B))
    scaled_NxI = (X_BxTxI / scale_B[:, None, None]).reshape(x_NxI.shape)
    samples = jnp.sum(jnp.any(kept_BxT, axis=1).astype(jnp.float32))
    return {"sample_moment": matmul(scaled_NxI.T, scaled_NxI), "samples": samples}


@jax.custom_vjp
def _see_gradient(y: jax.Array, x: jax.Array, dummy: jax.Array) -> jax.Array:
    """y itself; the cotangent of the dummy is xT g in float32, whatever the model computes in."""
    del x, dummy
    return y


def _see_gradient_forward(
    y: jax.Array, x: jax.Array, dummy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del dummy
    return y, x


def _see_gradient_backward(x: jax.Array, g: jax.Array) -> tuple[Any, ...]:
    x_NxI, g_NxO = (a.reshape(-1, a.shape[-1]).astype(jnp.float32) for a in (x, g))
    return g, None, matmul(x_NxI.T, g_NxO)


_see_gradient.defvjp(_see_gradient_forward, _see_gradient_backward)


# After the last batch


def _check_total(plan: _Plan, total: Mapping[str, Any], used: int) -> None:
    if plan.weights is not None and not float(total["weights"]) > 0:
        raise ValueError("weights are zero for every row of every batch: there is only padding.")
    for path, group in total["sites"].items():
        bad = [name for name, value in group.items() if not bool(jnp.all(jnp.isfinite(value)))]
        if bad:
            what = "gradient" if set(bad) <= set(GRADIENTS) else "inputs"
            raise ValueError(
                f"the {what} of {path!r} became NaN or infinite (first such site by path): "
                "check the batches and the dtype there."
            )
        if "count" in group:
            _check_rows(plan, path, group, used)


def _check_rows(plan: _Plan, path: str, group: Mapping[str, jax.Array], used: int) -> None:
    calls, count = np.asarray(group["calls"]), np.asarray(group["count"])
    if not calls.all() or not count.all():
        raise ValueError(
            f"{path!r} saw no input that counts: fn's floating-point outputs do not depend on "
            "it (a stop_gradient?), or it runs on padding alone. Exclude it."
        )
    if "pca" not in plan.collect:
        return
    if calls.max() > used:
        raise ValueError(
            f"'pca' needs modules that run once in a batch, and {path!r} runs more often: "
            "exclude it, or collect its second moments."
        )
    if count.min() < plan.components:
        raise ValueError(
            f"components={plan.components} is more than the {int(count.min())} rows that "
            f"{path!r} saw: give more batches or fewer components."
        )


def _results(plan: _Plan, groups: Groups, used: int) -> Stats:
    of_inputs = {path: _of_inputs(group) for path, group in groups.items()}
    stats = {site.path: dict(of_inputs[plan.leader[site.path]]) for site in plan.sites}
    for path, group in groups.items():
        stats[path] |= {name: group[name] / used for name in GRADIENTS if name in group}
    return stats


def _of_inputs(group: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The statistics of what a leader's probe has summed up."""

    def over(name: str, divisor: jax.Array) -> jax.Array:
        value = group[name] ** 2 if name == "singular" else group[name]
        return value / divisor.reshape(*divisor.shape, *[1] * (value.ndim - divisor.ndim))

    if "count" not in group:
        return {}
    count = group["count"]
    stats = {"count": count}
    if "components" in group:
        stats |= {"components": group["components"], "cosine": group["cosine"]}
        stats["mean"] = group["center"]
        stats["explained_variance"] = over("singular", jnp.maximum(count - 1, 1))
        scatter = jnp.maximum(group["scatter"], jnp.finfo(jnp.float32).tiny)
        stats["explained_variance_ratio"] = over("singular", scatter)
    if "second_moment" in group:
        stats["second_moment"] = over("second_moment", count)
        stats["mean"] = over("sum", count)
    if "sample_moment" in group:
        stats["sample_moment"] = over("sample_moment", group["samples"])
        stats["samples"] = group["samples"]
    return stats
