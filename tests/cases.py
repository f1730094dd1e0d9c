"""THE table: one row per method, which every suite consumes. Adding a method adds a row here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pefts.targets import Site

Arrays = Mapping[str, np.ndarray]


class BadInput(NamedTuple):
    """Arguments that must raise ValueError, at build or at init on the tiny model."""

    kwargs: Mapping[str, Any]
    match: str  # a regular expression that the message contains


class Case(NamedTuple):
    method: str
    kwargs: Mapping[str, Any]  # for the tiny model of tests/tiny.py; `axes` are added by the suite
    count: Callable[
        [Sequence[Site]], int
    ]  # trainable scalars, by the card's formula, over all sites
    # (W float64 (d_in, d_out), {name: float64 array} trainable and frozen, shared) -> W' in numpy,
    # in the paper's notation; None for methods that change activations
    oracle: Callable[[np.ndarray, Arrays, Arrays], np.ndarray] | None = None
    # (y float64 (..., d_out), state, shared) -> y' for methods that change a module's output
    output_oracle: Callable[[np.ndarray, Arrays, Arrays], np.ndarray] | None = None
    # (x float64 (..., d_in), W, state, shared and context) -> y for products that no matrix gives
    linear_oracle: Callable[[np.ndarray, np.ndarray, Arrays, Arrays], np.ndarray] | None = None
    context: Callable[[int], Mapping[str, Any]] | None = None  # batch size -> arrays for peft.bind
    layers_share: bool = False  # state lies across layers: slices of it fit no unrolled model
    updated: tuple[str, ...] = ()  # names of frozen leaves that peft.update may change
    zero_grad_at_start: tuple[str, ...] = ()  # names of leaves whose gradient is zero at step 0
    bad: tuple[BadInput, ...] = ()


def slices(site: Site) -> int:
    """How many kernels lie stacked at a site."""
    return int(np.prod(site.stack, dtype=int))


def whole(sites: Sequence[Site]) -> int:
    return sum(int(np.prod(site.shape)) for site in sites)


CASES: tuple[Case, ...] = (
    Case(
        "adalora",
        {"total_steps": 10, "init_rank": 4, "target_rank": 2, "warmup": (0, 2)},
        count=lambda sites: sum(slices(s) * s.rank * (s.d_in + s.d_out + 1) for s in sites),
        oracle=lambda W, p, shared: W + p["scale"] * (p["A"] * p["e"]) @ p["B"],
        updated=tuple(
            f"{kind}_{factor}" for kind in ("sensitivity", "uncertainty") for factor in "ABe"
        ),
        bad=(
            BadInput({"total_steps": None}, "total_steps=None"),
            BadInput({"init_rank": 0}, "init_rank=0"),
            BadInput({"warmup": (8, 2)}, r"warmup=\(8, 2\)"),
            BadInput({"target_rank": 5}, "target_rank=5"),
            BadInput({"init_rank": 10_000}, "rank=10000 is out of range"),
            BadInput({"warmup": (0, 0), "interval": 3}, "interval=3"),
            BadInput({"betas": (0.85, 1.0)}, r"betas=\(0.85, 1.0\)"),
            BadInput({"gamma": -1.0}, "gamma=-1.0"),
            BadInput({"dropout": 1.0}, "dropout=1.0"),
        ),
    ),
    Case(
        "bitfit",
        {},
        count=whole,
        oracle=lambda W, p, shared: p["value"].reshape(W.shape),
        bad=(BadInput({"targets": "no_such_bias"}, "matches no parameter"),),
    ),
    Case(
        "bottleneck",
        {"width": 3, "activation": "swish", "scale": 0.5},
        count=lambda sites: sum(
            slices(s) * (2 * s.d_out * s.rank + s.rank + s.d_out) for s in sites
        ),
        output_oracle=lambda y, p, shared: (
            y + p["scale"] * ((h := y @ p["D"] + p["b_D"]) / (1 + np.exp(-h)) @ p["U"] + p["b_U"])
        ),
        zero_grad_at_start=("D", "b_D"),
        bad=(
            BadInput({"width": 0}, "width=0"),
            BadInput({"width": 10_000}, "rank=10000 is out of range"),
            BadInput({"reduction": 4}, "reduction=4 sets the width of every site"),
            BadInput({"width": None, "reduction": 0}, "reduction=0"),
            BadInput({"width": None, "reduction": 100}, "reduction=100 leaves no width"),
            BadInput({"placement": "everywhere"}, "placement='everywhere'"),
            BadInput({"activation": "tanhh"}, "activation='tanhh'"),
            BadInput({"std": 0.0}, "std=0.0"),
        ),
    ),
    *(
        Case(
            "corda",
            {"rank": 3, "alpha": 6.0, "mode": mode},
            count=lambda sites: sum(slices(s) * s.rank * (s.d_in + s.d_out) for s in sites),
            oracle=lambda W, p, shared: W + p["scale"] * (p["A"] @ p["B"] - p["A0"] @ p["B0"]),
            bad=(
                BadInput({"rank": 0}, "rank=0"),
                BadInput({"rank": 10_000}, "rank=10000 is out of range"),
                BadInput({"alpha": -1.0}, "alpha=-1.0"),
                BadInput({"mode": "both"}, "mode='both'"),
            ),
        )
        for mode in ("ipm", "kpm")
    ),
    Case(
        "dora",
        {"rank": 3, "alpha": 6.0},
        count=lambda sites: sum(slices(s) * (s.rank * (s.d_in + s.d_out) + s.d_out) for s in sites),
        oracle=lambda W, p, shared: (
            p["m"] * (V := W + p["scale"] * p["A"] @ p["B"]) / np.linalg.norm(V, axis=0)
        ),
        zero_grad_at_start=("A",),
        bad=(
            BadInput({"rank": 0}, "rank=0"),
            BadInput({"rank": 10_000}, "rank=10000 is out of range"),
            BadInput({"dropout": -0.1}, "dropout=-0.1"),
        ),
    ),
    Case(
        "dora",
        {"direction": {"method": "pissa", "rank": 3, "alpha": 6.0}},
        count=lambda sites: sum(slices(s) * (s.rank * (s.d_in + s.d_out) + s.d_out) for s in sites),
        oracle=lambda W, p, shared: (
            p["m"]
            * (V := W + p["scale"] * (p["A"] @ p["B"] - p["A0"] @ p["B0"]))
            / np.linalg.norm(V, axis=0)
        ),
        bad=(
            BadInput({"rank": 4}, "rank=4 beside direction="),
            BadInput({"alpha": 4.0}, "alpha=4.0 beside direction="),
            BadInput({"rslora": True}, "rslora=True beside direction="),
            BadInput({"dropout": 0.1}, "dropout=0.1 beside direction="),
            BadInput({"direction": "pissa"}, "direction='pissa': give a method's config"),
            BadInput({"direction": {"method": "pisa"}}, r"near names: \['pissa'"),
            BadInput({"direction": {"method": "pissa", "ranks": 3}}, "has no argument 'ranks'"),
            BadInput({"direction": {"method": "pissa", "rank": 0}}, "rank=0"),
            BadInput({"direction": {"method": "pissa", "targets": "up"}}, "'targets' says which"),
            BadInput({"direction": {"method": "adalora"}}, "total_steps=None"),
            BadInput({"direction": {"method": "lora"}}, "by adding a low-rank product"),
            BadInput({"direction": {"method": "chain", "members": []}}, "is several methods"),
        ),
    ),
    Case(
        "full",
        {},
        count=whole,
        oracle=lambda W, p, shared: p["value"].reshape(W.shape),
        bad=(BadInput({"targets": ["querry"]}, "Near names: .*query"),),
    ),
    Case(
        "head_only",
        {},
        count=whole,
        oracle=lambda W, p, shared: p["value"].reshape(W.shape),
        bad=(BadInput({"exclude": "."}, "leaves nothing"),),
    ),
    Case(
        "ln_tuning",
        {},
        count=whole,
        oracle=lambda W, p, shared: p["value"].reshape(W.shape),
        bad=(BadInput({"targets": "group_norm"}, "matches no parameter"),),
    ),
    Case(
        "lora",
        {"rank": 3, "alpha": 6.0},
        count=lambda sites: sum(slices(s) * s.rank * (s.d_in + s.d_out) for s in sites),
        oracle=lambda W, p, shared: W + p["scale"] * p["A"] @ p["B"],
        zero_grad_at_start=("A",),
        bad=(
            BadInput({"rank": 0}, "rank=0"),
            BadInput({"rank": 10_000}, "rank=10000 is out of range"),
            BadInput({"dropout": 1.0}, "dropout=1.0"),
            BadInput({"init": "zeros"}, "init='zeros'"),
            BadInput({"targets": "querry"}, "Near names: .*query"),
            BadInput({"ranks": 4}, "has no argument 'ranks'"),
        ),
    ),
    Case(
        "olora",
        {"rank": 3, "alpha": 6.0},
        count=lambda sites: sum(slices(s) * s.rank * (s.d_in + s.d_out) for s in sites),
        oracle=lambda W, p, shared: W + p["scale"] * (p["A"] @ p["B"] - p["A0"] @ p["B0"]),
        bad=(
            BadInput({"rank": 0}, "rank=0"),
            BadInput({"rank": 10_000}, "rank=10000 is out of range"),
            BadInput({"alpha": 0.0}, "alpha=0.0"),
        ),
    ),
    *(
        Case(
            "pissa",
            {"rank": 3, "alpha": 6.0, "svd": svd},
            count=lambda sites: sum(slices(s) * s.rank * (s.d_in + s.d_out) for s in sites),
            oracle=lambda W, p, shared: W + p["scale"] * (p["A"] @ p["B"] - p["A0"] @ p["B0"]),
            bad=(
                BadInput({"rank": 0}, "rank=0"),
                BadInput({"rank": 10_000}, "rank=10000 is out of range"),
                BadInput({"alpha": 0.0}, "alpha=0.0"),
                BadInput({"alpha_pattern": {"query": -1.0}}, r"alpha_pattern\['query'\]=-1.0"),
                BadInput({"svd": "fast"}, "svd='fast'"),
                BadInput({"iterations": -1}, "iterations=-1"),
            ),
        )
        for svd in ("exact", "randomized")
    ),
    Case(
        "prompt",
        {"length": 2},
        count=lambda sites: sum(2 * s.d_out for s in sites),
        output_oracle=lambda y, p, shared: np.concatenate(
            [np.broadcast_to(p["P"], (len(y), *p["P"].shape)), y[:, len(p["P"]) :]], axis=1
        ),
        bad=(
            BadInput({"length": 0}, "length=0"),
            BadInput({"init": "text"}, "init='text'"),
            BadInput({"std": -1.0}, "std=-1.0"),
            BadInput({"placeholder": -1}, "placeholder=-1"),
            BadInput({"targets": "query"}, "'layers/attention/query/kernel' .* is none"),
        ),
    ),
    Case(
        "sara",
        {"threshold": 0.1, "reselect_step": 2, "rank_penalty": 1e-2, "min_side": 4},
        count=lambda sites: sum(slices(s) * dict(s.static)["nnz"] for s in sites),
        oracle=lambda W, p, shared: np.array(
            [
                at.get(n, w)
                for at in [dict(zip(p.get("idx", ()), p.get("values", ()), strict=True))]
                for n, w in enumerate(W.flat)
            ]
        ).reshape(W.shape),
        updated=("active", "held", "step"),
        bad=(
            BadInput({"threshold": 0.0}, "threshold=0.0"),
            BadInput({"threshold": 1e-12}, "selects no entry of the .* targeted leaves"),
            BadInput({"reselect_step": 0}, "reselect_step=0"),
            BadInput({"rank_penalty": -1.0}, "rank_penalty=-1.0"),
            BadInput({"rank_mode": "some"}, "rank_mode='some'"),
            BadInput({"min_side": 0}, "min_side=0"),
            BadInput({"min_side": 64}, "no targeted matrix has both sides longer"),
        ),
    ),
    Case(
        "vera",
        {"rank": 30},
        count=lambda sites: sum(slices(s) * (30 + s.d_out) for s in sites),
        oracle=lambda W, p, shared: (
            W
            + shared["A"][: W.shape[0]]
            @ np.diag(p["lambda_d"])
            @ shared["B"][:, : W.shape[1]]
            @ np.diag(p["lambda_b"])
        ),
        zero_grad_at_start=("lambda_d",),
        bad=(
            BadInput({"rank": 0}, "rank=0"),
            BadInput({"d_initial": 0.0}, "d_initial=0.0"),
            BadInput({"dropout": 1.0}, "dropout=1.0"),
            BadInput({"seed": -1}, "seed=-1"),
            BadInput({"rank_pattern": {"query": 2}}, "the kernels of vera have no rank of their"),
        ),
    ),
)
