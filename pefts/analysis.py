"""What fine-tuning did to a model's kernels: their spectra, before and after.

Kernels W (d_in, d_out) = U diag(S) V^T are compared on the output side, that is by V, and each
slice of a stack by itself. Everything here takes plain parameters: the base model's and, for an
adapter, what `peft.merge` returns.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefts import linalg, paths, views
from pefts.core import Params
from pefts.targets import ALL_LINEAR, Site, Targets, selection

TOPS = (1, 2, 5, 10, 20)
THRESHOLDS = tuple(n / 20 for n in range(1, 20))
SPECTRA_SHOWN = 6  # kinds of kernels, those that changed most
HIGHEST = jax.lax.Precision.HIGHEST
MATPLOTLIB = "the figure needs matplotlib: pip install matplotlib."


class Intruders(NamedTuple):
    """How well the singular vectors of a changed kernel are known to the original one."""

    similarity: jax.Array  # (*stack, k): m_i, by descending singular value
    count: jax.Array  # (*stack,), int32
    spans: bool  # d_out <= d_in: the original's V spans all outputs


def intruders(
    before: Params,
    after: Params,
    targets: Targets = ALL_LINEAR,
    *,
    top: int = 10,
    threshold: float = 0.5,
    axes: Mapping[str, str] | None = None,
    exclude: Targets = (),
) -> dict[str, Intruders]:
    """Singular vectors that rank high in the changed kernel and resemble none of the original's.

        m_i = max_j |<V_after[:, i], V_before[:, j]>|        i, j < k = min(d_in, d_out)
        i is an intruder if i < top and m_i < threshold

    All j count, not the first alone. Where d_out > d_in the original's V does not span the outputs
    and small m_i come easily: compare kernels of one shape (`spans`). Where singular values
    coincide their vectors are arbitrary within a subspace, which looks like intruders.

    Args:
      before: the original parameters.
      after: the changed ones, of the same tree.
      targets: the kernels; see pefts.targets.
      top: how many leading vectors are looked at (the paper's code and Hugging Face PEFT: 10).
      threshold: on m_i, a cosine (the paper's code and Hugging Face PEFT: 0.5).
      axes: the kernels' axes, from pefts.infer_axes, where they have more than two.
      exclude: in the forms of targets.

    Returns:
      {path: Intruders}; `total` sums their counts, `curve` counts anew for other settings.

    Raises:
      ValueError: top < 1, threshold outside [0, 1], the trees differ, or no kernel matches.

    Example:
      >>> import jax.numpy as jnp
      >>> before = {"kernel": jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])}
      >>> after = {"kernel": jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 9.0]])}
      >>> found = intruders(before, after)
      >>> total(found), [round(float(m), 2) for m in found["kernel"].similarity]
      (1, [0.11, 1.0])

    Source: LoRA vs Full Fine-tuning: An Illusion of Equivalence, arXiv 2410.21228, and its code.
    """
    _check(top, threshold)

    def similarities(W: jax.Array, changed: jax.Array) -> jax.Array:
        return _cosines(linalg.svd(changed).V, linalg.svd(W).V).max(-1)

    found = {}
    for site, W, changed in _pairs(before, after, targets, axes, exclude):
        similarity = _map(similarities, W, changed)
        count = jnp.sum(similarity[..., :top] < threshold, axis=-1, dtype=jnp.int32)
        found[site.path] = Intruders(similarity, count, site.d_out <= site.d_in)
    return found


def total(found: Mapping[str, Intruders]) -> int:
    """The intruders of all kernels together."""
    return int(sum(int(jnp.sum(kernel.count)) for kernel in found.values()))


def curve(
    kernels: Iterable["Intruders | Row"],
    tops: Sequence[int] = TOPS,
    thresholds: Sequence[float] = THRESHOLDS,
) -> np.ndarray:
    """Totals (tops, thresholds) for other settings, without decomposing anything again.

    `kernels` are the values of `intruders`, or the rows of `report`.
    """
    host = [np.asarray(kernel.similarity) for kernel in kernels]
    return np.array(
        [[sum(int((m[..., :top] < t).sum()) for m in host) for t in thresholds] for top in tops]
    )


def mitigate(
    before: Params,
    after: Params,
    targets: Targets = ALL_LINEAR,
    *,
    strength: float = 0.75,
    top: int = 10,
    threshold: float = 0.5,
    axes: Mapping[str, str] | None = None,
    exclude: Targets = (),
) -> dict[str, Any]:
    """The changed parameters with their intruders shrunk: W' = W + (lambda - 1) sum s_i u_i v_i^T.

    The sum runs over the intruders of the changed kernel W = U diag(S) V^T. W' - W_before can have
    a higher rank than the adapter's update: cutting it back to that rank loses some of it.

    Args:
      before, after, targets, top, threshold, axes, exclude: as `intruders` takes them.
      strength: lambda, the share of each intruder that is kept: 1 changes nothing, 0 removes them
        (Hugging Face PEFT: 0.75).

    Returns:
      A tree like `after`; kernels keep their dtype.

    Raises:
      ValueError: strength outside [0, 1], or what `intruders` raises.

    Example:
      >>> import jax.numpy as jnp
      >>> before = {"kernel": jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])}
      >>> after = {"kernel": jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 9.0]])}
      >>> abs(mitigate(before, after, strength=0.5)["kernel"].round(3)).tolist()
      [[2.0, 0.0, 0.0], [0.0, 0.5, 4.5]]

    NOTE(paper): Hugging Face PEFT documents lambda as the share that is subtracted; its code keeps
      lambda, and the paper, where 0 removes, agrees with the code.

    Source: LoRA vs Full Fine-tuning: An Illusion of Equivalence, arXiv 2410.21228; Hugging Face
      PEFT, peft/tuners/lora/intruders.py.
    """
    _check(top, threshold)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength!r}: give the share to keep, from 0 to 1.")

    def shrink(W: jax.Array, changed: jax.Array) -> jax.Array:
        U, S, V = linalg.svd(changed)
        intrudes = _cosines(V, linalg.svd(W).V).max(-1)[:top] < threshold
        scale = jnp.where(intrudes, (strength - 1) * S[:top], jnp.zeros_like(S[:top]))
        return changed + jnp.matmul(U[:, :top] * scale[None], V[:, :top].T, precision=HIGHEST)

    leaves = paths.flatten(after)
    for site, W, changed in _pairs(before, after, targets, axes, exclude):
        leaf = leaves[site.path]
        shrunk = _map(shrink, W, changed).astype(leaf.dtype)
        leaves[site.path] = views.from_matrix(shrunk, site.axes, site.shape)
    return paths.unflatten(leaves)


def spectra(
    tree: Params,
    targets: Targets = ALL_LINEAR,
    *,
    axes: Mapping[str, str] | None = None,
    exclude: Targets = (),
) -> dict[str, jax.Array]:
    """{path: singular values (*stack, k), descending} of the targeted kernels."""
    return {
        site.path: _map(linalg.singular_values, W)
        for site, W in _kernels(tree, targets, axes, exclude)
    }


def effective_rank(tree: Any, **select: Any) -> Any:
    """exp(H(p)), H(p) = -sum p_i log p_i, p = S / sum(S): the rank that a spectrum amounts to.

    Between 1 and the rank: k for k equal singular values, 1 for one; 0 for a matrix of zeros.

    Args:
      tree: a matrix (..., d_in, d_out), or parameters.
      **select: targets, axes and exclude of `spectra`, for parameters.

    Returns:
      (...) for a matrix, {path: (*stack,)} for parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(effective_rank(jnp.diag(jnp.array([2.0, 2.0, 0.0])))), 4)
      2.0

    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO
      2007.
    """
    return _of_spectra(_entropy_rank, tree, select)


def stable_rank(tree: Any, **select: Any) -> Any:
    """||W||_F^2 / ||W||_2^2 = sum(S^2) / S_1^2, at most the rank; 0 for a matrix of zeros.

    Takes and returns what `effective_rank` does. Small singular values hardly count, so that
    rounding noise does not raise it.

    Source: Sampling from large matrices: an approach through geometric functional analysis, arXiv
      math/0503442 (there: numerical rank).
    """
    return _of_spectra(_energy_rank, tree, select)


def subspace_similarity(A: Any, B: Any) -> jax.Array:
    """phi(i, j) = ||A_i^T B_j||_F^2 / min(i, j): how far the first i columns lie in the first j.

    A (..., n, r) and B (..., n, q) hold orthonormal columns in order, such as the U or V of
    pefts.linalg.svd. 1 where the smaller of the two spaces is part of the other, 0 where they are
    orthogonal; signs do not matter.

    Returns:
      (..., r, q), with phi(i, j) at [i - 1, j - 1].

    Raises:
      ValueError: the columns have different lengths.

    Source: LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 7.2.
    """
    A, B = jnp.asarray(A), jnp.asarray(B)
    if A.ndim < 2 or B.ndim < 2 or A.shape[-2] != B.shape[-2]:
        raise ValueError(f"A {A.shape} and B {B.shape} need columns of one length, (..., n, r).")
    squares = jnp.square(jnp.einsum("...nr,...nq->...rq", A, B, precision=HIGHEST))
    captured = jnp.cumsum(jnp.cumsum(squares, axis=-2), axis=-1)
    r, q = captured.shape[-2:]
    smaller = np.minimum(np.arange(1, r + 1)[:, None], np.arange(1, q + 1)[None])
    return captured / jnp.broadcast_to(jnp.asarray(smaller, captured.dtype), captured.shape)


# --- reports ---


class Row(NamedTuple):
    """One slice of one kernel, in plain numbers; V_after are the changed kernel's vectors."""

    path: str
    layer: tuple[int, ...]  # index into the stack; () where there is none
    shape: tuple[int, int]  # (d_in, d_out)
    spans: bool  # see Intruders
    intruders: int
    effective_rank: tuple[float, float, float]  # before, after, and of the difference
    relative_change: float  # ||W_after - W_before||_F / ||W_before||_F
    spectrum: np.ndarray  # (3, k): singular values before, after, and of the difference
    similarity: np.ndarray  # (k,): m_i of `intruders`
    cosines: np.ndarray  # (n, n): |<V_after[:, i], V_before[:, j]>| of the leading n = 2 top


