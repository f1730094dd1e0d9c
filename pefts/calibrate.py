"""Statistics of a model's kernels on data, for the methods that start from them: `calibrate`.

Every targeted kernel is bound to a probe: dummy leaves of zeros beside it, and a product that is
the kernel's own. The probe's backward pass hands back, as the cotangent of the dummy leaves, the
statistic of the inputs it saw. One reverse pass over the probed model is then the whole tree of
statistics, layer axis in front, through nn.scan and nn.remat and with no change to the model.

    second_moment   E[x xT] (d_in, d_in) over unmasked rows
    gradient        dLoss/dW (d_in, d_out), averaged over batches
    components      the k leading principal directions of the centred inputs (k, d_in)
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefts.bound import Call, Rule, State
from pefts.core import Declaration, Params, Peft, PeftState, Traits, lift
from pefts.inject import apply
from pefts.principal import matmul, merge
from pefts.targets import Site, Targets, selection

COLLECTIONS = ("gradient", "pca", "second_moment")
OF_INPUTS = ("pca", "second_moment")
Stats = dict[str, dict[str, jax.Array]]
Groups = Mapping[str, Mapping[str, jax.Array]]


@jax.tree_util.register_static
class _Path(str):
    """A site's path in its state, for error messages: no leaf, so scan and vmap let it pass."""


class _Plan(NamedTuple):
    """What one call of `calibrate` decided before it saw any data."""

    collect: tuple[str, ...]
    components: int
    sites: tuple[Site, ...]
    probe: Peft
    run: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any], jax.Array]
    weights: Callable[[Any], jax.Array] | None


