"""Which leaves of a parameter tree a method adapts: patterns -> sites, with strict matching.

A target is one of
    "all-linear"          every kernel except embeddings and the output head
    r"(query|value)/kernel"   a regular expression, searched in the parameter's path
    ["query", "mlp/output"]   names: the last part(s) of the module's path
A pattern or a name that matches nothing is an error.
"""

import dataclasses
import difflib
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp

from pefts import paths, views

ALL_LINEAR = "all-linear"
HEADS = r"(^|/)(lm_head|classifier|head|score|logits|out_head)(/|$)"
VECTORS = ("bias", "scale")
Targets = str | Sequence[str]


class Select(TypedDict, total=False):
    """The keyword arguments that every method takes besides its hyperparameters."""

    targets: Targets  # "all-linear", a regular expression, or a list of names
    exclude: Targets  # the same forms; taken away from what `targets` matches
    # Regular expression -> value, first match wins; refused where kernels have none of their own.
    rank_pattern: Mapping[str, int] | None
    alpha_pattern: Mapping[str, float] | None
    axes: Mapping[str, str] | None  # regular expression -> letters of pefts.views; see infer_axes


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted leaf: what a method may know of it besides its values."""

    path: str
    shape: tuple[int, ...]
    axes: str
    rank: int = 0  # 0: the method has no rank
    alpha: float = 1.0  # also where the method has none
    static: tuple[tuple[str, Any], ...] = ()  # what the method's `plan` decided from the values

    @property
    def d_in(self) -> int:
        return views.matrix_shape(self.axes, self.shape)[-2]

    @property
    def d_out(self) -> int:
        return views.matrix_shape(self.axes, self.shape)[-1]

    @property
    def stack(self) -> tuple[int, ...]:
        return views.matrix_shape(self.axes, self.shape)[:-2]

    @property
    def is_embedding(self) -> bool:
        return self.path.endswith("embedding")

    @property
    def is_vector(self) -> bool:
        return not set(self.axes) & set("ik")


@dataclasses.dataclass(frozen=True)
class Selection:
    """`Select` made hashable and checked; `resolve` turns it into sites."""

    targets: Targets
    exclude: Targets = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    axes: tuple[tuple[str, str], ...] = ()
    vectors: bool = False  # whether biases and scales are candidates
    whole: bool = False  # leaves are taken whole, as one vector: their axes do not matter

    def resolve(
        self, params: Mapping[str, Any], *, rank: int = 0, alpha: float | None = None
    ) -> tuple[Site, ...]:
        """The sites in `params`, sorted by path.

        Raises:
          ValueError: a pattern matches nothing, a kernel's axes are ambiguous, or a rank is out of
            range.
        """
        leaves = {
            path: leaf
            for path, leaf in paths.flatten(params).items()
            if _is_candidate(path, leaf, self.vectors)
        }
        chosen = match(self.targets, leaves, argument="targets")
        if self.exclude:
            chosen -= match(self.exclude, leaves, argument="exclude")
        _check_floating({path: leaves[path] for path in sorted(chosen)})
        if not chosen:
            raise ValueError(
                f"exclude={self.exclude!r} leaves nothing of what targets={self.targets!r} matches."
            )
        for argument in ("rank_pattern", "alpha_pattern"):
            for pattern, _ in getattr(self, argument):
                match(pattern, sorted(chosen), argument=argument)
        alpha = 1.0 if alpha is None else alpha
        return tuple(self._site(path, leaves[path], rank, alpha) for path in sorted(chosen))

    def axes_of(self, path: str, shape: tuple[int, ...]) -> str:
        """The letters of this leaf's axes; see pefts.views."""
        axes = "o" * len(shape) if self.whole else _axes_of(path, shape, self.axes)
        views.check(axes, shape, path)
        return axes

    def _site(self, path: str, leaf: Any, rank: int, alpha: float) -> Site:
        shape = tuple(leaf.shape)
        axes = self.axes_of(path, shape)
        site = Site(
            path,
            shape,
            axes,
            rank=first(self.rank_pattern, path, rank) if rank else 0,
            alpha=float(first(self.alpha_pattern, path, alpha)),
        )
        if rank and not 1 <= site.rank <= min(site.d_in, site.d_out):
            raise ValueError(
                f"rank={site.rank} is out of range for {path!r}, a {site.d_in} x {site.d_out} "
                f"kernel: choose 1 to {min(site.d_in, site.d_out)}, or give it one of its own by "
                "rank_pattern."
            )
        return site