def report(
    before: Params,
    after: Params,
    targets: Targets = ALL_LINEAR,
    *,
    top: int = 10,
    threshold: float = 0.5,
    axes: Mapping[str, str] | None = None,
    exclude: Targets = (),
) -> list[Row]:
    """A row for every slice of every kernel, in the order of paths and layers.

    Takes what `intruders` takes, and raises what it raises.
    """
    _check(top, threshold)

    def compare(W: jax.Array, changed: jax.Array) -> tuple[jax.Array, ...]:
        old, new, change = linalg.svd(W), linalg.svd(changed), linalg.svd(changed - W)
        cosines = _cosines(new.V, old.V)
        spectrum = jnp.stack([old.S, new.S, change.S])
        ranks = _entropy_rank(spectrum)
        moved = jnp.linalg.norm(change.S) / jnp.linalg.norm(old.S)
        return spectrum, ranks, moved, cosines.max(-1), cosines[: 2 * top, : 2 * top]

    rows = []
    for site, W, changed in _pairs(before, after, targets, axes, exclude):
        compared = [np.asarray(part) for part in _map(compare, W, changed)]
        for layer in np.ndindex(site.stack):
            spectrum, ranks, moved, similarity, cosines = (part[layer] for part in compared)
            rows.append(
                Row(
                    site.path,
                    layer,
                    (site.d_in, site.d_out),
                    site.d_out <= site.d_in,
                    int(np.sum(similarity[:top] < threshold)),
                    (float(ranks[0]), float(ranks[1]), float(ranks[2])),
                    float(moved),
                    spectrum,
                    similarity,
                    cosines,
                )
            )
    return rows


