"""GreenTrainer: which tensors of a transformer to train so that a step costs a share of a full one.

Tensors k = 0, 1, ... are ordered from the output to the input. In multiply-accumulates

    BP(m) = sum_{k <= deepest selected} t_dy[k] + sum_k m_k t_dw[k]
    I_k   = -sum_i g1_i dw_i        maximise sum_k m_k I_k  with  BP(m) <= rho_bp BP(all)

where t_dy passes the gradient through a tensor and t_dw is the tensor's own, dw is one optimizer
step and g1 the gradient behind it: to first order I_k is how much of the loss tensor k takes away.

    costs  = tensor_costs(params, batch=4, length=512)
    I      = importance(loss, params, tx, opt_state)       # under jax.jit
    choice = select(costs, I, rho=0.5)
    peft   = pefts.full(targets=choice.targets)

What saves computation: leaves outside `targets` are frozen, so their own gradients are never
computed; and where layers are unrolled (scan_layers=False) the backward pass ends at the deepest
selected layer. What does not: a scanned stack is one program, which passes the gradient through
all layers and computes a leaf's gradient for all of them as soon as one is selected; there
`choice.mask` with `keep_selected` trains the chosen layers alone, at the cost of the whole leaf.
Every new choice compiles a new step: choose every few epochs.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pefts import linalg, targets
from pefts.optimizers.decay import leaf_paths
from pefts.optimizers.projection import STACKED

# Modules of models.decoder and models.encoder, from the output to the input.
_HEAD = ("lm_head", "classifier", "pooler/dense", "norm")
_LAYER = (
    "mlp_norm_after",
    "mlp/norm",
    "mlp/down_proj",
    "mlp/output",
    "mlp/gate_proj",
    "mlp/up_proj",
    "mlp/intermediate",
    "mlp_norm",
    "attention_norm_after",
    "attention/norm",
    "self_attn/o_proj",
    "attention/output",
    "self_attn/v_proj",
    "self_attn/qkv_proj",
    "attention/value",
    "self_attn/k_norm",
    "self_attn/k_proj",
    "attention/key",
    "self_attn/q_norm",
    "self_attn/q_proj",
    "attention/query",
    "attention_norm",
)
_INPUT = (
    "embed_positions",
    "embed_tokens",
    "embeddings/norm",
    "embeddings/position_embeddings",
    "embeddings/token_type_embeddings",
    "embeddings/word_embeddings",
)
_ORDER = {name: (0, n) for n, name in enumerate(_HEAD)}
_ORDER |= {name: (2, n) for n, name in enumerate(_INPUT)}
_IN_LAYER = {name: n for n, name in enumerate(_LAYER)}
_LEAVES = ("bias", "scale", "kernel", "embedding")
_LAYERS = re.compile(r"^(?:encoder/)?layers(?:_(\d+))?/")
_POOLED = ("classifier", "pooler/dense")  # on one vector per example
_VALUES = ("self_attn/v_proj", "self_attn/qkv_proj", "attention/value")
_OUTPUTS = ("self_attn/o_proj", "attention/output")
_HEADWISE = {"self_attn/q_norm": "self_attn/q_proj", "self_attn/k_norm": "self_attn/k_proj"}


class Tensor(NamedTuple):
    """One tensor, a leaf or one layer of a stacked leaf, and its costs."""

    path: str
    layer: int | None  # of a stacked leaf; None where the leaf is the tensor
    t_dy: int  # multiply-accumulates to pass the gradient of the activations through it
    t_dw: int  # multiply-accumulates of its own gradient


class Costs(NamedTuple):
    """The tensors from the output to the input, and the cost of a forward pass."""

    tensors: tuple[Tensor, ...]
    forward: int


class Choice(NamedTuple):
    """What to train."""

    targets: str  # a regular expression for pefts.full: the leaves with anything selected
    mask: dict[str, np.ndarray]  # path -> bool, () or (L,), of these leaves; for keep_selected
    partial: tuple[str, ...]  # stacked leaves of which some layers only are selected
    selected: np.ndarray  # bool, one for each tensor of the costs
    backward: float  # BP(m) / BP(all)


def tensor_costs(params: Any, *, batch: int, length: int) -> Costs:
    """t_dy and t_dw of every tensor of a model of models.decoder or models.encoder.

    With B examples of N tokens: kernels and norm scales cost B N times their size both ways, the
    classifier and pooler B times; biases, of norms too, t_dw = B N size; an embedding the additions
    t_dw = B N D. A tied one has t_dw = B N D V + D V, and the head's B N D V is part of tensor 0's
    t_dy. The four products of attention's backward pass, 4 B N^2 D, belong to the t_dy of the
    values.

    NOTE(paper): the released code leaves the biases of norms out; they are counted like others.

    Args:
      params: the model's parameters, or their shapes; layers scanned or not. A stacked leaf is one
        tensor per layer.
      batch: B.
      length: N, tokens of an example.

    Returns:
      Costs, in integers.

    Raises:
      ValueError: batch or length below 1, or a leaf of another architecture.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from pefts.tensor_selection import tensor_costs
      >>> params = {"norm": {"scale": jnp.ones(8)}, "lm_head": {"kernel": jnp.ones((8, 5))}}
      >>> [(t.path, t.t_dy, t.t_dw) for t in tensor_costs(params, batch=2, length=3).tensors]
      [('lm_head/kernel', 240, 240), ('norm/scale', 48, 48)]

    Source: Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation,
      arXiv 2309.13192.
    """
    for name, value in (("batch", batch), ("length", length)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r}: give an integer from 1.")
    shapes = {path: tuple(leaf.shape) for path, leaf in _by_path(params).items()}
    places = [place for path, shape in shapes.items() for place in _places(path, shape)]
    tensors, forward, seen = [], 0, set()
    for _, path, layer in sorted(places, key=lambda place: place[0]):
        shape = shapes[path][1:] if layer is not None else shapes[path]
        t_dy, t_dw = _own(path, shape, shapes, batch, length)
        forward += max(t_dy, t_dw)
        node, _, _ = path.rpartition("/")
        # On the first leaf of the module, its bias if it has one: that gradient passes through
        # attention too.
        if _module(node) in _VALUES and (node, layer) not in seen:
            attention = batch * length**2 * _width(node, shapes)
            t_dy, forward = t_dy + 4 * attention, forward + 2 * attention
        seen.add((node, layer))
        tensors.append(Tensor(path, layer, t_dy, t_dw))
    return _with_tied_head(tensors, forward, shapes, batch, length)


def backward_cost(costs: Costs, selected: Sequence[bool] | np.ndarray) -> int:
    """BP(m), multiply-accumulates of a backward pass for the selected tensors.

    Args:
      costs: of `tensor_costs`.
      selected: m, one for each tensor.

    Returns:
      An integer, 0 where nothing is selected.

    Raises:
      ValueError: there are not as many as tensors.

    Example:
      >>> from pefts.tensor_selection import Costs, Tensor, backward_cost
      >>> costs = Costs((Tensor("b", None, 1, 10), Tensor("a", None, 2, 20)), forward=3)
      >>> [backward_cost(costs, m) for m in ([1, 1], [0, 1], [1, 0], [0, 0])]
      [33, 23, 11, 0]

    Source: arXiv 2309.13192.
    """
    if len(selected) != len(costs.tensors):
        raise ValueError(f"selected has {len(selected)} entries for {len(costs.tensors)} tensors.")
    chosen = [n for n, flag in enumerate(selected) if flag]
    through = costs.tensors[: chosen[-1] + 1] if chosen else ()
    return sum(one.t_dy for one in through) + sum(costs.tensors[n].t_dw for n in chosen)


def backward_share(costs: Costs, rho: float) -> float:
    """rho_bp, what rho of forward and backward leaves to the backward pass.

        rho_bp = rho (1 + T_fp / T_bp) - T_fp / T_bp

    NOTE(paper): the released code takes 0.05 where this is not above 0; here it is an error.

    Args:
      costs: of `tensor_costs`; T_fp is their `forward`, T_bp the cost of all tensors.
      rho: share of a full step's cost, at most 1 (paper: 0.4, 0.5 or 0.7).

    Returns:
      A number above 0, at most 1.

    Raises:
      ValueError: rho is above 1, or does not pay for the forward pass.

    Example:
      >>> from pefts.tensor_selection import Costs, Tensor, backward_share
      >>> backward_share(Costs((Tensor("a", None, 1, 1),), forward=1), rho=0.5)
      0.25

    Source: arXiv 2309.13192.
    """
    ratio = costs.forward / backward_cost(costs, [True] * len(costs.tensors))
    share = rho * (1 + ratio) - ratio
    if not 0 < share <= 1 + 1e-12:
        raise ValueError(
            f"rho={rho!r}: give a share above {ratio / (1 + ratio):.3f}, which the forward pass "
            "alone takes, and at most 1."
        )
    return min(share, 1.0)


def importance(
    loss: Callable[[Any], Any], params: Any, transformation: Any, state: Any
) -> dict[str, jax.Array]:
    """I_k of every leaf, and layer of a stacked leaf, from one probe step that is thrown away.

    Args:
      loss: parameters -> scalar, on one batch.
      params: what is differentiated: the model's parameters or the trainable tree of `pefts.full`.
      transformation: the optimizer of the training, whose rate and moments make the step.
      state: its state, which stays as it is; the probe's is dropped.

    Returns:
      {path: I () or (L,)} in float32 or better, not normalised: their sum is, to first order, what
      the step takes off the loss.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from pefts.tensor_selection import importance
      >>> params, tx = {"x": {"kernel": jnp.ones((1, 1))}}, optax.sgd(0.25)
      >>> square = lambda params: jnp.sum(params["x"]["kernel"] ** 2)
      >>> importance(square, params, tx, tx.init(params))["x/kernel"].item()
      0.5

    Source: arXiv 2309.13192.
    """
    gradient = jax.grad(loss)
    updates, _ = transformation.update(gradient(params), state, params)
    probe = optax.apply_updates(params, updates)
    before, after, slopes = (_by_path(tree) for tree in (params, probe, gradient(probe)))

    def one(path: str) -> jax.Array:
        w0, w1, g1 = (linalg.precise(tree[path]) for tree in (before, after, slopes))
        return -jnp.sum(g1 * (w1 - w0), axis=tuple(range(_is_stacked(path), g1.ndim)))

    return {path: one(path) for path in before}


def solve(
    t_dy: Any, t_dw: Any, importance: Any, limit: float, *, resolution: int = 20_000
) -> np.ndarray:
    """The m that maximises sum m_k I_k with BP(m) <= limit: fixed deepest tensor, 0/1 knapsack.

    Exact where costs are integers and the limit is at most `resolution`. Otherwise the t_dw of all
    but the deepest are rounded up to multiples of limit / resolution, so that the limit holds.

    NOTE(paper): the released recursion rounds costs down, to a total of 1000, and can miss the
      optimum; this replaces it.

    Args:
      t_dy, t_dw, importance: (tensors,), from the output to the input.
      limit: of BP(m), in the unit of the costs.
      resolution: steps of the limit in the table, which has tensors times as many entries.

    Returns:
      m (tensors,), bool; nothing where no tensor with I > 0 fits.

    Raises:
      ValueError: lengths differ, a cost is negative, an importance is not finite, or resolution is
        below 1.

    Example:
      >>> from pefts.tensor_selection import solve
      >>> solve([0, 2, 1, 4, 0], [5, 1, 7, 3, 1], [1, 3, 10, 5, 3], 14).astype(int).tolist()
      [0, 1, 1, 0, 0]

    Source: arXiv 2309.13192.
    """
    dy, dw, value = _checked(t_dy, t_dw, importance, resolution)
    exact = limit <= 0 or (np.all(dw == np.floor(dw)) and limit <= resolution)
    unit = 1.0 if exact else limit / resolution
    steps = int(max(limit, 0) // unit)
    weights = np.ceil(dw / unit).astype(np.int64)
    best = np.zeros(steps + 1)  # over the tensors so far, by the steps they may take together
    taken = np.zeros((len(dw), steps + 1), bool)
    top, deepest, room = 0.0, -1, 0
    for k, through in enumerate(np.cumsum(dy)):
        left = limit - through - dw[k]
        if value[k] > 0 and left >= 0:
            at = min(int(left // unit), steps)
            if best[at] + value[k] > top:
                top, deepest, room = best[at] + value[k], k, at
        if value[k] > 0 and weights[k] <= steps:
            w = weights[k]
            with_k = best[: steps + 1 - w] + value[k]
            taken[k, w:] = with_k > best[w:]
            best[w:] = np.maximum(with_k, best[w:])
    chosen = np.zeros(len(dw), bool)
    if deepest >= 0:
        chosen[deepest] = True
    for k in reversed(range(deepest)):
        if taken[k, room]:
            chosen[k], room = True, room - weights[k]
    return chosen


def select(
    costs: Costs, importance: Mapping[str, Any], rho: float, *, resolution: int = 20_000
) -> Choice:
    """The tensors that promise most for rho of a full step's cost.

    Args:
      costs: of `tensor_costs`.
      importance: of the function of that name, or any {path: I () or (L,)}; tensors that it lacks
        are never selected.
      rho: share of forward and backward of a full step (paper: 0.4, 0.5 or 0.7).
      resolution: as in `solve`.

    Returns:
      A Choice. Where `partial` is empty `targets` is all of it; otherwise chain
      `keep_selected(choice.mask)` behind the optimizer.

    Raises:
      ValueError: rho as in `backward_share`; importances of leaves that have no cost, of another
        shape or not finite; or no tensor with one above 0 fits.

    Example:
      >>> from pefts.tensor_selection import Costs, Tensor, select
      >>> costs = Costs((Tensor("b", None, 1, 9), Tensor("a", None, 1, 9)), forward=10)
      >>> choice = select(costs, {"a": 0.1, "b": 0.2}, rho=0.7)
      >>> choice.targets, choice.backward
      ('^(b)$', 0.5)

    Source: arXiv 2309.13192.
    """
    layers: dict[str, int | None] = {}
    for one in costs.tensors:
        layers[one.path] = None if one.layer is None else (layers.get(one.path) or 0) + 1
    values = _values(importance, layers)
    full = backward_cost(costs, [True] * len(costs.tensors))
    flat = [values[t.path][0 if t.layer is None else t.layer] for t in costs.tensors]
    t_dy, t_dw = ([getattr(one, name) for one in costs.tensors] for name in ("t_dy", "t_dw"))
    limit = backward_share(costs, rho) * full
    chosen = solve(t_dy, t_dw, flat, limit, resolution=resolution)
    if not chosen.any():
        raise ValueError(
            f"rho={rho!r}: no tensor that lowers the loss fits; the cheapest one alone takes "
            f"{min(np.cumsum(t_dy) + t_dw) / full:.3g} of a full backward pass, "
            f"{limit / full:.3g} is left."
        )
    mask = {path: np.zeros(() if n is None else n, bool) for path, n in layers.items()}
    for one, flag in zip(costs.tensors, chosen, strict=True):
        mask[one.path][() if one.layer is None else one.layer] = flag
    mask = {path: flags for path, flags in mask.items() if flags.any()}
    return Choice(
        targets=targets.only(sorted(mask)),
        mask=mask,
        partial=tuple(sorted(path for path, flags in mask.items() if not flags.all())),
        selected=chosen,
        backward=backward_cost(costs, chosen) / full,
    )


def keep_selected(mask: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
    """Zero updates for tensors that are not selected; last in an optax.chain, behind decay.

    Args:
      mask: path -> bool, () for a leaf or (L,) for the layers of a stacked one, as `Choice.mask`;
        leaves that it lacks are not selected.

    Returns:
      A transformation without state, of the model's parameters or the trainable tree of
      `pefts.full`.

    Raises:
      ValueError: at init: a path that the tree lacks, or another number of layers.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from pefts.tensor_selection import keep_selected
      >>> params = {"layers": {"norm": {"scale": jnp.ones((2, 1))}}, "bias": jnp.ones(1)}
      >>> mask = {"layers/norm/scale": np.array([True, False])}
      >>> tx = optax.chain(optax.sgd(1.0, momentum=0.9), keep_selected(mask))
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates["layers"]["norm"]["scale"].tolist(), updates["bias"].tolist()
      ([[-1.0], [0.0]], [0.0])

    Source: arXiv 2309.13192.
    """
    flags = {path: np.asarray(value, bool) for path, value in mask.items()}

    def init(params: Any) -> Any:
        leaves = _by_path(params)
        for path, flag in flags.items() if leaves else ():
            shape = leaves[path].shape if path in leaves else None
            if shape is None or flag.ndim > 1 or flag.shape != shape[: flag.ndim]:
                raise ValueError(
                    f"mask has {flag.shape} for {path!r}, the tree "
                    f"{'no such leaf' if shape is None else shape}: give one flag for a leaf or "
                    "one for each layer of a stacked leaf."
                )
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params

        def one(path: str, leaf: Any) -> Any:
            flag = flags.get(path.removesuffix("/value"), np.zeros((), bool))
            wide = jnp.asarray(flag.reshape(flag.shape + (1,) * (leaf.ndim - flag.ndim)))
            return jnp.where(wide, leaf, jnp.zeros_like(leaf))

        return jax.tree.map(one, leaf_paths(updates), updates), state

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def _by_path(tree: Any) -> dict[str, Any]:
    """The leaves by path, without the "/value" by which `pefts.full` names its own."""
    names = [path.removesuffix("/value") for path in jax.tree.leaves(leaf_paths(tree))]
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


def _is_stacked(path: str) -> bool:
    return re.search(STACKED, path) is not None


def _module(node: str) -> str:
    """The module's name in the order above."""
    return _LAYERS.sub("", node)


