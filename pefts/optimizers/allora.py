"""ALLoRA: gradients of B grow where B is small, in place of LoRA's scale and dropout.

    g_i <- c_i g_i      c_i = (||b_i||_2 + eta^(-1/q))^(-q)        B (r, d_out), y = x W + (x A) B

for each column b_i of B, one per output unit (or each row, one per rank). c_i = eta where b_i is
zero, as all of B is at step 0, and falls as b_i grows: like ||b_i||^-q where that is large.

unchecked: only the paper's abstract was available, which says that the coefficient is inversely
related to the norm; the formula with q = 1/2 is from memory. Expect no parity with the paper.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pefts import linalg, targets
from pefts.optimizers import projection as subspaces
from pefts.optimizers.decay import leaf_paths
from pefts.optimizers.factors import check_params

MODES = ("grad", "update")
PER = ("unit", "rank")


def allora(
    learning_rate: Any,
    eta: Any,
    *,
    mode: str = "grad",
    per: str = "unit",
    exponent: Any = 0.5,
    leaves: str = r"(^|/)B$",
    inner: optax.GradientTransformation | None = None,
    weight_decay: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """ALLoRA with weight decay and a learning rate; for pefts.lora(alpha=rank, dropout=0).

    Adam divides a gradient by its running size, and so nearly takes back a factor that changes
    slowly: with mode="grad" c_i acts through Adam's eps and while the norms change, with
    mode="update" it is a learning rate for each column.

    NOTE(paper): unchecked, the abstract alone was available. Its coefficients of per-sample
      gradients depend on no sample, so that of the mean gradient is the same.

    Args:
      learning_rate: an optax schedule or a number.
      eta, per, exponent, leaves: as in `scale_by_inverse_norm`.
      mode: "grad" multiplies what `inner` is given, "update" what it returns, before weight decay
        and learning rate. (The same with inner=optax.identity().)
      inner: a transformation (None: optax.scale_by_adam()).
      weight_decay: of every leaf, not multiplied by c_i.

    Returns:
      A transformation of the trainable tree; its update needs params.

    Raises:
      ValueError: an unknown mode, an `inner` that is no transformation, or as
        `scale_by_inverse_norm`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from pefts.optimizers.allora import allora
      >>> tree = {"query/kernel": {"A": jnp.ones((2, 1)), "B": jnp.zeros((1, 2))}}
      >>> tx = allora(0.5, eta=4.0, inner=optax.identity())
      >>> updates, _ = tx.update({"query/kernel": {"A": jnp.ones((2, 1)), "B": jnp.ones((1, 2))}},
      ...                        tx.init(tree), tree)
      >>> updates["query/kernel"]["B"].tolist()
      [[-2.0, -2.0]]

    Source: ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws, arXiv 2410.09692.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; choose one of {MODES}.")
    scale = scale_by_inverse_norm(eta, per=per, exponent=exponent, leaves=leaves)
    inside = subspaces.inner_or_adam(inner)
    parts = (scale, inside) if mode == "grad" else (inside, scale)
    return subspaces.with_rate(
        optax.chain(*parts), learning_rate=learning_rate, weight_decay=weight_decay
    )


def scale_by_inverse_norm(
    eta: Any, *, per: str = "unit", exponent: Any = 0.5, leaves: str = r"(^|/)B$"
) -> optax.GradientTransformationExtraArgs:
    """Multiply by c_i = (||theta_i||_2 + eta^(-1/q))^(-q) along every slice theta_i of a factor.

    Args:
      eta: c_i where theta_i is zero; the one hyperparameter of the paper.
      per: "unit", a slice for each output unit of B (input unit of A); or "rank", for each rank.
      exponent: q, above 0 (1/2: as remembered; 1: inverse in the norm, as in the abstract).
      leaves: regular expression, searched in a leaf's path ("query/kernel/B"); leaves that it does
        not match pass as they are. A leaf named A is (..., d_in, r), any other (..., r, d_out).

    Returns:
      A transformation without state, in the updates' dtypes; its update needs params.

    Raises:
      ValueError: eta or exponent not above 0, an unknown `per`; at init: `leaves` matches no leaf,
        or one that is no matrix; at update: no params.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.optimizers.allora import scale_by_inverse_norm
      >>> tree = {"B": jnp.array([[0.0, 0.0], [0.0, 1.5]])}
      >>> tx = scale_by_inverse_norm(2.0, exponent=1.0)
      >>> tx.update({"B": jnp.ones((2, 2))}, tx.init(tree), tree)[0]["B"].tolist()
      [[2.0, 0.5], [2.0, 0.5]]

    Source: ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws, arXiv 2410.09692.
    """
    for name, value in (("eta", eta), ("exponent", exponent)):
        if isinstance(value, int | float) and not 0 < value < float("inf"):
            raise ValueError(f"{name}={value!r}: give a finite number above 0.")
    if per not in PER:
        raise ValueError(f"per={per!r} is unknown; choose one of {PER}.")

    def init(params: Any) -> optax.EmptyState:
        _check_leaves(leaves, params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra
        check_params("scale_by_inverse_norm", params)

        def one(path: str, g: jax.Array, theta: jax.Array) -> jax.Array:
            if not re.search(leaves, path):
                return g
            is_A = path.rpartition("/")[2] == "A"
            along = -1 if is_A == (per == "unit") else -2
            wide, c = linalg.precise(g), _coefficients(theta, along, eta, exponent)
            return (wide * c.astype(wide.dtype)).astype(g.dtype)

        return jax.tree.map(one, leaf_paths(updates), updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _coefficients(theta: jax.Array, along: int, eta: Any, exponent: Any) -> jax.Array:
    """c (..., 1, n) or (..., n, 1)."""
    theta = linalg.precise(theta)
    eta, q = jnp.asarray(eta, theta.dtype), jnp.asarray(exponent, theta.dtype)
    norms = jnp.sqrt(jnp.sum(theta**2, axis=along, keepdims=True))
    return (norms + eta ** (-1 / q)) ** -q


def _check_leaves(leaves: str, params: Any) -> None:
    paths, found = jax.tree.leaves(leaf_paths(params)), jax.tree.leaves(params)
    if paths:  # an empty tree, by which optax learns where a state holds leaves like its
        targets.match(leaves, paths, argument="leaves")
    for path, leaf in zip(paths, found, strict=True):
        if re.search(leaves, path) and leaf.ndim < 2:
            raise ValueError(
                f"leaves={leaves!r} matches {path!r} of shape {leaf.shape}, which has no rows and "
                "columns: give a pattern of factors alone."
            )
