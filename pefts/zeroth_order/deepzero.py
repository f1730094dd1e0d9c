"""DeepZero: a network trained from scratch by coordinate-wise differences of its loss.

    g0 = RGE(theta),  g1 = RGE(theta + mu g0)                      before training, on a few samples
    scores = -theta * (g1 - g0) / mu                               ZO-GraSP
    s_l = fraction of layer l among the smallest |scores| of all   kept; the scores are not
    S ~ (1 - s_l) n_l random entries of every layer                drawn anew every few epochs
    m <- 0.9 m + CGE_S(theta) + lambda theta,  theta <- theta - eta m

The network stays dense: S says only whose gradient is estimated. Biases, norms and other leaves
without a matrix are always in it. Of a stack of layers, below "layers/", each counts by itself.
State: the momentum and three numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from pefts import linalg
from pefts.optimizers.decay import leaf_paths
from pefts.optimizers.projection import inner_or_adam
from pefts.targets import Targets, match, site_key
from pefts.zeroth_order import coordinates as sets
from pefts.zeroth_order.coordinates import Sparsity, value_and_cge

TINY = 1e-8  # the paper's code adds it to the norm that it divides by


class CoordinatesState(NamedTuple):
    """How many updates are complete and were skipped, the last loss, and the state inside."""

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  optax's name for it
    skipped: Any  # updates in which a value of the loss was not finite
    value: Any  # L(theta) before the last update
    inner_state: Any


class Staged(NamedTuple):
    """A loss in stages, for feature reuse: x <- stage(params[name], x), one after the other.

    Called with params it is the loss; `value_and_cge_by_stage` and the transformations here run a
    perturbed stage and those after it alone.

    Attributes:
      stages: {key of params: function (params of the stage, x) -> x}, in order; the last gives the
        loss. Every key of params (every index of a list) has one stage.
      x: what the first stage takes: the inputs, with the labels if the last stage needs them.
    """

    stages: Mapping[Any, Callable[[Any, Any], Any]]
    x: Any

    def __call__(self, params: Any) -> Any:
        x = self.x
        for name, stage in self.stages.items():
            x = stage(params[name], x)
        return x


def deepzero(
    learning_rate: Any,
    *,
    sparsity: Sparsity = 0.0,
    mu: Any = 5e-3,
    shuffle_interval: int | None = None,
    momentum: Any = 0.9,
    weight_decay: Any = 0.0,
    seed: int = 0,
    chunk: int = 1,
    sharding: NamedSharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum on sparse coordinate-wise differences; its update takes `value_fn`.

    Args:
      learning_rate: eta, a number or an optax schedule (paper: 0.1, cosine, 3 epochs of warm-up).
      momentum: of SGD (paper: 0.9).
      weight_decay: lambda, added to the estimate, of all entries (paper: 5e-4).
      sparsity, mu, shuffle_interval, seed, chunk, sharding: as in `scale_by_coordinates`.

    Returns:
      A transformation, `update(ignored, state, params, value_fn=...)`. Its `CoordinatesState` holds
      the loss in `value`. An update with a loss that is not finite changes neither the parameters
      nor the momentum, and is counted in `skipped`.

    Raises:
      ValueError: as `scale_by_coordinates`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from pefts.zeroth_order.deepzero import deepzero
      >>> params, tx = {"w": jnp.ones(3)}, deepzero(0.1, momentum=0.0)
      >>> loss = lambda params: jnp.sum(params["w"] ** 2)
      >>> updates, state = tx.update(params, tx.init(params), params, value_fn=loss)
      >>> round(float(loss(optax.apply_updates(params, updates))), 2)
      1.92

    Source: DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training,
      arXiv 2310.02025.
    """
    for name, given, below in (("momentum", momentum, 1.0), ("weight_decay", weight_decay, np.inf)):
        if isinstance(given, int | float) and not 0 <= given < below:
            raise ValueError(f"{name}={given!r}: give a number from 0 to below {below}.")
    inner = optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )
    return scale_by_coordinates(
        sparsity=sparsity,
        mu=mu,
        shuffle_interval=shuffle_interval,
        seed=seed,
        inner=inner,
        chunk=chunk,
        sharding=sharding,
    )