def calibrate(
    fn: Callable[[Any, Any], Any],
    params: Params,
    batches: Iterable[Any],
    targets: Targets = "all-linear",
    *,
    collect: Sequence[str] = ("second_moment",),
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
      targets: as in every method, see pefts.targets.Select; also `exclude` and `axes`.
      collect: any of
        "second_moment": "second_moment" (d_in, d_in), "mean" (d_in,), "count" (); the covariance is
          second_moment - outer(mean, mean).
        "gradient": "gradient" (d_in, d_out), the mean over batches of the gradient of `loss`.
        "pca": "components" (k, d_in), orthonormal rows, the largest entry of each positive;
          "explained_variance" (k,), with divisor count - 1; "explained_variance_ratio" (k,), of the
          total variance; "mean"; "count". Exact for k = d_in and for data of rank k. A module that
          runs twice in a batch is refused here, and adds up in the other two.
      components: k, for "pca".
      loss: `loss(outputs, batch)`, a scalar, for "gradient".
      weights: `weights(batch)`, or the name of a batch entry: (batch, length), 1 for the rows that
        count and 0 for padding. A site with one row for each example counts the examples that have
        any row. The gradient has no weights but those in `loss`.
      adapted: fn runs bound kernels by itself, as one that ends in pefts.nnx.apply does.

    Returns:
      {site path: {statistic: array}}.

    Raises:
      ValueError: no batches, only padding, no match for targets, embeddings or convolutions among
        them (unless for "gradient" alone), a site that the model never runs as a linear module,
        activations that are not finite, fewer rows than components, weights that fit no rows.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, pefts
      >>> model, x = nn.Dense(3), jnp.ones((2, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> stats = pefts.calibrate(lambda v, batch: model.apply(v, batch), params, [x, x], "kernel")
      >>> stats["kernel"]["second_moment"].shape, float(stats["kernel"]["count"])
      ((5, 5), 4.0)

    Source: the second moments serve CorDA (arXiv 2406.05223), the gradients LoRA-GA (2407.05000)
      and LoRA-SB (2411.19557), the components EVA (2410.07170).
    """
    names = _check_collect(collect, components, loss, weights)
    chosen = selection(targets=targets, exclude=exclude, axes=axes)
    sites = chosen.resolve(params)
    _check_sites(sites, names, components)
    probe = lift(Declaration(_probe_rule(names), chosen, Traits()), {"method": "calibrate"})
    run = fn if adapted else apply(fn)
    read_weights = _from_entry(weights) if isinstance(weights, str) else weights
    plan = _Plan(names, components or 0, sites, probe, run, loss or _sum_of_outputs, read_weights)
    step = jax.jit(functools.partial(_step, plan), donate_argnums=0)
    total, used = _empty(plan), 0
    for batch in batches:
        total, used = step(total, params, batch), used + 1
    if not used:
        raise ValueError("batches is empty: pefts.calibrate needs at least one batch.")
    _check_total(plan, total, used)
    return {site.path: _finish(plan, total["sites"][site.path], used) for site in sites}


def _check_collect(
    collect: Sequence[str], components: int | None, loss: Any, weights: Any
) -> tuple[str, ...]:
    names = (collect,) if isinstance(collect, str) else tuple(collect)
    unknown = sorted(set(names) - set(COLLECTIONS))
    if unknown or not names:
        raise ValueError(f"collect={collect!r}: give one or more of {COLLECTIONS}.")
    if ("gradient" in names) != (loss is not None):
        raise ValueError(
            f"collect={names!r} with loss={loss!r}: 'gradient' and loss(outputs, batch) go "
            "together."
        )
    if ("pca" in names) != (components is not None):
        raise ValueError(
            f"collect={names!r} with components={components!r}: 'pca' and a number of components "
            "go together."
        )
    if weights is not None and not set(names) & set(OF_INPUTS):
        raise ValueError("weights do not reach a gradient: leave them out, and mask inside `loss`.")
    return names


def _check_sites(sites: Iterable[Site], collect: tuple[str, ...], components: int | None) -> None:
    of_inputs = sorted(set(collect) & set(OF_INPUTS))
    for site in sites:
        if of_inputs and (site.is_embedding or "k" in site.axes):
            kind = "an embedding" if site.is_embedding else "a convolution"
            raise ValueError(
                f"collect: {of_inputs[0]!r} is not defined for {site.path!r}, {kind}: exclude it "
                '("gradient" alone works there).'
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
    zeros = {site.path: _leaves(plan, site) for site in plan.sites}
    return {"sites": zeros, "weights": jnp.zeros((), jnp.float32)}


def _leaves(plan: _Plan, site: Site) -> dict[str, jax.Array]:
    """A site's statistics before the first batch: zeros, one for each dummy of its probe."""
    d_in, k = site.d_in, plan.components
    shapes: dict[str, tuple[int, ...]] = {"calls": (), "count": ()}
    if "second_moment" in plan.collect:
        shapes |= {"second_moment": (d_in, d_in), "sum": (d_in,)}
    if "pca" in plan.collect:
        shapes |= {"components": (k, d_in), "singular": (k,), "center": (d_in,), "scatter": ()}
    if "gradient" in plan.collect:
        shapes["gradient"] = (d_in, site.d_out)
    return {name: jnp.zeros((*site.stack, *shape), jnp.float32) for name, shape in shapes.items()}


MERGED = ("components", "singular", "center", "scatter")  # replaced by each batch, not added to


def _step(plan: _Plan, total: dict[str, Any], params: Params, batch: Any) -> dict[str, Any]:
    weights, before = None, total["sites"]
    if plan.weights is not None:
        weights = jnp.asarray(plan.weights(batch)).astype(jnp.float32)
    frozen = {
        path: {"path": _Path(path), "so_far": {name: group[name] for name in ("count", *kept)}}
        for path, group in before.items()
        for kept in [[name for name in MERGED if name in group]]
    }

    def run(dummies: Groups) -> jax.Array:
        bound = plan.probe.bind(params, PeftState(dummies, frozen), weights=weights)
        return plan.loss(plan.run({"params": bound}, batch), batch)

    seen = jax.grad(run)(jax.tree.map(jnp.zeros_like, before))
    new = {path: _accumulate(before[path], group) for path, group in seen.items()}
    rows = jnp.ones(()) if weights is None else jnp.sum(weights)
    return {"sites": new, "weights": total["weights"] + rows}


def _accumulate(before: State, seen: State) -> dict[str, jax.Array]:
    """Sums add up; what the probe has merged already replaces, unless the module did not run."""

    def one(name: str, x: jax.Array) -> jax.Array:
        if name not in MERGED:
            return before[name] + x
        ran = seen["calls"] > 0
        return jnp.where(ran.reshape(*ran.shape, *[1] * (x.ndim - ran.ndim)), x, before[name])

    return {name: one(name, x) for name, x in seen.items()}


# The probe


def _probe_rule(collect: tuple[str, ...]) -> Rule:
    """A product that changes nothing and whose backward pass measures."""
    gradient, of_inputs = "gradient" in collect, bool(set(collect) & set(OF_INPUTS))

    def init(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        raise NotImplementedError("the states of a probe are made by calibrate.")

    def linear(x: jax.Array, W: Any, p: State, call: Call) -> jax.Array:
        if of_inputs:
            weights = _row_weights(x, call.context.get("weights"), p["path"])
            dummies = {name: p[name] for name in p if name not in ("path", "so_far", "gradient")}
            x = _see_inputs(x, weights, dummies, p["so_far"])
        y = call.dot(x, W)
        return _see_gradient(y, x, p["gradient"]) if gradient else y

    def effective(W: jax.Array, p: State, call: Call) -> jax.Array:
        del call
        return W + p["gradient"].astype(W.dtype)

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
    if "components" in dummies:
        new |= merge(so_far, x_NxI, weights)
    return g, None, new, None


_see_inputs.defvjp(_see_inputs_forward, _see_inputs_backward)


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
    for site in plan.sites:
        group = total["sites"][site.path]
        bad = [name for name, value in group.items() if not bool(jnp.all(jnp.isfinite(value)))]
        if bad:
            what = "gradient" if bad == ["gradient"] else "inputs"
            raise ValueError(
                f"the {what} of {site.path!r} became NaN or infinite (first such site by path): "
                "check the batches and the dtype there."
            )
        if set(plan.collect) & set(OF_INPUTS):
            _check_rows(plan, site, group, used)


def _check_rows(plan: _Plan, site: Site, group: Mapping[str, jax.Array], used: int) -> None:
    calls, count = np.asarray(group["calls"]), np.asarray(group["count"])
    if not calls.all() or not count.all():
        raise ValueError(
            f"{site.path!r} saw no input that counts: fn's floating-point outputs do not depend on "
            "it (a stop_gradient?), or it runs on padding alone. Exclude it."
        )
    if "pca" not in plan.collect:
        return
    if calls.max() > used:
        raise ValueError(
            f"'pca' needs modules that run once in a batch, and {site.path!r} runs more often: "
            "exclude it, or collect its second moments."
        )
    if count.min() < plan.components:
        raise ValueError(
            f"components={plan.components} is more than the {int(count.min())} rows that "
            f"{site.path!r} saw: give more batches or fewer components."
        )


def _finish(plan: _Plan, group: Mapping[str, jax.Array], used: int) -> dict[str, jax.Array]:
    def over(value: jax.Array, divisor: jax.Array) -> jax.Array:
        return value / divisor.reshape(*divisor.shape, *[1] * (value.ndim - divisor.ndim))

    stats: dict[str, jax.Array] = {}
    if "gradient" in plan.collect:
        stats["gradient"] = group["gradient"] / used
    if "pca" in plan.collect:
        squared = group["singular"] ** 2
        stats["components"], stats["mean"] = group["components"], group["center"]
        stats["explained_variance"] = over(squared, jnp.maximum(group["count"] - 1, 1))
        tiny = jnp.finfo(jnp.float32).tiny
        stats["explained_variance_ratio"] = over(squared, jnp.maximum(group["scatter"], tiny))
    if "second_moment" in plan.collect:
        stats["second_moment"] = over(group["second_moment"], group["count"])
        stats["mean"] = over(group["sum"], group["count"])
    if stats.keys() != {"gradient"}:
        stats["count"] = group["count"]
    return stats
