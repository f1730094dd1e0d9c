"""THE table: one row per method, which every suite consumes. Adding a method adds a row here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import oracles

from pefts.targets import Site

Arrays = Mapping[str, np.ndarray]
GATES = [[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 1, 1]]  # of three tailors for four classes


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


def tensor_train(
    h: np.ndarray, p: Arrays, activation: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """h + s Up(act(Down(h))), each matrix the whole tensor of its cores."""

    def affine(x: np.ndarray, name: str) -> np.ndarray:
        tensor, bias = np.ones((1, 1)), p[f"{name}_bias"]
        for k in range(1, 1 + sum(leaf.startswith(f"{name}_G") for leaf in p)):
            tensor = np.tensordot(tensor, p[f"{name}_G{k}"], 1)
        return x @ tensor.reshape(-1, len(bias)) + bias

    return h + p["scale"] * affine(activation(affine(h, "down")), "up")


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
        "eva",
        {"rank": 3, "alpha": 6.0},
        count=lambda sites: sum(slices(s) * s.rank * (s.d_in + s.d_out) for s in sites),
        oracle=lambda W, p, shared: W + p["scale"] * p["A"] @ p["B"],
        zero_grad_at_start=("A",),
        bad=(
            BadInput({"rank": 0}, "rank=0"),
            BadInput({"rank": 10_000}, "rank=10000 is out of range"),
            BadInput({"rho": 0.5}, "rho=0.5"),
            BadInput({"rho": 3.0}, "eva compares 9 components.* hold 6"),
            BadInput({"metric": "mean"}, "metric='mean'"),
            BadInput({"dropout": 1.0}, "dropout=1.0"),
        ),
    ),
    Case(
        "eva",
        {"rank": 3, "alpha": 6.0, "rho": 1.0, "adjust_scaling": False, "whiten": True},
        count=lambda sites: sum(slices(s) * 3 * (s.d_in + s.d_out) for s in sites),
        oracle=lambda W, p, shared: W + p["scale"] * p["A"] @ p["B"],
        zero_grad_at_start=("A",),
        bad=(BadInput({"rank": 4}, "eva compares 4 components.* hold 3"),),
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
    *(
        Case(
            "kind",
            {"learngenes": 2, "tailors": 3, **kwargs},
            count=lambda sites, components=components: sum(
                slices(s) * components * (s.d_in + s.d_out + 1) for s in sites
            ),
            zero_grad_at_start=("U_T", "V_T") if "start" in kwargs else (),
            bad=(
                BadInput({"learngenes": -1}, "learngenes=-1"),
                BadInput({"tailors": 0}, "tailors=0"),
                BadInput({"learngenes": 10}, "= 13 are more than the 12 components of 'layers"),
                BadInput({"gates": [[1, 0]]}, r"gates\[0\]=\[1, 0\]: .* each of tailors=3"),
                BadInput({"gates": [[1, 0, 2]]}, r"gates\[0\]=\[1, 0, 2\]: gates are 0 or 1"),
                BadInput({"gates": []}, r"gates=\[\]"),
                BadInput({"active_class": 4}, "active_class=4: gates has"),
                BadInput({"train": "learngenes"}, "train='learngenes'"),
                BadInput({"start": "zero"}, "start='zero'"),
            ),
            **checks,
        )
        for kwargs, components, checks in (
            ({}, 3, {"oracle": lambda W, p, _: oracles.kind(W, p, [1, 1, 1])}),
            (
                {"train": "all", "residual": False},
                5,
                {"oracle": lambda W, p, _: oracles.kind(W, p, [1, 1, 1], residual=False)},
            ),
            (
                {"gates": GATES, "active_class": 2, "train": "all"},
                5,
                {"oracle": lambda W, p, _: oracles.kind(W, p, GATES[2])},
            ),
            (
                {"gates": GATES, "active_class": 0, "start": "fresh", "residual": False},
                3,
                {"oracle": lambda W, p, _: oracles.kind(W, p, GATES[0], residual=False)},
            ),
            *(
                (
                    {"gates": GATES, "train": train, "residual": residual},
                    5 if train == "all" else 3,
                    {
                        "context": lambda batch: {"class_ids": np.arange(batch) % 4},
                        "linear_oracle": lambda x, W, p, known, residual=residual: np.stack(
                            [
                                one @ oracles.kind(W, p, GATES[c], residual)
                                for one, c in zip(x, known["class_ids"], strict=True)
                            ]
                        ),
                    },
                )
                for train, residual in (("all", True), ("tailors", False))
            ),
        )
    ),
    *(
        Case(
            "lamda",
            {"total_steps": 20, "rank": 4, "alpha": 6.0, "freezing": 0.5, **kwargs},
            count=lambda sites: sum(slices(s) * s.rank * (s.rank + s.d_out) for s in sites),
            oracle=lambda W, p, shared: oracles.lamda(W, p),
            updated=("active", "held"),
            zero_grad_at_start=zero,
            bad=bad,
        )
        for kwargs, zero, bad in (
            (
                {},
                (),
                (
                    BadInput({"total_steps": None}, "total_steps=None"),
                    BadInput({"rank": 0}, "rank=0"),
                    BadInput({"rank": 10_000}, "rank=10000 is out of range"),
                    BadInput({"alpha": 0.0}, "alpha=0.0"),
                    BadInput({"alpha_pattern": {"query": 0.0}}, "query.*or its alpha is 0"),
                    BadInput({"init": "svd"}, "init='svd'"),
                    BadInput({"freezing": 0.0}, "freezing=0.0"),
                    BadInput({"dropout": 0.1}, "dropout=0.1 with init='spectral'"),
                    BadInput({"init": "code", "dropout": 1.0}, "dropout=1.0"),
                ),
            ),
            ({"init": "code", "dropout": 0.1}, ("Sg",), (BadInput({"rank": -1}, "rank=-1"),)),
            (
                {"ranks": [2, 4, 6]},
                (),
                (
                    BadInput({"ranks": []}, r"ranks=\[\]"),
                    BadInput({"ranks": [4, 2]}, r"ranks=\[4, 2\]: .* in rising order"),
                    BadInput({"ranks": [5, 6]}, "12 kernels is 60 in all, and .* allows 48"),
                ),
            ),
            ({"init": "code", "ranks": [2, 6]}, ("Sg",), (BadInput({"ranks": [0, 6]}, "ranks="),)),
        )
    ),
    Case(
        "ln_tuning",
        {},
        count=whole,
        oracle=lambda W, p, shared: p["value"].reshape(W.shape),
        bad=(BadInput({"targets": "group_norm"}, "matches no parameter"),),
    ),
    Case(
        "loldu",
        {"rank": 3, "alpha": 6.0},
        count=lambda sites: sum(slices(s) * s.rank for s in sites),
        oracle=lambda W, p, shared: oracles.loldu(W, p),
        bad=(
            BadInput({"rank": 0}, "rank=0"),
            BadInput({"rank": 10_000}, "rank=10000 is out of range"),
            BadInput({"alpha": 0.0}, "alpha=0.0"),
            BadInput({"init": "kaiming"}, "init='kaiming'"),
        ),
    ),
    Case(
        "loldu",
        {"rank": 3, "alpha": 6.0, "init": "ones", "parity": True},
        count=lambda sites: sum(slices(s) * s.rank for s in sites),
        oracle=lambda W, p, shared: oracles.loldu(W, p),
        bad=(BadInput({"alpha_pattern": {"up": -1.0}}, "alpha_pattern.*=-1.0"),),
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
        "lora_ga",
        {"rank": 3, "alpha": 6.0},
        count=lambda sites: sum(slices(s) * s.rank * (s.d_in + s.d_out) for s in sites),
        oracle=lambda W, p, shared: W + p["scale"] * (p["A"] @ p["B"] - p["A0"] @ p["B0"]),
        bad=(
            BadInput({"rank": 0}, "rank=0"),
            BadInput({"rank": 10_000}, "rank=10000 is out of range"),
            BadInput({"rank": 7}, "rank=7: lora_ga takes 2 r = 14 singular .* choose 1 to 6"),
            BadInput({"alpha": 0.0}, "alpha=0.0"),
            BadInput({"direction": "ArB"}, "direction='ArB'"),
            BadInput({"scale": "gd"}, "scale='gd'"),
            BadInput({"stable_gamma": 0.0}, "stable_gamma=0.0"),
            BadInput({"variant": "official"}, "variant='official'"),
            BadInput({"svd": "fast"}, "svd='fast'"),
        ),
    ),
    Case(
        "lora_ga",
        {"rank": 2, "rslora": True, "direction": "random", "variant": "paper"},
        count=lambda sites: sum(slices(s) * s.rank * (s.d_in + s.d_out) for s in sites),
        oracle=lambda W, p, shared: W + p["scale"] * (p["A"] @ p["B"] - p["A0"] @ p["B0"]),
        bad=(BadInput({"rank": -1}, "rank=-1"),),
    ),
    Case(
        "lora_sb",
        {"rank": 3, "eta0": 0.01},
        count=lambda sites: sum(slices(s) * s.rank**2 for s in sites),
        oracle=lambda W, p, shared: W + p["A"] @ p["R"] @ p["B"],
        bad=(
            BadInput({"rank": 0}, "rank=0"),
            BadInput({"rank": 10_000}, "rank=10000 is out of range"),
            BadInput({"eta0": 0.0}, "eta0=0.0"),
            BadInput({"svd": "fast"}, "svd='fast'"),
            BadInput({"alpha_pattern": {"query": 2.0}}, "the kernels of lora_sb have no alpha"),
        ),
    ),
    Case(
        "lora_xs",
        {"rank": 3, "alpha": 6.0},
        count=lambda sites: sum(slices(s) * s.rank**2 for s in sites),
        oracle=lambda W, p, shared: W + p["scale"] * p["A"] @ p["R"] @ p["B"],
        bad=(
            BadInput({"rank": 0}, "rank=0"),
            BadInput({"rank": 10_000}, "rank=10000 is out of range"),
            BadInput({"init_std": -1.0}, "init_std=-1.0"),
            BadInput({"sigma_on": "left"}, "sigma_on='left'"),
            BadInput({"basis": "qr"}, "basis='qr'"),
            BadInput({"svd": "fast"}, "svd='fast'"),
        ),
    ),
    Case(
        "lora_xs",
        {"rank": 3, "init_std": 0.0, "sigma_on": "both", "svd": "randomized"},
        count=lambda sites: sum(slices(s) * s.rank**2 for s in sites),
        oracle=lambda W, p, shared: W + p["scale"] * p["A"] @ p["R"] @ p["B"],
        bad=(BadInput({"init_std": float("nan")}, "init_std=nan"),),
    ),
    *(
        Case(
            "monarch",
            {"blocks": blocks, "rank": rank, "padding": padding},
            count=lambda sites, blocks=blocks, rank=rank: sum(
                slices(s) * rank * (n2 * -(-s.d_in // n1) * n1 + n1 * -(-s.d_out // n2) * n2)
                for s in sites
                for n1, n2 in [
                    # of the sides 12, 16 and 20
                    blocks or ({12: 4, 16: 4, 20: 5}[s.d_in], {12: 3, 16: 4, 20: 4}[s.d_out])
                ]
            ),
            oracle=lambda W, p, shared: oracles.monarch(W, p),
            bad=(
                BadInput({"rank": 0}, "rank=0"),
                BadInput({"rank": 10_000}, "rank=10000 is out of range"),
                BadInput({"rank": 6}, "sub-matrices are . x .: choose 1 to"),
                BadInput({"blocks": (4,)}, r"blocks=\(4,\)"),
                BadInput({"blocks": (0, 4)}, r"blocks=\(0, 4\)"),
                BadInput(
                    {"blocks": (8, 4), "padding": False}, "n1=8 does not divide a side of 'layers"
                ),
                BadInput({"blocks": (4, 21)}, "n2=21 does not divide a side of 'layers"),
            ),
        )
        for blocks, rank, padding in (((4, 4), 2, False), (None, 1, False), ((5, 3), 2, True))
    ),
    *(
        Case(
            "more",
            {"blocks": 4, "rank": 2, "dropout": dropout},
            count=lambda sites: sum(slices(s) * s.rank * (s.d_in + s.d_out) for s in sites),
            oracle=lambda W, p, shared: oracles.more(W, p),
            zero_grad_at_start=("w1",),
            bad=(
                BadInput({"blocks": 0}, "blocks=0"),
                BadInput({"blocks": 3}, "blocks=3 does not divide both sides of 'layers"),
                BadInput({"rank": 0}, "rank=0"),
                BadInput({"rank": 4}, "rank=4 is out of range for 'layers.*choose 1 to 3"),
                BadInput({"dropout": 1.0}, "dropout=1.0"),
            ),
        )
        for dropout in (0.0, 0.3)
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
            "pela",
            {"compression": 1.5, "w_inf": w_inf},
            count=lambda sites: sum(
                slices(s) * int(s.d_in * s.d_out / (1.5 * (s.d_in + s.d_out))) * (s.d_in + s.d_out)
                for s in sites
            ),
            oracle=lambda W, p, shared: p["A"] @ p["B"],
            bad=(
                BadInput({"compression": 0.5}, "compression=0.5"),
                BadInput({"compression": 8.0}, "compression=8.0 leaves no rank to 'layers/"),
                BadInput({"w_inf": -1.0}, "w_inf=-1.0"),
                BadInput({"eps": float("nan")}, "eps=nan"),
                BadInput({"targets": "classifier"}, "have fewer than 10 outputs"),
                BadInput({"rank_pattern": {"up": 2}}, "the kernels of pela have no rank of their"),
            ),
        )
        for w_inf in (0.0, 0.5)
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
        "senszoq",
        {"ratio": 0.05},
        count=lambda sites: sum(slices(s) * -(-s.d_in * s.d_out // 20) for s in sites),
        oracle=lambda W, p, shared: np.array(
            [
                p["values"][p["indices"] == n].item() if n in p["indices"] else w
                for n, w in enumerate(W.flat)
            ]
        ).reshape(W.shape),
        bad=(
            BadInput({"ratio": 0.0}, "ratio=0.0: give a share"),
            BadInput({"ratio": 1.5}, "ratio=1.5: give a share"),
            BadInput({"ratio": float("nan")}, "ratio=nan: give a share"),
        ),
    ),
    Case(
        "sorsa",
        {"rank": 3, "alpha": 6.0},
        count=lambda sites: sum(slices(s) * s.rank * (s.d_in + s.d_out + 1) for s in sites),
        oracle=lambda W, p, shared: oracles.sorsa(W, p),
        bad=(
            BadInput({"rank": 0}, "rank=0"),
            BadInput({"rank": 10_000}, "rank=10000 is out of range"),
            BadInput({"alpha": -1.0}, "alpha=-1.0"),
            BadInput({"gamma": -1e-4}, "gamma=-0.0001"),
            BadInput({"peak_learning_rate": 0.0}, "peak_learning_rate=0.0"),
        ),
    ),
    Case(
        "sorsa",
        {"rank": 3, "gamma": 0.01, "decoupled": True},
        count=lambda sites: sum(slices(s) * s.rank * (s.d_in + s.d_out + 1) for s in sites),
        oracle=lambda W, p, shared: oracles.sorsa(W, p),
        bad=(BadInput({"alpha_pattern": {"up": 2.0}}, "the kernels of sorsa have no alpha"),),
    ),
    Case(
        "svfit",
        {"rank": 5},
        count=lambda sites: sum(slices(s) * s.rank for s in sites),
        oracle=lambda W, p, shared: (
            (W - p["U"] @ np.diag(p["S"]) @ p["V"].T) + p["U"] @ np.diag(p["sigma"]) @ p["V"].T
        ),
        bad=(
            BadInput({"rank": 0}, "rank=0"),
            BadInput({"rank": 10_000}, "rank=10000 is out of range"),
            BadInput({"alpha_pattern": {"up": 2.0}}, "the kernels of svfit have no alpha"),
        ),
    ),
    Case(
        "svft",
        {},
        count=lambda sites: sum(slices(s) * (min(s.d_in, s.d_out) + 1) for s in sites),
        oracle=lambda W, p, shared: oracles.svft(W, p),
        zero_grad_at_start=("gate",),
        bad=(
            BadInput({"pattern": "full"}, "pattern='full'"),
            BadInput({"init": "normal"}, "init='normal'"),
            BadInput({"off_diagonals": 1}, "off_diagonals=1 has no meaning for pattern='plain'"),
            BadInput({"pattern": "banded", "off_diagonals": -1}, "off_diagonals=-1"),
            BadInput({"rank": 0}, "rank=0"),
            BadInput({"rank": 10_000}, "rank=10000 is out of range"),
            BadInput({"rank_pattern": {"up": 2}}, "the kernels of svft have no rank of their own"),
        ),
    ),
    *(
        Case(
            "svft",
            {"pattern": pattern, "off_diagonals": d, **kwargs},
            count=lambda sites, n=n, d=d: sum(
                slices(s) * (n * (2 * d + 1) - d * (d + 1) + 1) for s in sites
            ),
            oracle=lambda W, p, shared: oracles.svft(W, p),
            zero_grad_at_start=() if "init" in kwargs else ("gate",),
            bad=(BadInput({"off_diagonals": n}, f"{n} is .* 'layers/.*: choose 0 to {n - 1}"),),
        )
        for pattern, d, n, kwargs in (
            ("banded", 2, 12, {}),
            ("random", 1, 5, {"rank": 5, "init": "kaiming"}),
            ("top_k", 1, 12, {}),
        )
    ),
    Case(
        "tensor_train",
        {"bottleneck": 4, "rank": 3, "scale": 0.5},
        # 12 = 3 2 2 and 4 = 1 2 2: in Down and in Up, the end cores, the others, and the biases
        count=lambda sites: sum(
            slices(s) * (2 * (s.rank * (3 + 2) + s.rank**2 * (2 + 2 + 1 + 2)) + 4 + s.d_out)
            for s in sites
        ),
        output_oracle=lambda y, p, shared: tensor_train(y, p, lambda z: np.maximum(z, 0)),
        bad=(
            BadInput({"bottleneck": 0}, "bottleneck=0"),
            BadInput({"bottleneck": 64}, "bottleneck=64 is wider than the 12 features that"),
            BadInput({"rank": 0}, "rank=0"),
            BadInput({"rank": 10_000}, "rank=10000 is out of range"),
            BadInput({"placement": "both"}, "placement='both'"),
            BadInput({"activation": "tanh"}, "activation='tanh'"),
            BadInput({"scale": 0.0}, "scale=0.0"),
            BadInput({"factors": 0}, "factors=0"),
            BadInput({"factors": (3, 4, 2, 0)}, r"factors=\(3, 4, 2, 0\)"),
            BadInput({"factors": (12, 2, 2)}, r"factors=\[12, 2, 2\] are 3, an odd number"),
            BadInput({"factors": (12, 6)}, "second half multiplies to 6, and bottleneck=4"),
            BadInput({"factors": (13, 4)}, "first half multiplies to 13, and .* reads 12 features"),
        ),
    ),
    Case(
        "tensor_train",
        {
            "bottleneck": 4,
            "rank": 2,
            "placement": "input",
            "factors": 2,
            "activation": "swish",
            "zero_init": True,
        },
        # 12 = 4 3 and 4 = 2 2
        count=lambda sites: sum(
            slices(s) * (2 * (s.rank * (4 + 2) + s.rank**2 * (3 + 2)) + 4 + s.d_in) for s in sites
        ),
        linear_oracle=lambda x, W, p, known: tensor_train(x, p, lambda z: z / (1 + np.exp(-z))) @ W,
        zero_grad_at_start=(
            "down_bias",
            *(f"down_G{k}" for k in range(1, 5)),
            *(f"up_G{k}" for k in range(1, 4)),
        ),
        bad=(
            BadInput({"factors": (4, 4, 2, 2)}, "multiplies to 16, and .* reads 12 features"),
            BadInput({"targets": "embed"}, "'embed/embedding' belongs to an embedding"),
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
    *(
        Case(
            "welore",
            {"reduction": reduction},
            count=lambda sites: sum(slices(s) * s.rank * (s.d_in + s.d_out) for s in sites),
            oracle=lambda W, p, shared: p["A"] @ p["B"] if p.get("kept", 1) > 0 else W,
            bad=(
                BadInput({"reduction": 0.0}, "reduction=0.0"),
                BadInput({"reduction": 0.99}, "reduction=0.99: .* at most 132 of 144"),
                BadInput({"reduction": 0.1}, "none of the 6 targeted kernels is worth factoring"),
                BadInput({"threshold": 1.5}, "threshold=1.5"),
                BadInput({"min_ratio": 1.0}, "min_ratio=1.0"),
                BadInput({"rank_pattern": {"up": 2}}, "the kernels of welore have no rank of"),
            ),
        )
        for reduction in (0.45, 0.6)  # some layers dense beside factored ones; all factored
    ),
)