def kinds_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by a short name that all layers of one kernel share, stacked or not."""
    names = [re.sub(r"\d+", "*", row.path) for row in rows]
    parts = [name.split("/") for name in names]
    same = len(os.path.commonprefix([p[:-1] for p in parts])) if len(set(names)) > 1 else 0
    kinds: dict[str, list[Row]] = {}
    for row, part in zip(rows, parts, strict=True):
        short = "/".join(part[same:]).removesuffix("/kernel")
        kinds.setdefault(short, []).append(row)
    return kinds


def layer_of(row: Row) -> str:
    """The layer's number: its place in the stack, or the numbers in its path."""
    return " ".join(map(str, row.layer)) or " ".join(re.findall(r"\d+", row.path))


def figure(rows: Sequence[Row], file: str | Path, *, top: int = 10, threshold: float = 0.5) -> None:
    """Draw a report: spectra, and where the changed kernels' vectors come from.

    Above, the singular values of each kind of kernel, one line for each layer. Below, the cosines
    between the singular vectors of the kernel with the most intruders (or the largest change) and
    the original's; m_i of all kernels; and how many intruders other settings would count.

    Args:
      rows: of `report`.
      file: the image, in a format that matplotlib knows by its ending.
      top, threshold: what the report was made with.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(MATPLOTLIB) from error
    kinds = kinds_of(rows)
    shown = sorted(kinds, key=lambda kind: -max(row.relative_change for row in kinds[kind]))
    shown = [kind for kind in kinds if kind in shown[:SPECTRA_SHOWN]]
    fig = Figure(figsize=(17, 10), layout="constrained")
    parts: Any = fig.subfigures(2, 1, height_ratios=(1, 1.5))
    above, below = parts
    panels = above.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, shown, strict=True):
        _draw_spectra(panel, kind, kinds[kind])
    left, middle, right = below.subplots(1, 3, width_ratios=(1, 1.1, 1))
    below.colorbar(_draw_cosines(left, rows, kinds), ax=left, label="|cosine|", shrink=0.8)
    below.colorbar(
        _draw_similarity(middle, kinds, top, threshold), ax=middle, label="$m_i$", shrink=0.8
    )
    _draw_curve(right, rows, top, threshold)
    largest = max(row.spectrum.max() for row in rows)
    panels[0].set(ylabel="singular value", ylim=(1e-4 * largest, 2 * largest))
    above.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    file = Path(file)
    temporary = file.with_name(f"{file.stem}.tmp{file.suffix}")
    fig.savefig(temporary, dpi=110)
    os.replace(temporary, file)


def _draw_spectra(panel: Any, kind: str, rows: Sequence[Row]) -> None:
    styles = (("before", "0.7", 2.5), ("after", "tab:blue", 0.8), ("difference", "tab:orange", 0.8))
    for row in rows:
        index = np.arange(1, len(row.similarity) + 1)
        for values, (label, color, width) in zip(row.spectrum, styles, strict=True):
            label = label if row is rows[0] else None
            # A logarithm has no zero: what is not there is not drawn.
            values = np.where(values > 0, values, np.nan)
            panel.plot(index, values, color=color, linewidth=width, label=label)
    panel.set(xscale="log", yscale="log", xlabel="i")
    panel.set_title(kind, fontsize=10)


def _draw_cosines(panel: Any, rows: Sequence[Row], kinds: Mapping[str, list[Row]]) -> Any:
    row = max(rows, key=lambda row: (row.intruders, row.relative_change))
    kind = next(kind for kind, members in kinds.items() if row in members)
    n = len(row.cosines)
    extent = (0.5, n + 0.5, n + 0.5, 0.5)
    image = panel.imshow(row.cosines, cmap="Blues", vmin=0, vmax=1, extent=extent)
    where = f"{kind}, layer {layer_of(row)}" if layer_of(row) else kind
    panel.set_title(f"output directions of {where}", fontsize=10)
    panel.locator_params(integer=True)
    panel.set(xlabel="j, before", ylabel="i, after")
    return image


def _draw_similarity(panel: Any, kinds: Mapping[str, list[Row]], top: int, threshold: float) -> Any:
    rows = [row for members in kinds.values() for row in members]
    width = max(len(row.similarity[:top]) for row in rows)
    values = np.full((len(rows), width), np.nan)
    for n, row in enumerate(rows):
        values[n, : len(row.similarity[:top])] = row.similarity[:top]
    # Pale where a direction is known: what stands out is new.
    extent = (0.5, width + 0.5, len(rows) - 0.5, -0.5)
    image = panel.imshow(values, cmap="OrRd_r", vmin=0, vmax=1, aspect="auto", extent=extent)
    marked = np.argwhere(values < threshold)
    panel.scatter(marked[:, 1] + 1, marked[:, 0], marker="x", color="black", s=14, linewidths=1)
    ends = np.cumsum([len(members) for members in kinds.values()])
    for end in ends[:-1]:
        panel.axhline(end - 0.5, color="0.6", linewidth=1)
    middles = ends - np.asarray([len(members) for members in kinds.values()]) / 2 - 0.5
    labels = [kind if members[0].spans else f"{kind}*" for kind, members in kinds.items()]
    panel.set_yticks(middles, labels, fontsize=8)
    panel.locator_params(axis="x", integer=True)
    panel.set_title(f"the best cosine, $m_i$, in every layer (x: below {threshold})", fontsize=10)
    panel.set_xlabel("i, after" if all(row.spans for row in rows) else "i, after (* d_out > d_in)")
    return image


def _draw_curve(panel: Any, rows: Sequence[Row], top: int, threshold: float) -> None:
    tops = sorted({*TOPS, top})
    shades = np.linspace(0.75, 0.15, len(tops))
    for number, line, shade in zip(tops, curve(rows, tops), shades, strict=True):
        color, width = ("tab:orange", 2.5) if number == top else (str(shade), 1.2)
        label = f"{number} leading" if number > 1 else "the first"
        panel.plot(THRESHOLDS, line, color=color, linewidth=width, label=label)
    panel.axvline(threshold, color="0.6", linestyle="--", linewidth=1)
    panel.set_title("intruders of all kernels, by threshold", fontsize=10)
    panel.set(
        xlabel="threshold on $m_i$", xlim=(0, 1), ylim=(0, max(1, 1.05 * panel.get_ylim()[1]))
    )
    panel.yaxis.get_major_locator().set_params(integer=True)
    panel.legend(frameon=False)


# --- details ---


def _check(top: int, threshold: float) -> None:
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise ValueError(f"top={top!r}: give a positive number of leading vectors, such as 10.")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold!r}: give a cosine from 0 to 1, such as 0.5.")


def _kernels(
    tree: Params, targets: Targets, axes: Mapping[str, str] | None, exclude: Targets
) -> Iterator[tuple[Site, jax.Array]]:
    """The targeted kernels as matrices (*stack, d_in, d_out)."""
    flat = paths.flatten(tree)
    for site in selection(targets=targets, axes=axes, exclude=exclude).resolve(tree):
        yield site, views.to_matrix(jnp.asarray(flat[site.path]), site.axes)


def _pairs(
    before: Params,
    after: Params,
    targets: Targets,
    axes: Mapping[str, str] | None,
    exclude: Targets,
) -> Iterator[tuple[Site, jax.Array, jax.Array]]:
    changed = paths.flatten(after)
    for site, W in _kernels(before, targets, axes, exclude):
        shape = getattr(changed.get(site.path), "shape", None)
        if shape is None or tuple(shape) != site.shape:
            raise ValueError(
                f"{site.path!r} has shape {site.shape} before and {shape} after: give two trees of "
                "one model, for an adapter the base and peft.merge(base, state)."
            )
        yield site, W, views.to_matrix(jnp.asarray(changed[site.path]), site.axes)


def _map(function: Callable[..., Any], *matrices: jax.Array) -> Any:
    """function(slice, ...) for every slice of the stacks, one by one, in float32 or float64."""
    stack = matrices[0].shape[:-2]
    is_double = any(matrix.dtype == jnp.float64 for matrix in matrices)
    dtype = jnp.float64 if is_double else jnp.float32

    def each(slices: tuple[jax.Array, ...]) -> Any:
        return function(*(matrix.astype(dtype) for matrix in slices))

    flat = tuple(matrix.reshape(-1, *matrix.shape[-2:]) for matrix in matrices)
    out = jax.jit(lambda flat: jax.lax.map(each, flat))(flat)
    return jax.tree.map(lambda leaf: leaf.reshape(*stack, *leaf.shape[1:]), out)


def _cosines(V_after: jax.Array, V_before: jax.Array) -> jax.Array:
    """|<V_after[:, i], V_before[:, j]>| (k, k)."""
    return jnp.abs(jnp.matmul(V_after.T, V_before, precision=HIGHEST))


def _entropy_rank(S: jax.Array) -> jax.Array:
    total = S.sum(-1)
    p = S / jnp.where(total > 0, total, jnp.ones_like(total))[..., None]
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), axis=-1)
    return jnp.where(total > 0, jnp.exp(entropy), jnp.zeros_like(total))


def _energy_rank(S: jax.Array) -> jax.Array:
    largest = jnp.square(S[..., 0])
    rank = jnp.sum(jnp.square(S), axis=-1) / jnp.where(largest > 0, largest, 1)
    return jnp.where(largest > 0, rank, jnp.zeros_like(rank))


def _of_spectra(measure: Callable[[jax.Array], jax.Array], tree: Any, select: Any) -> Any:
    if isinstance(tree, Mapping):
        return {path: measure(S) for path, S in spectra(tree, **select).items()}
    return measure(linalg.svd(tree).S)