def selection(
    *, default: Targets = ALL_LINEAR, vectors: bool = False, whole: bool = False, **select: Any
) -> Selection:
    """A checked `Selection` from the keyword arguments of `Select`."""
    unknown = sorted(set(select) - set(Select.__annotations__))
    if unknown:
        raise ValueError(
            f"unknown argument {unknown[0]!r}; besides its hyperparameters a method takes "
            f"{sorted(Select.__annotations__)}."
        )
    targets, exclude = select.get("targets") or default, select.get("exclude") or ()
    return Selection(
        targets=targets if isinstance(targets, str) else tuple(targets),
        exclude=exclude if isinstance(exclude, str) else tuple(exclude),
        rank_pattern=tuple((select.get("rank_pattern") or {}).items()),
        alpha_pattern=tuple((select.get("alpha_pattern") or {}).items()),
        axes=tuple((select.get("axes") or {}).items()),
        vectors=vectors or whole,
        whole=whole,
    )


def match(targets: Targets, candidates: Iterable[str], *, argument: str = "targets") -> set[str]:
    """The candidate paths that `targets` names.

    Raises:
      ValueError: if any pattern or name matches none of them; the message lists near names.
    """
    candidates = list(candidates)
    if targets == ALL_LINEAR:
        return {path for path in candidates if _is_linear(path)}
    chosen: set[str] = set()
    for pattern in [targets] if isinstance(targets, str) else targets:
        matched = _match_one(
            pattern, candidates, is_regex=isinstance(targets, str), argument=argument
        )
        if not matched:
            raise ValueError(_nothing_matched(pattern, candidates, argument))
        chosen |= matched
    return chosen


def _match_one(pattern: str, candidates: list[str], *, is_regex: bool, argument: str) -> set[str]:
    if not is_regex:
        return {
            path
            for path in candidates
            if f"/{path}".endswith(f"/{pattern}")
            or f"/{path}".rpartition("/")[0].endswith(f"/{pattern}")
        }
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}={pattern!r} is not a regular expression: {error}.") from None
    return {path for path in candidates if regex.search(path)}


def _nothing_matched(pattern: str, candidates: list[str], argument: str) -> str:
    words = re.findall(r"\w+", pattern)
    modules = sorted({part for path in candidates for part in path.split("/")})
    near = {
        name for word in words for name in difflib.get_close_matches(word, modules, n=2, cutoff=0.5)
    }
    closest = sorted(path for path in candidates if near & set(path.split("/")))[:5]
    shown = closest or sorted(candidates)[:5]
    return (
        f"{argument}: {pattern!r} matches no parameter. "
        + (f"Near names: {sorted(near)}. " if near else "")
        + f"For instance these could be targeted: {shown}."
    )


def _is_linear(path: str) -> bool:
    return not path.endswith(("embedding", *VECTORS)) and not re.search(HEADS, path)


def _is_candidate(path: str, leaf: Any, vectors: bool) -> bool:
    if not hasattr(leaf, "shape"):
        return False
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    # One byte or less: a quantised kernel, which must not be passed over in silence.
    if not floating and leaf.dtype.itemsize > 1:
        return False
    return (vectors and floating) or (len(leaf.shape) >= 2 and not path.endswith(VECTORS))


def _check_floating(chosen: Mapping[str, Any]) -> None:
    for path, leaf in chosen.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"targets match {path!r}, which is {leaf.dtype}: a floating-point kernel is needed "
                "here; dequantise it first, or exclude it."
            )


def _axes_of(path: str, shape: tuple[int, ...], table: tuple[tuple[str, str], ...]) -> str:
    axes = first(table, path, None)
    if axes is not None:
        return axes
    if path.endswith(VECTORS) or len(shape) < 2:
        return "l" * max(len(shape) - 1, 0) + "o"
    if len(shape) == 2:
        return "io"
    raise ValueError(
        f"the {len(shape)} axes of {path!r}, shape {shape}, are ambiguous (scanned layers, heads, "
        "windows?). Pass axes=pefts.infer_axes(model.apply, params, *inputs), or "
        f"axes={{{re.escape(path)!r}: "
        f"'{'l' + 'io' if len(shape) == 3 else 'kkio'}'}} with the letters of pefts.views."
    )


def first(table: Iterable[tuple[str, Any]], path: str, default: Any) -> Any:
    """The value of the first pattern that is found in the path."""
    return next((value for pattern, value in table if re.search(pattern, path)), default)


def exactly(path: str) -> str:
    """The regular expression that this path alone matches."""
    return f"^{re.escape(path)}$"


def only(chosen: Iterable[str]) -> str:
    """The regular expression that these paths alone match."""
    return "^(" + "|".join(re.escape(path) for path in chosen) + ")$"


def site_key(key: jax.Array, path: str) -> jax.Array:
    """A key by path alone: adding a target changes no other target's values."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