def scale_by_coordinates(
    *,
    sparsity: Sparsity = 0.0,
    mu: Any = 5e-3,
    shuffle_interval: int | None = None,
    seed: int = 0,
    inner: optax.GradientTransformation | None = None,
    chunk: int = 1,
    sharding: NamedSharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The coordinate-wise estimate of value_fn's gradient in the place of the gradient.

    Args:
      sparsity: s, the fraction of entries that is not estimated: of every matrix, or by path, from
        `layer_sparsity` (paper: of 0.9 over all layers); biases and norms are always estimated.
      mu: the step of the differences, a number or an optax schedule (paper: 5e-3, or eta).
      shuffle_interval: after how many updates other entries are drawn; None: never (paper: those
        of 5 epochs).
      seed: which entries are drawn.
      inner: what is done with the estimate, in float32 or better, and skipped with the update where
        a loss is not finite (None: nothing).
      chunk, sharding: as in `pefts.zeroth_order.coordinates.value_and_cge`.

    Returns:
      A transformation, `update(ignored, state, params, value_fn=...)`; value_fn maps params to the
      loss, or is a `Staged` loss. What is ignored may be params. Updates are in the dtypes of
      params; those of leaves that are not floating are zero.

    Raises:
      ValueError: an argument is out of range; at init, sparsity does not fit params; at update,
        params or value_fn is missing, or value_fn gives no scalar.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from pefts.zeroth_order.deepzero import scale_by_coordinates
      >>> params, tx = {"w": jnp.ones(3)}, scale_by_coordinates(inner=optax.adam(0.1))
      >>> loss = lambda params: jnp.sum(params["w"] ** 2)
      >>> updates, state = tx.update(params, tx.init(params), params, value_fn=loss)
      >>> float(state.value)
      3.0

    Source: DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training,
      arXiv 2310.02025.
    """
    sets.check_mu(mu)
    sets.check_chunk(chunk)
    _check_interval(shuffle_interval)
    inside = inner_or_adam(optax.identity() if inner is None else inner)

    def draw(count: Any, params: Any) -> Any:
        number = jnp.zeros_like(count) if shuffle_interval is None else count // shuffle_interval
        # Named, so that jax_default_prng_impl cannot change a run.
        key = jax.random.key(seed, impl="threefry2x32")
        return sets.random_coordinates(jax.random.fold_in(key, number), params, sparsity)

    def init(params: Any) -> CoordinatesState:
        zero, wide = jnp.zeros((), jnp.int32), jax.tree.map(linalg.precise, params)
        if jax.tree.leaves(params):
            jax.eval_shape(draw, zero, params)  # for its errors
        state = inside.init(wide)
        return CoordinatesState(zero, jnp.zeros_like(zero), _zero_value(wide), state)

    def update(
        updates: Any, state: Any, params: Any = None, *, value_fn: Any = None, **extra: Any
    ) -> tuple[Any, CoordinatesState]:
        del updates
        _check_update(params, value_fn)
        estimate = value_and_cge_by_stage if isinstance(value_fn, Staged) else value_and_cge
        value, ghat = estimate(
            value_fn,
            params,
            draw(state.count, params),
            mu=mu(state.count) if callable(mu) else mu,
            chunk=chunk,
            sharding=sharding,
        )
        finite = jnp.all(
            jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves((value, ghat))])
        )

        def step() -> tuple[Any, Any]:
            wide = jax.tree.map(linalg.precise, params)
            stepped, inner_state = inside.update(ghat, state.inner_state, wide, **extra)
            return jax.tree.map(_like, stepped, params), inner_state

        def stay() -> tuple[Any, Any]:
            return jax.tree.map(jnp.zeros_like, params), state.inner_state

        stepped, inner_state = jax.lax.cond(finite, step, stay)
        return stepped, CoordinatesState(
            optax.safe_increment(state.count),
            state.skipped + (~finite).astype(state.skipped.dtype),
            value.astype(state.value.dtype),
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def value_and_cge_by_stage(
    value_fn: Staged,
    params: Any,
    coordinates: Any = None,
    *,
    mu: Any = 5e-3,
    chunk: int = 1,
    sharding: NamedSharding | None = None,
) -> tuple[jax.Array, Any]:
    """`value_and_cge` with feature reuse: what stands before a perturbed stage is computed once.

    With K equal stages a value costs (K + 1) / 2 of them on average instead of K. The inputs of all
    stages are kept.

    Args:
      value_fn: the loss in stages.
      params, coordinates, mu, chunk, sharding: as in `value_and_cge`.

    Returns:
      L(theta) and the estimate, as `value_and_cge`.

    Raises:
      ValueError: as `value_and_cge`; the stages are not the keys of params.
    """
    names = list(value_fn.stages)
    keys = list(params) if isinstance(params, Mapping) else list(range(len(params)))
    if set(names) != set(keys):
        raise ValueError(
            f"stages: {names} are given and params have {keys}; every key needs one stage."
        )
    sets.check_scalar(value_fn, params)
    treedef = jax.tree.structure(params)
    chosen = treedef.unflatten(sets.index_sets(params, coordinates))
    inputs = [value_fn.x]
    for name in names:
        inputs.append(value_fn.stages[name](params[name], inputs[-1]))
    value, found = inputs.pop(), {}
    for number, (name, x) in enumerate(zip(names, inputs, strict=True)):
        if not sum(S.size for S in jax.tree.leaves(chosen[name])):
            found[name] = jax.tree.map(
                lambda leaf: jnp.zeros_like(linalg.precise(leaf)), params[name]
            )
            continue
        rest = Staged({after: value_fn.stages[after] for after in names[number:]}, x)

        def from_here(own: Any, name: Any = name, rest: Staged = rest) -> Any:
            return rest({**{after: params[after] for after in rest.stages}, name: own})

        _, found[name] = value_and_cge(
            from_here,
            params[name],
            chosen[name],
            mu=mu,
            chunk=chunk,
            sharding=sharding,
            value=value,
        )
    return linalg.precise(value), treedef.unflatten(
        jax.tree.leaves(found if isinstance(params, Mapping) else [found[key] for key in keys])
    )


def random_gradient(
    value_fn: Callable[[Any], Any],
    params: Any,
    noise: Any,
    *,
    queries: int = 192,
    mu: Any = 5e-3,
    unbiased: bool = False,
) -> Any:
    """RGE, the mean over queries of mu d u, where d = (L(theta + mu u) - L(theta)) / mu.

    u has norm 1 in every leaf, of stacked layers in every layer. The estimate of the released code,
    mu / n of a gradient on average for n entries, is enough to rank; `unbiased` gives n d u.

    Args:
      value_fn: params -> L.
      params: theta, in float32 or better.
      noise: a random key, or a function of the query's number, from 0, to normal numbers, a tree
        like params.
      queries: q (paper: 192).
      mu: the step (paper: 5e-3).
      unbiased: whether n takes the place of the factor mu.

    Returns:
      The estimate, a tree like params.

    Raises:
      ValueError: queries or mu is out of range, value_fn gives no scalar, a leaf is not of float32
        or better, whose steps would be lost.

    Source: DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training,
      arXiv 2310.02025.
    """
    sets.check_mu(mu)
    sets.check_queries(queries)
    sets.check_scalar(value_fn, params)
    _check_precise(params)
    paths = leaf_paths(params)
    draw = noise if callable(noise) else lambda number: _normal(noise, number, params)
    base = linalg.precise(jnp.asarray(value_fn(params)))

    def query(number: Any, total: Any) -> Any:
        u = jax.tree.map(_unit, paths, draw(number))
        moved = jax.tree.map(lambda leaf, u: leaf + jnp.asarray(mu, leaf.dtype) * u, params, u)
        change = linalg.precise(jnp.asarray(value_fn(moved))) - base
        return jax.tree.map(lambda sum, u: sum + (change / queries).astype(u.dtype) * u, total, u)

    # mu d u is the change times u.
    ghat = jax.lax.fori_loop(0, queries, query, jax.tree.map(jnp.zeros_like, params))
    if not unbiased:
        return ghat

    def scaled(path: str, g: jax.Array) -> jax.Array:
        return g * jnp.asarray(g.size // sets.layers_of(path, g) / mu, g.dtype)

    return jax.tree.map(scaled, paths, ghat)


def zo_grasp(
    value_fn: Callable[[Any], Any],
    params: Any,
    noise: Any,
    *,
    queries: int = 192,
    mu: Any = 5e-3,
    targets: Targets | None = None,
) -> dict[str, jax.Array]:
    """ZO-GraSP scores -theta * (g1 - g0) / mu, with g0 = RGE(theta) and g1 = RGE(theta + mu g0).

    NOTE(paper): theta stays where it is; in the released code the perturbations of earlier queries
      are still in the network when later ones are measured.

    Args:
      value_fn: params -> L of a few samples (paper: 25 of each class).
      params: theta at the start; its matrices are perturbed, the other leaves are not.
      noise: a random key, or a function of the number of the query, from 0 to 2 queries - 1, to
        normal numbers {path: like the matrix}.
      queries, mu: as in `random_gradient` (paper: 192 and 5e-3).
      targets: which matrices are scored, as in pefts.targets (None: all).

    Returns:
      {path: scores, of the leaf's shape}.

    Raises:
      ValueError: as `random_gradient`; there is no matrix, or `targets` match none.

    Source: DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training,
      arXiv 2310.02025.
    """
    leaves, treedef = jax.tree.flatten(params)
    every = dict(zip(jax.tree.leaves(leaf_paths(params)), leaves, strict=True))
    paths = [path for path, leaf in every.items() if sets.is_matrix(path, leaf)]
    if not paths:
        raise ValueError(f"params: none of {list(every)[:5]} is a matrix that could be scored.")
    chosen = set(paths) if targets is None else match(targets, paths)
    W = {path: every[path] for path in paths if path in chosen}
    draw = noise if callable(noise) else lambda number: _normal(noise, number, W)

    def loss(W: Any) -> Any:
        return value_fn(treedef.unflatten(list({**every, **W}.values())))

    def gradient(W: Any, first: int) -> Any:
        return random_gradient(loss, W, lambda j: draw(first + j), queries=queries, mu=mu)

    g0 = gradient(W, 0)
    g1 = gradient(jax.tree.map(lambda W, g: W + jnp.asarray(mu, W.dtype) * g, W, g0), queries)
    return jax.tree.map(lambda W, g1, g0: -W * ((g1 - g0) / jnp.asarray(mu, W.dtype)), W, g1, g0)


def prune(scores: Mapping[str, Any], amount: float) -> dict[str, np.ndarray]:
    """Masks, True where kept: without the round(amount n) smallest |scores| of all leaves together.

    NOTE(paper): the sign of a score is ignored, as in the released code, and not as in GraSP. Of
      equal scores those of earlier leaves and positions go first.

    Args:
      scores: {path: array}, from `zo_grasp`; no tracers.
      amount: the fraction that is removed (paper: 0.9).

    Raises:
      ValueError: amount is outside [0, 1), or a score is not finite.

    Example:
      >>> from pefts.zeroth_order.deepzero import layer_sparsity, prune
      >>> masks = prune({"a": [[3.0, -1.0]], "b": [[0.5, -4.0]]}, 0.5)
      >>> masks["a"].tolist(), layer_sparsity(masks)
      ([[True, False]], {'a': (0.5,), 'b': (0.5,)})

    Source: DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training,
      arXiv 2310.02025.
    """
    if not isinstance(amount, int | float) or not 0 <= amount < 1:
        raise ValueError(
            f"amount={amount!r}: give the fraction that is removed, from 0 to below 1."
        )
    arrays = {path: np.asarray(score) for path, score in scores.items()}
    for path, score in arrays.items():
        if not np.all(np.isfinite(score)):
            raise ValueError(
                f"scores of {path!r} are not finite: a loss was not. Try a smaller mu, or params "
                "whose loss is finite."
            )
    sizes = np.cumsum([score.size for score in arrays.values()])
    size = np.abs(np.concatenate([score.reshape(-1) for score in arrays.values()]))
    keep = np.ones(size.shape, bool)
    keep[np.argsort(size, kind="stable")[: round(amount * size.size)]] = False
    parts = np.split(keep, sizes[:-1])
    return {
        path: part.reshape(score.shape)
        for (path, score), part in zip(arrays.items(), parts, strict=True)
    }


def layer_sparsity(masks: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """{path: fraction removed in each layer, one where none are stacked}, for `sparsity`."""
    fractions = {}
    for path, mask in masks.items():
        mask = np.asarray(mask)
        rows = mask.reshape(sets.layers_of(path, mask), -1)
        fractions[path] = tuple((1 - rows.mean(axis=1)).tolist())
    return fractions


def _normal(key: jax.Array, number: Any, params: Any) -> Any:
    own = jax.random.fold_in(key, number)

    def one(path: str, leaf: Any) -> jax.Array:
        return jax.random.normal(site_key(own, path), leaf.shape, leaf.dtype)

    return jax.tree.map(one, leaf_paths(params), params)


def _unit(path: str, noise: jax.Array) -> jax.Array:
    rows = noise.reshape(sets.layers_of(path, noise), -1)
    norm = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / (norm + TINY)).reshape(noise.shape)


def _like(step: jax.Array, leaf: Any) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return step.astype(leaf.dtype)


def _zero_value(wide: Any) -> jax.Array:
    double = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(wide))
    return jnp.zeros((), jnp.float64 if double else jnp.float32)


def _check_interval(interval: int | None) -> None:
    if interval is not None and (type(interval) is not int or interval < 1):
        raise ValueError(
            f"shuffle_interval={interval!r}: give after how many updates other entries are drawn, "
            "from 1, or None for never (and name it in the static_args of "
            "optax.inject_hyperparams)."
        )


def _check_update(params: Any, value_fn: Any) -> None:
    if params is None or not callable(value_fn):
        raise ValueError(
            f"value_fn={value_fn!r}, params={'None' if params is None else 'given'}: the update "
            "needs both, as in tx.update(params, state, params, value_fn=lambda params: loss)."
        )


def _check_precise(params: Any) -> None:
    for path, leaf in zip(
        jax.tree.leaves(leaf_paths(params)), jax.tree.leaves(params), strict=True
    ):
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or jnp.finfo(leaf.dtype).eps > 1e-6:
            raise ValueError(
                f"params: {path!r} is {leaf.dtype}, in which steps of norm mu over a whole leaf "
                "are rounded away. Give params of float32 here, and close over those that stay."
            )