def _places(path: str, shape: tuple[int, ...]) -> list[tuple[Any, str, int | None]]:
    """(order, path, layer) of each tensor of a leaf; smaller orders are nearer to the output."""
    node, _, leaf = path.rpartition("/")
    inside = _LAYERS.match(path)
    place = (1, _IN_LAYER.get(_module(node))) if inside else _ORDER.get(node, (0, None))
    stacked = _is_stacked(path)
    axes = 2 if leaf in ("kernel", "embedding") else 1
    if place[1] is None or leaf not in _LEAVES or len(shape) != axes + stacked:
        raise ValueError(
            f"{path!r} of shape {shape} is no leaf of models.decoder or models.encoder: write the "
            "Costs of another architecture by hand, its tensors from the output to the input. "
            f"Known are {sorted(_IN_LAYER)} in layers, {sorted(_ORDER)} outside."
        )
    layers = range(shape[0]) if stacked else [int(inside[1]) if inside else 0]
    at = [(place[0], -n, place[1], _LEAVES.index(leaf)) for n in layers]
    return [(order, path, n if stacked else None) for order, n in zip(at, layers, strict=True)]


def _own(
    path: str, shape: tuple[int, ...], shapes: Any, batch: int, length: int
) -> tuple[int, int]:
    """t_dy and t_dw of one tensor without what attention and a tied head add."""
    node, _, leaf = path.rpartition("/")
    module, size = _module(node), int(np.prod(shape))
    rows = batch if module in _POOLED else batch * length
    if leaf == "embedding":
        return 0, rows * shape[-1]
    if leaf == "bias":
        return 0, rows * size
    if module in _HEADWISE:  # one scale for all heads
        size = shapes[f"{node.removesuffix(module)}{_HEADWISE[module]}/kernel"][-1]
    return rows * size, rows * size


