"""Formulas of methods in plain numpy that are too long for a row of tests/cases.py."""

from collections.abc import Mapping, Sequence

import numpy as np

Arrays = Mapping[str, np.ndarray]


def kind(W: np.ndarray, p: Arrays, gates: Sequence[int], residual: bool = True) -> np.ndarray:
    """W - C_0 + the components, term by term; the components alone without a residual."""
    out = W.copy() if residual else np.zeros_like(W)
    for group, factor in (("G", 1), ("T", gates), ("G0", -1), ("T0", -1)):
        U, s, V = (p.get(f"{name}_{group}", np.zeros((1, 0))) for name in "UsV")
        for n, g in enumerate(np.broadcast_to(factor, U.shape[1])):
            out += g * s[n] * np.outer(U[:, n], V[:, n])
    return out


def lamda(W: np.ndarray, p: Arrays) -> np.ndarray:
    """W_res + s A Sg B with B's frozen rows; W_res = W where nothing of W was taken over."""
    B = np.where(p["active"][:, None], p["B"], p["held"])
    taken = p["A"] @ np.diag(p["Sg0"]) @ p["B0"] if "Sg0" in p else 0.0
    return (W - p["scale"] * taken) + p["scale"] * p["A"] @ p["Sg"] @ B


def loldu(W: np.ndarray, p: Arrays) -> np.ndarray:
    """W_res + s (Pm L_r diag(z) U_r)^T, W_res = W - s (Pm L_r diag(z0) U_r)^T."""
    z, z0 = ((p["L"] @ np.diag(p[name]) @ p["U"]).T for name in ("z", "z0"))
    return (W - p["scale"] * z0) + p["scale"] * z


def monarch(W: np.ndarray, p: Arrays) -> np.ndarray:
    """One sub-matrix after the other: the rows of input block k, every n2-th column from j."""
    R, L = p["R"], p["L"]
    (n1, i, _), (n2, rows, o) = R.shape, L.shape
    out, rho = np.zeros((n1 * i, o * n2)), rows // n1
    for k, j in np.ndindex(n1, n2):
        out[k * i : (k + 1) * i, j::n2] = R[k][:, j::n2] @ L[j][k * rho : (k + 1) * rho]
    return out[: W.shape[0], : W.shape[1]]


def more(W: np.ndarray, p: Arrays) -> np.ndarray:
    """W + M, the rows of M being the images of unit vectors."""
    (N, i, q), d_in = p["w1"].shape, len(W)
    h = np.einsum("tni,niq->tnq", np.eye(d_in).reshape(d_in, N, i), p["w1"])
    h = h.reshape(d_in, q, N).transpose(0, 2, 1)
    return W + np.einsum("tnq,nqo->ton", h, p["w2"]).reshape(W.shape)


def sorsa(W: np.ndarray, p: Arrays) -> np.ndarray:
    """W_res + s P diag(sigma) Q, W_res = W - s P0 diag(sigma0) Q0."""
    W_res = W - p["scale"] * p["P0"] @ np.diag(p["sigma0"]) @ p["Q0"]
    return W_res + p["scale"] * p["P"] @ np.diag(p["sigma"]) @ p["Q"]


def svft(W: np.ndarray, p: Arrays) -> np.ndarray:
    """W + U g M V^T, M (n, n) with the values m at its places, where equal places add up."""
    n = p["U"].shape[1]
    rows, columns = (p.get(name, np.arange(n)) for name in ("rows", "columns"))
    M = np.bincount(rows * n + columns, weights=p["m"], minlength=n * n).reshape(n, n)
    return W + p["U"] @ (M / (1 + np.exp(-p["gate"]))) @ p["V"].T
