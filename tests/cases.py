"""THE table: one row per method, which every suite consumes. Adding a method adds a row here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import oracles
import source_adapters

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
    # (q, k, v float64 (B, T, N, H) of causal attention, W, state, shared) -> y for methods on the
    # attention, whose keys and values of x are x @ W and 2 x @ W
    attend_oracle: Callable[..., np.ndarray] | None = None
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
    *(
        Case(
            "boft",
            {name: size, "factors": factors, "dropout": dropout},
            count=lambda sites, name=name, size=size, factors=factors: sum(
                slices(s) * (factors * s.d_in * b + s.d_out)
                for s in sites
                for b in [size if name == "block_size" else s.d_in // size]
            ),
            oracle=lambda W, p, shared: oracles.boft(W, p),
            bad=(
                BadInput({name: 0}, f"{name}=0"),
                BadInput({name: 1 if name == "block_size" else 12}, bad),
                BadInput({"block_size": 4, "blocks": 4}, "block_size=4 and blocks=4"),
                BadInput({name: 7}, f"{name}=7 does not cut the 12 inputs of 'layers/.* are .6"),
                BadInput({"factors": 0}, "factors=0"),
                BadInput({"factors": 4}, odd),
                BadInput({"dropout": 1.0}, "dropout=1.0"),
                BadInput({"targets": "embed"}, "'embed/embedding', an embedding"),
            ),
        )
        for name, size, factors, dropout, bad, odd in (
            ("block_size", 2, 2, 0.0, "block_size=1", "n=6 blocks of 'layers/.* from 1 to 2"),
            ("blocks", 4, 1, 0.3, "blocks=12 does not cut the 12", "'layers/.* have b=3 entries"),
        )
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
            "compacter",
            {"division": 2, "std": 0.05, **kwargs},
            count=lambda sites, n=n, rho=rho: (
                n**3 + sum(slices(s) * (2 * rho * (s.d_out + 4) + 4 + s.d_out) for s in sites)
            ),
            output_oracle=lambda y, p, shared, act=act: oracles.compacter(y, p, shared["R"], act),
            zero_grad_at_start=zero,
            bad=(
                BadInput({"width": 0}, "width=0"),
                BadInput({"reduction": 3, "width": 4}, "reduction=3 sets the width of every site"),
                BadInput({"reduction": 13, "width": None}, "reduction=13 makes a bottleneck of 0"),
                BadInput({"width": 13, "reduction": None}, "of 13 for 'layers/.*width of 1 to 12"),
                BadInput({"division": 3}, r"division=3 .* 'layers.* one of \[1, 2, 4\]"),
                BadInput({"slice_rank": 3}, "slice_rank=3 is out of range .*choose 1 to [12]"),
                BadInput({"placement": "before"}, "placement='before'"),
                BadInput({"activation": "tanh"}, "activation='tanh'"),
                BadInput({"init": "kaiming"}, "init='kaiming'"),
                BadInput({"std": 0.0}, "std=0.0"),
                BadInput({"rank_pattern": {"up": 2}}, "the kernels of compacter have no rank of"),
            ),
        )
        for kwargs, n, rho, act, zero in (
            (
                {"width": 4, "slice_rank": 2},
                2,
                2,
                oracles.gelu_tanh,
                ("R", "S_D", "S_U", "T_D", "b_D"),
            ),
            (
                {
                    "reduction": 3,
                    "division": 4,
                    "init": "paper",
                    "activation": "relu",
                    "placement": "pfeiffer",
                },
                4,
                1,
                lambda z: np.maximum(z, 0),
                (),
            ),
        )
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
        "diffora",
        {"rank": 3, "alpha": 6.0, "keep": 2, "schedule": (1, 3, 2)},
        count=lambda sites: sum(slices(s) * (s.rank * (s.d_in + s.d_out) + 1) for s in sites),
        oracle=lambda W, p, shared: W + p["scale"] / (1 + np.exp(-p["a"])) * p["A"] @ p["B"],
        updated=("phase", "kept", "m", "v", "held_A", "held_B", "held_a"),
        zero_grad_at_start=("A", "a"),
        bad=(
            BadInput({"rank": 0}, "rank=0"),
            BadInput({"rank": 10_000}, "rank=10000 is out of range"),
            BadInput({"keep": 0}, "keep=0"),
            BadInput({"keep": 7}, "keep=7 is more .* no layer has more than 6 of the 12"),
            BadInput({"keep": 13, "scope": "model"}, "no model has more than 12 of the 12"),
            BadInput({"scope": "module"}, "scope='module'"),
            BadInput({"schedule": 3}, "schedule=3: give"),
            BadInput({"schedule": (0, 3, 2)}, r"schedule=\(0, 3, 2\): warmup=0 .* no gradient"),
            BadInput({"schedule": (1, 0, 2)}, r"schedule=\(1, 0, 2\): search=0"),
            BadInput({"schedule": (1, 3, 1)}, r"schedule=\(1, 3, 1\): every=1"),
            BadInput({"gate_rate": 0.0}, "gate_rate=0.0"),
            BadInput({"dropout": 1.0}, "dropout=1.0"),
        ),
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
    *(
        Case(
            "flora",
            {"ranks": ranks, "scale": 0.5, "dropout": dropout},
            count=lambda sites, r=ranks: sum(
                slices(s) * (r[0] * r[1] + s.d_in * r[0] + s.d_out * r[1]) for s in sites
            ),
            oracle=lambda W, p, shared: W + p["scale"] * p["U_in"] @ p["G"] @ p["U_out"].T,
            zero_grad_at_start=("U_in", "U_out"),
            bad=(
                BadInput({"ranks": 4}, "ranks=4: give two to five"),
                BadInput({"ranks": (4,)}, r"ranks=\(4,\): give two to five"),
                BadInput({"ranks": (0, 4)}, r"ranks=\(0, 4\): give two to five"),
                BadInput({"ranks": (2, 2, 2)}, r"\(2, 2, 2\) are 3, and 'layers.* has 2 axes"),
                BadInput({"ranks": (3, 13)}, r"out of range for 'layers/.* at most \(16, 12\)"),
                BadInput({"scale": 0.0}, "scale=0.0"),
                BadInput({"scale": float("inf")}, "scale=inf"),
                BadInput({"dropout": 1.0}, "dropout=1.0"),
                BadInput({"rank_pattern": {"up": 2}}, "the kernels of flora have no rank of their"),
            ),
        )
        for ranks, dropout in (((3, 5), 0.3), ((6, 2), 0.0))  # the core goes with U_out, with U_in
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
            "hira",
            {"rank": 3, "dropout": dropout},
            count=lambda sites: sum(slices(s) * s.rank * (s.d_in + s.d_out) for s in sites),
            oracle=lambda W, p, shared: W + W * (p["A"] @ p["B"]),
            zero_grad_at_start=("A",),
            bad=(
                BadInput({"rank": 0}, "rank=0"),
                BadInput({"rank": 10_000}, "rank=10000 is out of range"),
                BadInput({"dropout": 1.0}, "dropout=1.0"),
                BadInput({"alpha_pattern": {"up": 2.0}}, "the kernels of hira have no alpha"),
            ),
        )
        for dropout in (0.0, 0.3)
    ),
    *(
        Case(
            "ia3",
            kwargs,
            count=lambda sites, inputs=inputs: sum(
                slices(s) * (s.d_in if any(name in s.path for name in inputs) else s.d_out)
                for s in sites
            ),
            oracle=lambda W, p, shared: (
                np.diag(p["l_in"]) @ W if "l_in" in p else W @ np.diag(p["l_out"])
            ),
            output_oracle=lambda y, p, shared: y if "l_in" in p else y * p["l_out"],
            bad=(
                BadInput({"feedforward": "/up/"}, "feedforward, among .*: '/up/' matches no"),
                BadInput({"feedforward": 3}, "feedforward=3"),
                BadInput(
                    {"targets": "embed|up", "feedforward": ["embed"]},
                    "feedforward matches 'embed/embedding', an embedding",
                ),
                BadInput({"targets": "norm_1"}, "matches no parameter"),
            ),
        )
        for kwargs, inputs in (
            ({}, ("down",)),
            ({"feedforward": ["key", "value"]}, ("key", "value")),
        )
    ),
    Case(
        "increlora",
        {"target_rank": 2, "max_rank": 3, "growth": (3, 1), "schedule": (0, 1, 2)},
        count=lambda sites: sum(slices(s) * s.rank * (s.d_in + s.d_out + 1) for s in sites),
        oracle=lambda W, p, shared: (
            W + p["alpha"] / (p["rank"] + 1e-5) * (p["A"] * p["e"]) @ p["B"]
        ),
        updated=(
            *("rank", "reach", "born", "grown", "sensitivity", "uncertainty"),
            *(f"held_{factor}" for factor in "ABe"),
        ),
        bad=(
            BadInput({"target_rank": 0.5}, "target_rank=0.5"),
            BadInput({"target_rank": 4}, "ranks of 48 in sum, but .* cannot grow beyond 36"),
            BadInput({"max_rank": 0}, "max_rank=0"),
            BadInput({"max_rank": 10_000}, "rank=10000 is out of range"),
            BadInput({"growth": 4}, r"growth=4: give \(top_h, add\)"),
            BadInput({"growth": (0, 1)}, r"growth=\(0, 1\): 0 is no integer"),
            BadInput({"growth": (1, 0)}, r"growth=\(1, 0\): 0 is no integer"),
            BadInput({"schedule": (0, 1)}, r"schedule=\(0, 1\): give \(warmup, interval, ramp\)"),
            BadInput({"schedule": (-1, 1, 0)}, r"schedule=\(-1, 1, 0\): -1 is no"),
            BadInput({"schedule": (0, 0, 0)}, r"schedule=\(0, 0, 0\): 0 is no"),
            BadInput({"schedule": (0, 1, 0.5)}, r"schedule=\(0, 1, 0.5\): 0.5 is no"),
            BadInput({"betas": (0.85, 1.0)}, r"betas=\(0.85, 1.0\)"),
            BadInput({"gamma": -1.0}, "gamma=-1.0"),
            BadInput({"dropout": 1.0}, "dropout=1.0"),
            BadInput({"score": "norm"}, "score='norm'"),
        ),
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
    *(
        Case(
            "llama_adapter",
            {"length": 2, **kwargs},
            count=lambda sites: sum(slices(s) * (2 * s.d_in + 1) for s in sites),
            attend_oracle=lambda q, k, v, W, p, shared: (
                oracles.prefix(q, k, v, *np.zeros((2, 0, W.shape[1])))
                + p.get("on", 1)
                * p["gate"]
                * oracles.prefix(q, k[:, :0], v[:, :0], p["P"] @ W, p["P"] @ (2 * W))
            ),
            zero_grad_at_start=("P",),
            bad=(
                BadInput({"length": 0}, "length=0"),
                BadInput({"layers": 0}, "layers=0"),
                BadInput({"layers": 3}, "layers=3: the targets are in 2 layers; choose 1 to 2"),
                BadInput({"std": 0.0}, "std=0.0"),
                BadInput({"layers": 1, "targets": ["value", "up"]}, "from the top of one stack"),
            ),
        )
        for kwargs in ({}, {"layers": 1})
    ),
    Case(
        "ln_tuning",
        {},
        count=whole,
        oracle=lambda W, p, shared: p["value"].reshape(W.shape),
        bad=(BadInput({"targets": "group_norm"}, "matches no parameter"),),
    ),
    *(
        Case(
            "loha",
            {"rank": rank, "alpha": 6.0},
            count=lambda sites: sum(slices(s) * 2 * s.rank * (s.d_in + s.d_out) for s in sites),
            oracle=lambda W, p, shared: W + p["scale"] * (p["A1"] @ p["B1"]) * (p["A2"] @ p["B2"]),
            zero_grad_at_start=("A1", "B1", "B2"),
            bad=(
                BadInput({"rank": 0}, "rank=0"),
                BadInput({"rank": 10_000}, "rank=10000 is out of range"),
                BadInput({"ranks": 4}, "has no argument 'ranks'"),
            ),
        )
        for rank in (2, 5)  # by thin factors, and by the dense update
    ),
    *(
        Case(
            "lokr",
            {"alpha": 6.0, **kwargs},
            count=count,
            oracle=lambda W, p, shared: (
                W
                + p["scale"]
                * np.kron(
                    *(
                        p[name] if name in p else p[f"{name}_a"] @ p[f"{name}_b"]
                        for name in ("K1", "K2")
                    )
                )
            ),
            zero_grad_at_start=zero,
            bad=(
                BadInput({"rank": 0}, "rank=0"),
                BadInput({"rank": 10_000}, "rank=10000 is out of range"),
                BadInput({"decompose_factor": 0}, "decompose_factor=0"),
                BadInput({"decompose_factor": 1.5}, "decompose_factor=1.5"),
            ),
        )
        for kwargs, count, zero in (
            (
                {"rank": 2},
                lambda sites: sum(
                    slices(s) * (m * o + (2 * (n + k) if max(n, k) > 4 else n * k))
                    for s in sites
                    for halves in [{12: (3, 4), 16: (4, 4), 20: (4, 5)}]
                    for (m, n), (o, k) in [(halves[s.d_in], halves[s.d_out])]
                ),
                ("K2", "K2_a", "K2_b"),
            ),
            (
                {"rank": 1, "decompose_factor": 4, "decompose_both": True},
                lambda sites: sum(slices(s) * (8 + (s.d_in + s.d_out) // 4) for s in sites),
                ("K1_a", "K2_a", "K2_b"),
            ),
        )
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
            "miss",
            {"rank": rank, "form": form, "mini_rank": mini_rank, "dropout": dropout},
            count=lambda sites, rank=rank, mini_rank=mini_rank: sum(
                slices(s) * rank * (mini_rank or s.d_out) for s in sites
            ),
            oracle=lambda W, p, shared: oracles.miss(W, p),
            bad=(
                BadInput({"rank": 0}, "rank=0"),
                BadInput({"rank": 13}, "rank=13 is out of range for 'layers.*choose 1 to 12"),
                BadInput({"form": "bone"}, "form='bone' is unknown"),
                BadInput({"form": "mini", "mini_rank": None}, "mini_rank=None with form='mini'"),
                BadInput({"form": "miss", "mini_rank": 4}, "mini_rank=4 with form='miss'"),
                BadInput({"form": "mini", "mini_rank": 0}, "mini_rank=0"),
                BadInput({"form": "mini", "mini_rank": 8}, r"choose one of \[1, 2, 3, 4, 6, 12\]"),
                BadInput(
                    {"form": "bat", "mini_rank": None, "dropout": 0.0, "rank": 8},
                    r"rank=8 does not divide both .* choose one of \[1, 2, 4\]",
                ),
                BadInput(
                    {"form": "bat", "mini_rank": None, "dropout": 0.0, "rank": 6},
                    "rank=6 does not divide both",
                ),
                BadInput({"form": "bat", "mini_rank": None, "dropout": 0.1}, "dropout=0.1 with"),
                BadInput({"dropout": 1.0}, "dropout=1.0"),
                BadInput({"rank_pattern": {"up": 2}}, "the kernels of miss have no rank of their"),
            ),
        )
        for rank, form, mini_rank, dropout in (
            (5, "miss", None, 0.2),  # divides no side but 20
            (4, "bat", None, 0.0),
            (3, "mini", 4, 0.0),
        )
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
    *(
        Case(
            "mos",
            {"alpha": 6.0, **kwargs},
            count=lambda sites, e=kwargs["budget"]: sum(
                slices(s) * e * (s.d_in + s.d_out) for s in sites
            ),
            oracle=lambda W, p, shared: oracles.mos(W, p, shared),
            zero_grad_at_start=tuple(
                f"A.layers.{name}.kernel.{shape}"
                for name, shape in (
                    ("attention.key", "12x16"),
                    ("attention.out", "16x12"),
                    ("attention.query", "12x16"),
                    ("attention.value", "12x16"),
                    ("down", "20x12"),
                    ("up", "12x20"),
                )
            ),
            bad=(
                BadInput({"rank": 0}, "rank=0"),
                BadInput({"rank": 10_000}, "rank=10000 is out of range"),
                BadInput({"budget": 0}, "budget=0"),
                BadInput({"private": -1}, "private=-1"),
                BadInput({"private": 4}, "private=4 is a part of budget=. and cannot be larger"),
                BadInput({"shards": 0}, "shards=0"),
                BadInput({"shards": 8}, "shards=8 does not divide both .*: choose a divisor of 4"),
                BadInput({"rank": 1}, "rank=1 at 'layers/.* budget=.: the rank must be no smaller"),
                BadInput({"budget": 2, "private": 2, "rank": 3}, "rank=3 .* must be equal to it"),
                BadInput({"budget": 2, "private": 1, "rank": 4}, "2 layers hold: .* at most 3"),
                BadInput({"dropout": 1.0}, "dropout=1.0"),
            ),
        )
        for kwargs in (
            {"rank": 3, "budget": 2, "private": 1, "shards": 2},
            {
                "rank": 4,
                "budget": 3,
                "private": 0,
                "shards": 4,
                "dropout": 0.2,
                "rank_pattern": {"query": 6},
            },
        )
    ),
    *(
        Case(
            "nola",
            {"rank": 3, "alpha": 6.0, "bases": 10, "chunk": chunk, "dropout": dropout},
            count=lambda sites: sum(slices(s) * 2 * 10 for s in sites),
            oracle=lambda W, p, shared: oracles.nola(W, p, 3),
            zero_grad_at_start=("alpha",),
            bad=(
                BadInput({"rank": 0}, "rank=0"),
                BadInput({"rank": 13}, "rank=13 is out of range for 'layers/.*: choose 1 to 12"),
                BadInput({"bases": 0}, "bases=0"),
                BadInput({"chunk": 0}, "chunk=0"),
                BadInput({"dropout": 1.0}, "dropout=1.0"),
                BadInput({"rank_pattern": {"up": 2}}, "the kernels of nola have no rank of their"),
            ),
        )
        for chunk, dropout in ((4, 0.0), (100, 0.3))
    ),
    *(
        Case(
            "oft",
            kwargs,
            count=lambda sites, size=size, kwargs=kwargs: sum(
                slices(s) * (1 if kwargs.get("block_share") else s.d_in // b) * b * (b - 1) // 2
                for s in sites
                for b in [size or s.d_in // kwargs["blocks"]]
            ),
            oracle=lambda W, p, shared, kwargs=kwargs: oracles.oft(
                W, p, kwargs.get("terms", 5), kwargs.get("coft_eps")
            ),
            bad=(
                BadInput({"block_size": 4, "blocks": 4}, "block_size=4 and blocks=4"),
                BadInput({"blocks": None, "block_size": 1}, "block_size=1"),
                BadInput({"blocks": 0, "block_size": None}, "blocks=0"),
                BadInput(
                    {"blocks": None, "block_size": 7},
                    r"block_size=7 does not cut the 12 inputs of 'layers/.* are \[6, 12\]",
                ),
                BadInput(
                    {"blocks": 12, "block_size": None, "targets": "query"},
                    r"blocks=12 does not cut the 12 inputs of 'layers/.* are \[6\]",
                ),
                BadInput({"terms": 1}, "terms=1"),
                BadInput({"coft_eps": 0.0}, "coft_eps=0.0"),
                BadInput({"dropout": 1.0}, "dropout=1.0"),
                BadInput({"targets": "embed"}, "'embed/embedding', an embedding"),
            ),
        )
        for kwargs, size in (
            ({"block_size": 4}, 4),
            ({"blocks": 2, "terms": None, "block_share": True}, 0),
            ({"block_size": 2, "terms": 4, "coft_eps": 0.3, "dropout": 0.3}, 2),
        )
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
    Case(
        "p_tuning",
        {"length": 2, "hidden": 5},
        count=lambda sites: sum(
            2 * s.d_out + (s.d_out + 1) * 5 + (5 + 1) * 5 + (5 + 1) * s.d_out for s in sites
        ),
        output_oracle=lambda y, p, shared: oracles.in_front(
            y,
            np.maximum(np.maximum(p["T"] @ p["W1"] + p["b1"], 0) @ p["W2"] + p["b2"], 0) @ p["W3"]
            + p["b3"],
        ),
        bad=(
            BadInput({"length": 0}, "length=0"),
            BadInput({"hidden": 0}, "hidden=0"),
            BadInput({"placeholder": -1}, "placeholder=-1"),
            BadInput({"targets": "query"}, "p_tuning replaces rows .*'layers/attention/query"),
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
            "petalface",
            {"rank": 3, "scale": 2.0, **kwargs},
            count=lambda sites: sum(slices(s) * 2 * s.rank * (s.d_in + s.d_out) for s in sites),
            zero_grad_at_start=("A1", "A2"),
            bad=(
                BadInput({"rank": 0}, "rank=0"),
                BadInput({"rank": 10_000}, "rank=10000 is out of range"),
                BadInput({"scale": 0.0}, "scale=0.0"),
                BadInput({"threshold": 1.5}, "threshold=1.5"),
                BadInput({"quality": -0.1}, "quality=-0.1"),
                BadInput({"dropout": 1.0}, "dropout=1.0"),
            ),
            **checks,
        )
        for kwargs, checks in (
            (
                {},
                {
                    "context": lambda batch: {"quality": np.linspace(0, 1, batch, dtype="f4")},
                    "linear_oracle": lambda x, W, p, known: np.stack(
                        [
                            one @ oracles.petalface(W, p, q)
                            for one, q in zip(x, known["quality"].tolist(), strict=True)
                        ]
                    ),
                },
            ),
            (
                {"quality": 0.3, "threshold": 0.4, "higher_is_better": False},
                {"oracle": lambda W, p, shared: oracles.petalface(W, p, 0.5 + 0.7 - 0.4)},
            ),
        )
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
    *(
        Case(
            "prefix",
            {"length": 2, **kwargs},
            count=count,
            attend_oracle=lambda q, k, v, W, p, shared: oracles.prefix(
                q, k, v, *oracles.prefix_tokens(p, shared)
            ),
            bad=(
                BadInput({"length": 0}, "length=0"),
                BadInput({"init": "vocab"}, "init='vocab'"),
                BadInput({"std": 0.0}, "std=0.0"),
                BadInput({"hidden": 0}, "hidden=0"),
                BadInput({"rank_pattern": {"value": 2}}, "the kernels of prefix have no rank of"),
            ),
        )
        for kwargs, count in (
            ({}, lambda sites: sum(slices(s) * 2 * 2 * s.d_out for s in sites)),
            (
                {"hidden": 3},
                lambda sites: (
                    2 * 16 + (16 + 1) * 3 + sum(slices(s) * (3 + 1) * 2 * s.d_out for s in sites)
                ),
            ),
        )
    ),
    *(
        Case(
            "poly",
            {"rank": 3, "skills": 3, "splits": splits, "tasks": 4, **kwargs},
            count=lambda sites, splits=splits: sum(
                slices(s) * (3 * s.rank * (s.d_in + s.d_out) + 4 * splits * 3) for s in sites
            ),
            zero_grad_at_start=("A", "Z"),
            bad=(
                BadInput({"rank": 0}, "rank=0"),
                BadInput({"rank": 10_000}, "rank=10000 is out of range"),
                BadInput({"skills": 0}, "skills=0"),
                BadInput({"tasks": 0, "task": None}, "tasks=0"),
                BadInput({"splits": 0}, "splits=0"),
                BadInput({"splits": 3}, "splits=3 does not divide both sides of 'layers"),
                BadInput({"task": 4}, "task=4: tasks=4 allows 0 to 3"),
                BadInput({"task": "mean"}, "task='mean'"),
                BadInput({"train": "skills"}, "train='skills'"),
            ),
            **checks,
        )
        for splits, kwargs, checks in (
            (
                2,
                {},
                {
                    "context": lambda batch: {"task_ids": np.arange(batch) % 4},
                    "linear_oracle": lambda x, W, p, known: np.stack(
                        [
                            one @ oracles.poly(W, p, p["Z"][task])
                            for one, task in zip(x, known["task_ids"], strict=True)
                        ]
                    ),
                },
            ),
            (
                4,
                {"task": 2, "alpha": 4.0},
                {"oracle": lambda W, p, shared: oracles.poly(W, p, p["Z"][2])},
            ),
        )
    ),
    Case(
        "prompt",
        {"length": 2},
        count=lambda sites: sum(2 * s.d_out for s in sites),
        output_oracle=lambda y, p, shared: oracles.in_front(y, p["P"]),
        bad=(
            BadInput({"length": 0}, "length=0"),
            BadInput({"init": "text"}, "init='text'"),
            BadInput({"std": -1.0}, "std=-1.0"),
            BadInput({"placeholder": -1}, "placeholder=-1"),
            BadInput({"targets": "query"}, "'layers/attention/query/kernel' .* is none"),
        ),
    ),
    Case(
        "pvera",
        {"rank": 30, "dropout": 0.2},
        count=lambda sites: sum(slices(s) * (2 * 30 + s.d_out) for s in sites),
        oracle=lambda W, p, shared: (
            W
            + shared["A"][: W.shape[0], :30]
            @ np.diag(p["lambda_d"][:30])
            @ shared["B"][:, : W.shape[1]]
            @ np.diag(p["lambda_b"])
        ),
        zero_grad_at_start=("lambda_d",),
        bad=(
            BadInput({"rank": 0}, "rank=0"),
            BadInput({"d_initial": 0.0}, "d_initial=0.0"),
            BadInput({"dropout": 1.0}, "dropout=1.0"),
            BadInput({"seed": -1}, "seed=-1"),
            BadInput({"rank_pattern": {"query": 2}}, "the kernels of pvera have no rank of their"),
        ),
    ),
    *(
        Case(
            "randlora",
            {"rank": rank, **kwargs},
            count=lambda sites: sum(
                slices(s) * -(-m // s.rank) * (s.rank + m)
                for s in sites
                for m in [min(s.d_in, s.d_out)]
            ),
            oracle=lambda W, p, shared, alpha=alpha, power=power: oracles.randlora(
                W, p, shared, alpha / p["lambda"].shape[0] / p["lambda"].shape[1] ** power
            ),
            zero_grad_at_start=("gamma",),
            bad=(
                BadInput({"rank": 0}, "rank=0"),
                BadInput({"rank": 13}, "rank=13 is out of range for 'layers/.*: choose 1 to 12"),
                BadInput({"alpha": 0.0}, "alpha=0.0"),
                BadInput({"scaling": "paper"}, "scaling='paper'"),
                BadInput({"bases": "dense"}, "bases='dense'"),
                BadInput({"dropout": 1.0}, "dropout=1.0"),
                BadInput({"seed": -1}, "seed=-1"),
                BadInput({"alpha_pattern": {"up": 2.0}}, "the kernels of randlora have no alpha"),
            ),
        )
        for rank, alpha, power, kwargs in (
            (5, 10.0, 0.5, {}),
            (4, 3.0, 0.0, {"alpha": 3.0, "scaling": "hf", "bases": "sparse", "dropout": 0.2}),
            (
                2,
                6.0,
                0.5,
                {"alpha": 6.0, "bases": "very_sparse", "rank_pattern": {"up": 12, "query": 3}},
            ),
        )
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
        "scalearn",
        {"sources": source_adapters.files(), "activation": "swish", "std": 0.5},
        count=lambda sites: sum(slices(s) * 3 * s.d_out for s in sites),
        output_oracle=lambda y, p, shared: oracles.scalearn(y, p, p["omega"]),
        bad=(
            BadInput({"sources": []}, r"sources=\[\]"),
            BadInput({"sources": "a.safetensors"}, "sources='a.safetensors': give a list"),
            BadInput({"sources": ["absent.safetensors"]}, "absent.safetensors does not exist"),
            BadInput({"form": "mean"}, "form='mean'"),
            BadInput({"placement": "before"}, "placement='before'"),
            BadInput({"activation": "tanh"}, "activation='tanh'"),
            BadInput({"activation": "relu"}, "trained with activation='swish'"),
            BadInput({"targets": "up"}, "0.safetensors does not adapt 'layers/up/kernel'"),
            BadInput({"total": float("inf")}, "total=inf"),
            BadInput({"std": -1.0}, "std=-1.0"),
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
    *(
        Case(
            "snnk",
            {"features": 5, "width": width, "clip": clip, "orthogonal": width is None},
            count=lambda sites, n=width: sum(
                slices(s) * (6 * s.d_out if n is None else 5 * n + (n + 1) * s.d_out) for s in sites
            ),
            output_oracle=lambda y, p, shared, c=clip: oracles.snnk(y, p, shared, c),
            zero_grad_at_start=("P",),
            bad=(
                BadInput({"features": 0}, "features=0"),
                BadInput({"width": 0}, "width=0"),
                BadInput({"clip": float("inf")}, "clip=inf"),
                BadInput({"std": 0.0}, "std=0.0"),
                BadInput({"placement": "everywhere"}, "placement='everywhere'"),
                BadInput({"rank_pattern": {"up": 2}}, "the kernels of snnk have no rank"),
            ),
        )
        for width, clip in ((None, 0.0), (3, -0.1))  # the gate; the bottleneck
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
    *(
        Case(
            "vb_lora",
            {"rank": 3, "vectors": 7, "length": 4, "top": top, "dropout": dropout},
            count=lambda sites: (
                7 * 4 + sum(slices(s) * 7 * s.rank * (s.d_in + s.d_out) // 4 for s in sites)
            ),
            oracle=lambda W, p, shared, top=top: (
                W
                + oracles.vb_lora(p["logits_A"], shared["bank"], top).T
                @ oracles.vb_lora(p["logits_B"], shared["bank"], top)
            ),
            bad=(
                BadInput({"rank": 0}, "rank=0"),
                BadInput({"rank": 10_000}, "rank=10000 is out of range"),
                BadInput({"vectors": 0}, "vectors=0"),
                BadInput({"length": 0}, "length=0"),
                BadInput({"length": 8}, "length=8 does not divide both .*: choose a divisor of 4"),
                BadInput({"top": 0}, "top=0"),
                BadInput({"top": 8}, "top=8: the bank has vectors=7"),
                BadInput({"bank_bound": 0.0}, "bank_bound=0.0"),
                BadInput({"logits_std": -0.1}, "logits_std=-0.1"),
                BadInput({"dropout": 1.0}, "dropout=1.0"),
            ),
        )
        for top, dropout in ((2, 0.0), (7, 0.2))
    ),
    Case(
        "trainable_tokens",
        {"tokens": [7, 3, 11]},
        count=lambda sites: sum(3 * s.d_out for s in sites),
        oracle=lambda W, p, shared: np.stack(
            [p["R"][[7, 3, 11].index(t)] if t in (7, 3, 11) else row for t, row in enumerate(W)]
        ),
        bad=(
            BadInput({"tokens": []}, r"tokens=\[\]: give ids"),
            BadInput({"tokens": [3, 3]}, r"tokens=\[3, 3\]: give ids"),
            BadInput({"tokens": [-1]}, r"tokens=\[-1\]: give ids"),
            BadInput({"tokens": [True]}, r"tokens=\[True\]: give ids"),
            BadInput({"tokens": [18]}, "'embed/embedding' has the ids 0 to 17"),
            BadInput({"targets": "query"}, "trainable_tokens replaces rows .*'layers/attention"),
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
    Case(
        "weight_compander",
        {"kappa": 1.2},
        count=lambda sites: sum(2 * slices(s) for s in sites),
        oracle=lambda W, p, shared: (
            p["a_0"] * np.exp(p["log_a"]) * np.arctan(np.tan(W / p["a_0"]) / np.exp(p["log_b"]))
        ),
        bad=(
            BadInput({"kappa": 1.0}, "kappa=1.0"),
            BadInput({"kappa": float("inf")}, "kappa=inf"),
            BadInput({"kappa": float("nan")}, "kappa=nan"),
            BadInput({"rank_pattern": {"up": 2}}, "the kernels of weight_compander have no rank"),
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
    Case(
        "zeroi2v",
        {"width": 3, "targets": r"(query|value|out|up|down)/kernel"},
        # one adapter for query and value, one each for the others
        count=lambda sites: sum(slices(s) * 87 for s in sites if "value" not in s.path),
        oracle=oracles.zeroi2v,
        layers_share=True,
        zero_grad_at_start=("D1", "b1"),
        bad=(
            BadInput({"width": 0}, "width=0"),
            BadInput({"width": 13}, "width=13 is out of range for adapters of 12"),
            BadInput({"scale": 0.0}, "scale=0.0"),
            BadInput({"after": "up/kernel"}, "one width, and the targets need several"),
            BadInput({"after": "no_such"}, "after='no_such' matches none of the targets"),
            BadInput({"after": "query/kernel"}, "has head axes 'lioo' at its output"),
            BadInput({"targets": "embedding"}, "belongs to an embedding or a convolution"),
            BadInput({"rank_pattern": {"up": 2}}, "the kernels of zeroi2v have no rank"),
        ),
    ),
)
