"""ScaLearn: trained adapters of other tasks, frozen, whose outputs alone are scaled and summed.

    y' = y + sum_t w_t * u_t(y)                 u_t(y) = s_t (act(y D_t + b_t) U_t + c_t)

u_t is what bottleneck adapter t adds, D_t (d, m_t), U_t (m_t, d); w_t is a row of d factors or a
single one, a kernel's own or one for all kernels:

    form           w            trainable
    plain          (T, d)       T d per kernel
    uniform        (T, 1)       T per kernel
    plus           (T, d)       T d once
    plus_uniform   (T, 1)       T once

As w_t scales the columns of U_t, the sum is one adapter of width m = sum_t m_t, which is how it is
computed and what `to_bottleneck` returns. w starts normal around 2 / T, so the model is that of the
sources' doubled mean at step 0. It is not linear in y and cannot be merged into kernels.

NOTE(paper): entries of w are dropped in training there, with probability 0.3 (0 for plus_uniform).
  A hook on a module's output gets no random stream here, so they are not.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack
from urllib.parse import unquote

import jax
import jax.numpy as jnp
import numpy as np

from pefts import fingerprint, paths, views
from pefts.bound import Call, Rule, State, matmul
from pefts.core import SHARED, Declaration, Peft, PeftState, Traits, factory
from pefts.methods.bottleneck import ACTIVATIONS, PLACEMENTS, bottleneck
from pefts.targets import ALL_LINEAR, HEADS, Select, Site, exactly, only, selection

FORMS = ("plain", "uniform", "plus", "plus_uniform")
Groups = Mapping[str, Mapping[str, np.ndarray]]  # {path: {name: array}}


class Source(NamedTuple):
    """What a file of a bottleneck adapter holds."""

    file: str
    config: Mapping[str, Any]
    groups: Groups
    base: Mapping[str, Any]  # the fingerprint of the kernels it was trained on


@factory
def scalearn(
    sources: Sequence[str],
    form: str = "plain",
    *,
    placement: str | None = "pfeiffer",
    activation: str = "gelu",
    total: float = 2.0,
    std: float = 1e-3,
    **select: Unpack[Select],
) -> Declaration:
    """Scaled source adapters: y' = y + sum_t w_t * u_t(y), w (T, d) or (T, 1), u_t (..., d) frozen.

    The sources are files of `pefts.save`, read by `init` and kept in the state, which needs them no
    longer. The paper has the target task's own adapter among them.

    Args:
      sources: files of trained `pefts.bottleneck` adapters on these kernels of this base, alone or
        in a chain with a trained head, which is left out, as train.py saves them.
      form: "plain" (ScaLearn), "uniform" (ScaLearnUniform), "plus" (ScaLearn++) or "plus_uniform"
        (ScaLearnUniform++); the last two share w between all kernels.
      placement: default targets, "houlsby" or "pfeiffer" (paper); None is "all-linear". `targets`
        overrules it. They have to be those of the sources.
      activation: act of the sources, one of "gelu", "relu", "swish".
      total: w starts around total / T (paper: 2).
      std: its standard deviation (paper: 1e-3).
      **select: targets, exclude, axes; see pefts.targets.Select.

    Returns:
      A Peft; it cannot be merged into kernels, but into one adapter by `to_bottleneck`.

    Raises:
      ValueError: no sources, unknown form, placement or activation, total not finite, std negative,
        or no kernel matches; at init: a file that is none of a bottleneck adapter, was trained on
        another base or with another activation, trained more than it and a head, lacks a targeted
        kernel, adapts one that is not targeted, or holds arrays of other shapes; form="plus" for
        kernels of several d.

    Example:
      >>> import jax, pathlib, pefts, tempfile
      >>> params = {"mlp": {"output": {"kernel": jax.numpy.ones((6, 4))}}}
      >>> source = pefts.bottleneck(2, placement="pfeiffer")
      >>> file = pathlib.Path(tempfile.mkdtemp(), "source.safetensors")
      >>> pefts.save(file, source, source.init(jax.random.key(0), params), params)
      >>> peft = pefts.scalearn([str(file), str(file)])
      >>> pefts.count(peft.init(jax.random.key(1), params).trainable)
      8

    Source: ScaLearn: Simple and Highly Parameter-Efficient Task Transfer by Learning to Scale,
      arXiv 2310.01217.
    """
    files = _check_sources(sources)
    _check_options(form, placement, activation, total, std)
    is_shared, is_row = form.startswith("plus"), not form.endswith("uniform")

    def omega(key: jax.Array, d: int) -> dict[str, jax.Array]:
        noise = jax.random.normal(key, (len(files), d if is_row else 1), jnp.float32)
        return {"omega": total / len(files) + std * noise}

    def start(key: jax.Array, W: jax.Array, *, site: Site, stats: Any) -> tuple[dict, dict]:
        del W
        return {} if is_shared else omega(key, site.d_out), stats

    def share(key: jax.Array, sites: tuple[Site, ...]) -> tuple[dict, dict]:
        if is_row:
            _check_one_width(sites)
        return omega(key, sites[0].d_out), {}

    def output(y: jax.Array, p: State, call: Call) -> jax.Array:
        merged = one_adapter(p, call.shared["omega"] if is_shared else p["omega"])
        D, b_D, U, b_U = (merged[name].astype(y.dtype) for name in ("D", "b_D", "U", "b_U"))
        x = views.outputs(y, D.shape[0])
        ones = (1,) * (x.ndim - 1)
        h = ACTIVATIONS[activation](matmul(x, D) + b_D.reshape(*ones, -1))
        return y + (matmul(h, U) + b_U.reshape(*ones, -1)).reshape(y.shape)

    def prepare(sites: tuple[Site, ...], matrix_of: Any, stats: Any) -> tuple[tuple, Any]:
        del stats
        found = [_read(file) for file in files]
        for source in found:
            _check_activation(source, activation)
            _check_base(source, sites, matrix_of)
        return sites, {site.path: _joined(found, site) for site in sites}

    default = ALL_LINEAR if placement is None else PLACEMENTS[placement]
    return Declaration(
        rule=Rule(start, output=output),
        selection=selection(default=default, **select),
        traits=Traits(mergeable=False, identity_at_init=False, shapes_from_values=True),
        prepare=prepare,
        init_shared=share if is_shared else None,
        unmergeable="pefts.methods.scalearn.to_bottleneck makes one adapter of it",
    )


def one_adapter(p: State, omega: jax.Array) -> dict[str, jax.Array]:
    """D (d, m), b_D (m,), U (m, d) and b_U (d,) of the one adapter that the scaled sources are.

    Args:
      p: D, b_D, U, b_U (T, d) and source (m,), the source of each hidden unit.
      omega: w, (T, d) or (T, 1).
    """
    U, b_U = (p[name].astype(omega.dtype) for name in ("U", "b_U"))
    return {
        "D": p["D"],
        "b_D": p["b_D"],
        "U": U * omega[p["source"]],
        "b_U": jnp.sum(b_U * omega, axis=0),
    }


def to_bottleneck(peft: Peft, state: PeftState) -> tuple[Peft, PeftState]:
    """The same outputs from one bottleneck adapter for each kernel, m = sum_t m_t wide.

    Args:
      peft: a scalearn.
      state: its state.

    Returns:
      (peft, state) of a pefts.bottleneck.

    Raises:
      ValueError: at the new method's init, where m is above a kernel's smaller side.
    """
    shared = state.trainable.get(SHARED)
    trainable, frozen, widths = {}, {}, {}
    for path, p in state.frozen.items():
        stack = p["source"].shape[:-1]
        omega = state.trainable[path]["omega"] if shared is None else shared["omega"]
        convert: Callable[..., Any] = one_adapter
        for _ in stack:
            convert = jax.vmap(convert, in_axes=(0, None if shared is not None else 0))
        trainable[path] = convert(p, omega)
        frozen[path] = {"scale": jnp.ones(stack, jnp.float32)}
        widths[path] = p["source"].shape[-1]
    width = max(widths.values())
    merged = bottleneck(
        width,
        activation=peft.config["activation"],
        targets=only(widths),
        axes=peft.config.get("axes"),
        rank_pattern={exactly(path): m for path, m in widths.items() if m != width} or None,
    )
    return merged, PeftState(trainable, frozen)


def _joined(sources: Sequence[Source], site: Site) -> dict[str, jax.Array]:
    """The sources of one kernel side by side, each scaled as it was."""
    parts = [_checked(source, site) for source in sources]
    widths = [part["D"].shape[-1] for part in parts]
    source = np.repeat(np.arange(len(parts), dtype=np.int32), widths)
    leaves = {
        "D": np.concatenate([p["D"] for p in parts], axis=-1),
        "b_D": np.concatenate([p["b_D"] for p in parts], axis=-1),
        "U": np.concatenate([p["scale"][..., None, None] * p["U"] for p in parts], axis=-2),
        "b_U": np.stack([p["scale"][..., None] * p["b_U"] for p in parts], axis=-2),
        "source": np.broadcast_to(source, (*site.stack, len(source))),
    }
    return {name: jnp.asarray(leaf) for name, leaf in leaves.items()}


def _checked(source: Source, site: Site) -> Mapping[str, np.ndarray]:
    group, d = source.groups[site.path], site.d_out
    m = group["D"].shape[-1] if group.get("D", np.zeros(())).ndim else 0
    shapes = {"D": (d, m), "U": (m, d), "b_D": (m,), "b_U": (d,), "scale": ()}
    found = {name: leaf.shape for name, leaf in group.items()}
    wanted = {name: (*site.stack, *shape) for name, shape in shapes.items()}
    if found != wanted:
        raise ValueError(
            f"{source.file} holds arrays of shapes {found} for {site.path!r}, and a bottleneck "
            f"adapter of this kernel has {wanted}: it was trained on another model, or with other "
            "axes."
        )
    return group


def _read(file: str) -> Source:
    from pefts import io  # it imports the methods

    metadata, tensors = io.open_tensors(Path(file))
    try:
        header = json.loads(metadata[io.HEADER])
        version, config, base = (header[name] for name in ("format_version", "config", "base"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} was not written by pefts.save, or is damaged: {error}.") from None
    if version != io.FORMAT_VERSION:
        raise ValueError(f"{file} has format_version={version!r}; {io.FORMAT_VERSION} is read.")
    io.check_finite(tensors, file)
    members = list(_members(config))
    adapters = [(labels, own) for labels, own in members if own["method"] == "bottleneck"]
    if len(adapters) != 1:
        raise ValueError(
            f"{file} holds {sorted(own['method'] for _, own in members)}; sources are files of one "
            "pefts.bottleneck, alone or chained with a trained head."
        )
    labels, own = adapters[0]
    groups: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        _, *parts, path, leaf = (unquote(part) for part in name.split(":"))
        if tuple(parts) == labels:
            groups.setdefault(path, {})[leaf] = array
        elif not re.search(HEADS, path):
            raise ValueError(
                f"{file} trains {path!r} beside its bottleneck adapter, which is no head: the "
                "adapter alone does not do what it did. Merge that into the base first."
            )
    return Source(file, own, groups, base)


def _members(
    config: Mapping[str, Any], labels: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """(labels in the state, config) of each method in a composition."""
    members = config.get("members")
    if members is None:
        yield labels, config
        return
    for label in members if isinstance(members, Mapping) else range(len(members)):
        yield from _members(members[label], (*labels, str(label)))


def _check_activation(source: Source, activation: str) -> None:
    trained = source.config.get("activation", "gelu")
    if trained != activation:
        raise ValueError(
            f"{source.file} was trained with activation={trained!r}, and activation={activation!r} "
            "is asked for: give the sources', which has to be one for all."
        )


def _check_base(
    source: Source, sites: tuple[Site, ...], matrix_of: Callable[[Site], jax.Array]
) -> None:
    """Every targeted kernel is one of the source's, with the same values, and the other way."""
    targeted = {site.path: site for site in sites}
    missing = sorted(set(targeted) - set(source.groups))
    if missing:
        raise ValueError(
            f"{source.file} does not adapt {missing[0]!r}, which is targeted; it adapts "
            f"{sorted(source.groups)[:5]}. Give targets or a placement that are the sources'."
        )
    for path in sorted(set(source.groups) - set(targeted)):
        shape = tuple(source.base[path]["shape"])
        try:
            matrix_of(Site(path, shape, "o" * len(shape)))
        except KeyError:
            continue  # of a part that this model lacks, such as a decoder
        raise ValueError(
            f"{source.file} adapts {path!r} too, which is not targeted, so a part of it would be "
            "lost: give targets or a placement that are the sources'."
        )
    kernels = {
        path: views.from_matrix(matrix_of(site), site.axes, site.shape)
        for path, site in targeted.items()
    }
    recorded = {path: source.base[path] for path in targeted}
    fingerprint.check(recorded, paths.unflatten(kernels), "values", source.file)


def _check_one_width(sites: tuple[Site, ...]) -> None:
    widths = {site.path: site.d_out for site in sites}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"form='plus' shares rows of w between kernels of one d_out, and these have several: "
            f"{widths}. Choose form='plus_uniform' or 'plain', or target fewer kernels."
        )


def _check_sources(sources: Sequence[str]) -> list[str]:
    is_list = isinstance(sources, Sequence) and not isinstance(sources, str)
    if not is_list or not sources or not all(isinstance(file, str) for file in sources):
        raise ValueError(
            f"sources={sources!r}: give a list of files that pefts.save wrote, as strings, one for "
            "each source task."
        )
    return list(sources)


def _check_options(
    form: str, placement: str | None, activation: str, total: float, std: float
) -> None:
    for name, value, known in (("form", form, FORMS), ("activation", activation, ACTIVATIONS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {sorted(known)}.")
    if placement is not None and placement not in PLACEMENTS:
        raise ValueError(
            f"placement={placement!r} is unknown; choose one of {sorted(PLACEMENTS)}, or None with "
            "targets of your own."
        )
    if not math.isfinite(total):
        raise ValueError(f"total={total!r}: give a finite number, such as 2.0.")
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"std={std!r}: give a number of at least 0, such as 1e-3.")