def _width(node: str, shapes: Any) -> int:
    """Query heads times head size, what attention's products run over, beside the values' node."""
    prefix = node.removesuffix(_module(node))
    return next(
        shapes[f"{prefix}{name}/kernel"][-2]
        for name in _OUTPUTS
        if f"{prefix}{name}/kernel" in shapes
    )


def _with_tied_head(
    tensors: list[Tensor], forward: int, shapes: Any, batch: int, length: int
) -> Costs:
    table = "embed_tokens/embedding"
    if table not in shapes or any(path.startswith("lm_head/") for path in shapes):
        return Costs(tuple(tensors), forward)
    size = int(np.prod(shapes[table]))
    head = batch * length * size
    at = next(n for n, one in enumerate(tensors) if one.path == table)
    tensors[at] = tensors[at]._replace(t_dw=head + size)
    tensors[0] = tensors[0]._replace(t_dy=tensors[0].t_dy + head)
    return Costs(tuple(tensors), forward + head)


def _checked(t_dy: Any, t_dw: Any, importance: Any, resolution: int) -> Any:
    arrays = [np.asarray(array, np.float64) for array in (t_dy, t_dw, importance)]
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or arrays[0].ndim != 1:
        raise ValueError(
            f"t_dy, t_dw, importance have shapes {shapes}: give one of each per tensor."
        )
    if min(arrays[0].min(initial=0), arrays[1].min(initial=0)) < 0:
        raise ValueError("t_dy or t_dw has a negative cost: give multiply-accumulates from 0.")
    if not np.isfinite(arrays[2]).all():
        raise ValueError("importance is not finite: lower the probe's learning rate.")
    if type(resolution) is not int or resolution < 1:
        raise ValueError(f"resolution={resolution!r}: give an integer from 1.")
    return arrays


def _values(importance: Mapping[str, Any], layers: Mapping[str, int | None]) -> dict[str, Any]:
    """One importance for each tensor, 0 for those that are not candidates."""
    values = {path: np.zeros(layers[path] or 1) for path in layers}
    for path, value in importance.items():
        if path not in layers:
            raise ValueError(
                f"importance has {path!r}, which has no cost; costs have {sorted(layers)[:5]}."
            )
        value = np.asarray(value, np.float64)
        expected = () if layers[path] is None else (layers[path],)
        if value.shape != expected:
            raise ValueError(
                f"importance of {path!r} has shape {value.shape}; it must be {expected}."
            )
        values[path] = np.atleast_1d(value)
    return values
