"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products with shared rules.

    y' = y + Up(act(Down(y)))              Down (d -> m) and Up (m -> d), each x H + b
    H = sum_i R_i (x) (S_i T_i)            R (n, n, n), S (n, k / n, rho), T (n, rho, p / n)

The rules R, called slow weights, are one array for all matrices of all adapters; the fast weights
S_i T_i are each matrix's own. H (k, p) is never built: x is read as n rows of k / n, and

    u = x S              every row times every S_i
    v[b] = sum_a u[a] R[:, a, b]
    y = v T              summed over i, the blocks b one after the other

y (..., d) is a linear module's output with its bias, before the block's dropout and residual sum.
Compacter adapts attention's output projection and the second feed-forward layer, but nothing in
cross-attention; Compacter++ the second feed-forward layer alone. It is not linear in y and cannot
be merged. Trainable: 2 rho (d + m) + m + d per site, and n^3 once.

NOTE(paper): T of Up starts at zero, so the model is unchanged at step 0 exactly. The paper's start,
  where rules of 1e-4 leave it nearly so, is init="paper"; they train alike under Adam.
"""

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from pefts import views
from pefts.bound import Call, Rule, State, matmul
from pefts.core import Declaration, Traits, factory
from pefts.methods.bottleneck import ACTIVATIONS, PLACEMENTS
from pefts.targets import ALL_LINEAR, Select, Site, selection

ACTS = {**ACTIVATIONS, "gelu_new": lambda x: jax.nn.gelu(x, approximate=True)}
_CROSS_ATTENTION = r"(?i:cross|enc_?dec|encoder_(?!self))[^/]*(?i:attn|attention)"
DEFAULTS = {name: f"^(?!.*{_CROSS_ATTENTION}).*({targets})" for name, targets in PLACEMENTS.items()}
DEFAULT_REDUCTION = 32
INITS = ("zero", "paper")


@factory
def compacter(
    width: int | None = None,
    *,
    reduction: int | None = None,
    division: int = 4,
    slice_rank: int = 1,
    placement: str | None = "houlsby",
    activation: str = "gelu_new",
    init: str = "zero",
    std: float = 1e-4,
    **select: Unpack[Select],
) -> Declaration:
    """Hypercomplex adapter: y' = y + Up(act(Down(y))), each H = sum_i R_i (x) (S_i T_i), with bias.

    R (n, n, n) is shared by all; for a matrix (k, p), S (n, k / n, rho) and T (n, rho, p / n). The
    output axes of a DenseGeneral (heads, head size) are taken together as d. S and T start
    Xavier-uniform with gain sqrt(2). The paper trains the layer norms too: chain it with ln_tuning.

    Args:
      width: m, from 1 to d.
      reduction: m = d // reduction instead (paper: 32, which is taken where both are left out).
      division: n, a divisor of d and of m at every site (paper: 4).
      slice_rank: rho, from 1 to the smaller side of a slice, min(d, m) / n (paper: 1).
      placement: default targets, "houlsby" (Compacter) or "pfeiffer" (Compacter++); None is
        "all-linear". `targets` overrules it.
      activation: act, one of "gelu", "gelu_new" (by tanh; paper), "relu", "swish".
      init: "zero" (Up's T at zero) or "paper" (Xavier too: nearly unchanged at step 0).
      std: standard deviation of R (paper: 1e-4).
      **select: targets, exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft; it cannot be merged.

    Raises:
      ValueError: width and reduction both given or out of range, a division that does not divide d
        and m, slice_rank out of range, unknown placement, activation or init, std not positive, or
        no kernel matches.

    Example:
      >>> import jax, pefts
      >>> params = {"mlp": {"output": {"kernel": jax.numpy.ones((6, 8))}}}
      >>> adapter = pefts.compacter(4, division=2)
      >>> pefts.count(adapter.init(jax.random.key(0), params).trainable)
      44

    Source: Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, arXiv 2106.04647.
    """
    _check_sizes(width, reduction, division, slice_rank)
    _check_options(placement, activation, init, std)

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del W, stats
        d, m = site.d_out, _width(site, width, reduction)
        _check_fit(site, m, division, slice_rank)
        down, up = jax.random.split(key)
        trainable = {
            **_fast(down, "D", (d, m), division, slice_rank),
            **_fast(up, "U", (m, d), division, slice_rank),
        }
        if init == "zero":
            trainable["T_U"] = jnp.zeros_like(trainable["T_U"])
        return trainable, {}

    def share(key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict, dict]:
        del sites
        return {"R": std * jax.random.normal(key, (division,) * 3, jnp.float32)}, {}

    def output(y: jax.Array, p: State, call: Call) -> jax.Array:
        x = views.outputs(y, p["b_U"].shape[0])
        h = ACTS[activation](_affine(x, p, "D", call))
        return y + _affine(h, p, "U", call).reshape(y.shape)

    default = ALL_LINEAR if placement is None else DEFAULTS[placement]
    return Declaration(
        rule=Rule(start, output=output),
        selection=selection(default=default, **select),
        traits=Traits(mergeable=False, identity_at_init=init == "zero"),
        init_shared=share,
    )


def product(x: jax.Array, R: jax.Array, S: jax.Array, T: jax.Array) -> jax.Array:
    """x (..., k) times sum_i R_i (x) (S_i T_i): (..., p), in x's dtype.

    R (n, n, n), S (n, k / n, rho), T (n, rho, p / n).
    """
    n, k, rho = S.shape
    lead = x.shape[:-1]
    S_KxM = jnp.swapaxes(S, 0, 1).reshape(k, n * rho)
    u = matmul(x.reshape(*lead, n, k), S_KxM).reshape(-1, n, n, rho)
    v = jnp.einsum("tair,iab->tbir", u, R.astype(u.dtype))
    y = matmul(v.reshape(-1, n, n * rho), T.reshape(n * rho, -1))
    return y.reshape(*lead, -1)


def _affine(x: jax.Array, p: State, name: str, call: Call) -> jax.Array:
    y = product(x, call.shared["R"], p[f"S_{name}"], p[f"T_{name}"])
    return y + p[f"b_{name}"].astype(y.dtype).reshape(*(1,) * (y.ndim - 1), -1)


def _fast(
    key: jax.Array, name: str, sides: tuple[int, int], n: int, rho: int
) -> dict[str, jax.Array]:
    """The leaves of one matrix besides the rules."""
    key_S, key_T = jax.random.split(key)
    k, p = (side // n for side in sides)
    return {
        f"S_{name}": _xavier(key_S, (n, k, rho)),
        f"T_{name}": _xavier(key_T, (n, rho, p)),
        f"b_{name}": jnp.zeros(sides[1], jnp.float32),
    }


def _xavier(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Each slice uniform on +-sqrt(2) sqrt(6 / (rows + columns))."""
    bound = math.sqrt(12 / (shape[1] + shape[2]))
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _width(site: Site, width: int | None, reduction: int | None) -> int:
    if width is not None:
        m, given = width, f"width={width}"
    else:
        reduction = reduction or DEFAULT_REDUCTION
        m, given = site.d_out // reduction, f"reduction={reduction}"
    if not 1 <= m <= site.d_out:
        raise ValueError(
            f"{given} makes a bottleneck of {m} for {site.path!r}, whose output has {site.d_out} "
            f"features: choose a width of 1 to {site.d_out}."
        )
    return m


def _check_fit(site: Site, m: int, n: int, rho: int) -> None:
    both = math.gcd(site.d_out, m)
    if both % n:
        fit = [divisor for divisor in range(1, both + 1) if both % divisor == 0]
        raise ValueError(
            f"division={n} does not divide both the {site.d_out} output features of {site.path!r} "
            f"and its bottleneck of {m}: choose one of {fit[-4:]}, or another width."
        )
    if rho > m // n:
        raise ValueError(
            f"slice_rank={rho} is out of range for {site.path!r}, whose smaller slices have a side "
            f"of {m // n}: choose 1 to {m // n}."
        )


def _check_sizes(width: int | None, reduction: int | None, division: int, rho: int) -> None:
    for name, value in (
        ("width", 1 if width is None else width),
        ("reduction", 1 if reduction is None else reduction),
        ("division", division),
        ("slice_rank", rho),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: give a positive integer, such as 4.")
    if width is not None and reduction is not None:
        raise ValueError(
            f"reduction={reduction!r} sets the width of every site: give either it, or "
            f"width={width!r}."
        )


def _check_options(placement: str | None, activation: str, init: str, std: float) -> None:
    if placement is not None and placement not in DEFAULTS:
        raise ValueError(
            f"placement={placement!r} is unknown; choose one of {sorted(DEFAULTS)}, or None with "
            "targets of your own."
        )
    for name, value, known in (("activation", activation, ACTS), ("init", init, INITS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {sorted(known)}.")
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"std={std!r} must be positive: rules of zero let no gradient through.")
