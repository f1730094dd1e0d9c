"""Formulas of methods in plain numpy that are too long for a row of tests/cases.py."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

Arrays = Mapping[str, np.ndarray]


def compacter(
    y: np.ndarray, p: Arrays, R: np.ndarray, act: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """y + Up(act(Down(y))), both matrices dense sums of Kronecker products."""

    def affine(x: np.ndarray, name: str) -> np.ndarray:
        S, T = p[f"S_{name}"], p[f"T_{name}"]
        return x @ sum(np.kron(R[i], S[i] @ T[i]) for i in range(len(R))) + p[f"b_{name}"]

    return y + affine(act(affine(y, "D")), "U")


def gelu_tanh(z: np.ndarray) -> np.ndarray:
    return z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def cayley(K: np.ndarray, terms: int | None = None) -> np.ndarray:
    """(I - K)(I + K)^-1, or with a series of terms - 1 powers in the place of the inverse."""
    eye = np.eye(len(K))
    if terms is None:
        return (eye - K) @ np.linalg.inv(eye + K)
    return (eye - K) @ sum(np.linalg.matrix_power(-K, k) for k in range(terms - 1))


def boft(W: np.ndarray, p: Arrays) -> np.ndarray:
    """(F_m ... F_1 W) * s, each F_i a dense P_i D_i P_i^T."""
    (m, n, b, _), d = p["A"].shape, len(W)
    for i, blocks in enumerate(p["A"]):
        D = np.zeros((d, d))
        for j, A in enumerate(blocks):
            D[j * b : (j + 1) * b, j * b : (j + 1) * b] = cayley((A - A.T) / 2)
        # in every stretch of 2^i blocks: the half blocks with even numbers, then the others
        order = np.arange(d)
        if m > 1:
            units = order.reshape(n // 2**i, 2 ** (i + 1), b // 2)
            order = np.concatenate([units[:, 0::2], units[:, 1::2]], axis=1).reshape(-1)
        P = np.eye(d)[order]
        W = P @ D @ P.T @ W
    return W * p["s"]


def in_front(y: np.ndarray, P: np.ndarray) -> np.ndarray:
    """[P; y[n:]] for every row of y."""
    return np.stack([np.concatenate([P, row[len(P) :]]) for row in y])


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


def miss(W: np.ndarray, p: Arrays) -> np.ndarray:
    """Entry by entry: row i mod r and column j mod m of D; or T + C_b T + C_b of every block T."""
    out = W.copy()
    if "D" in p:
        r, m = p["D"].shape
        for i, j in np.ndindex(W.shape):
            out[i, j] += p["D"][i % r, j % m]
        return out
    r = p["C"].shape[-1]
    for a, (b, C) in itertools.product(range(len(W) // r), enumerate(p["C"])):
        at = np.s_[a * r : (a + 1) * r, b * r : (b + 1) * r]
        out[at] = W[at] + C @ W[at] + C
    return out


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


def mos(W: np.ndarray, p: Arrays, shared: Arrays) -> np.ndarray:
    """W + s A B, each row of A^T and B the shards of its row of the table, one behind the other."""
    (name_A,), (name_B,) = ([name for name in p if name.startswith(f)] for f in ("A.", "B."))
    out = W.copy()
    for a, b in zip(p[name_A], p[name_B], strict=True):
        row_A = np.concatenate([shared[name_A][index] for index in a])
        row_B = np.concatenate([shared[name_B][index] for index in b])
        out += p["scale"] * np.outer(row_A, row_B)
    return out


def nola(W: np.ndarray, p: Arrays, rank: int) -> np.ndarray:
    """W + s (A0 + sum_i alpha_i A_i) (sum_i beta_i B_i), of matrices drawn one by one."""
    (d_in, d_out), k = W.shape, len(p["alpha"])
    key = jax.random.wrap_key_data(jax.numpy.asarray(p["key"]), impl="threefry2x32")
    key_0, key_A, key_B = jax.random.split(key, 3)

    def drawn(key: jax.Array, index: int, rows: int, columns: int) -> np.ndarray:
        key = jax.random.fold_in(key, index)
        return np.asarray(jax.random.uniform(key, (rows, columns), "float32", -1.0), np.float64)

    A = drawn(key_0, 0, d_in, rank) / np.sqrt(d_in)
    A += sum(p["alpha"][i] / np.sqrt(k) * drawn(key_A, i, d_in, rank) for i in range(k))
    B = sum(p["beta"][i] / np.sqrt(k) * drawn(key_B, i, rank, d_out) for i in range(k))
    return W + p["scale"] * A @ B


def randlora(W: np.ndarray, p: Arrays, shared: Arrays, s: float) -> np.ndarray:
    """W + s D, or W + s D^T for a kernel that is wider than high; D base by base."""
    (r, n), m, M = p["lambda"].shape, min(W.shape), max(W.shape)
    D = np.zeros((M, m))
    for i in range(n):
        B_i = np.stack([shared["B"][:M, k * n + i] for k in range(r)], axis=1)
        A = shared["A"][:r, :m]
        D += B_i @ np.diag(p["lambda"][:, i]) @ A @ np.diag(p["gamma"][i])
    return W + s * (D.T if W.shape[0] <= W.shape[1] else D)


def prefix(q: np.ndarray, k: np.ndarray, v: np.ndarray, K: np.ndarray, V: np.ndarray) -> np.ndarray:
    """Causal attention, query by query and head by head, over the keys K (n, N H) besides."""
    out, size = np.zeros_like(q), q.shape[-1]
    for b, t, head in np.ndindex(q.shape[:3]):
        mine = slice(head * size, (head + 1) * size)
        keys = np.concatenate([K[:, mine], k[b, : t + 1, head]])
        weights = np.exp(keys @ q[b, t, head] / np.sqrt(size))
        values = np.concatenate([V[:, mine], v[b, : t + 1, head]])
        out[b, t, head] = weights / weights.sum() @ values
    return out


def prefix_tokens(p: Arrays, shared: Arrays) -> list[np.ndarray]:
    """K and V of one layer, as they stand or out of the MLP tanh(E W1 + b1) W2 + b2."""
    if "K" in p:
        return [p["K"], p["V"]]
    h = np.tanh(shared["E"] @ shared["W1"] + shared["b1"])
    return np.split(h @ p["W2"] + p["b2"], 2, axis=1)


def oft(W: np.ndarray, p: Arrays, terms: int | None = 5, eps: float | None = None) -> np.ndarray:
    """R W, R block by block; one row of Q may serve all blocks, and eps bounds their norms."""
    b = next(b for b in range(2, 1 + len(W)) if b * (b - 1) // 2 == p["Q"].shape[1])
    R, rows = np.zeros((len(W), len(W))), len(p["Q"])
    for i in range(len(W) // b):
        K = np.zeros((b, b))
        K[np.triu_indices(b, 1)] = p["Q"][i % rows]
        K -= K.T
        if eps is not None:
            K *= min(1.0, eps / np.sqrt(rows) / np.linalg.norm(K))
        R[i * b : (i + 1) * b, i * b : (i + 1) * b] = cayley(K, terms)
    return R @ W


def petalface(W: np.ndarray, p: Arrays, a: float) -> np.ndarray:
    """W + s ((1 - a) A1 B1 + a A2 B2)."""
    return W + p["scale"] * ((1 - a) * p["A1"] @ p["B1"] + a * p["A2"] @ p["B2"])


def poly(W: np.ndarray, p: Arrays, Z: np.ndarray) -> np.ndarray:
    """W + s A^ B^ for the logits Z (h, K) of a task, skill after skill and block after block."""
    A, B = p["A"], p["B"]
    (h, _, i, r), o = A.shape, B.shape[-1]
    g = 1 / (1 + np.exp(-Z))
    left, right = np.zeros((h * i, r)), np.zeros((r, h * o))
    for q, k in np.ndindex(Z.shape):
        w = g[q, k] / g[q].sum()
        left[q * i : (q + 1) * i] += w * A[q, k]
        right[:, q * o : (q + 1) * o] += w * B[q, k]
    return W + p["scale"] * left @ right


def scalearn(y: np.ndarray, p: Arrays, omega: np.ndarray) -> np.ndarray:
    """y + sum_t omega_t u_t, source after source."""
    out = y.copy()
    for t, w in enumerate(omega):
        own = p["source"] == t
        h = y @ p["D"][:, own] + p["b_D"][own]
        out += w * (h / (1 + np.exp(-h)) @ p["U"][own] + p["b_U"][t])
    return out


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


def vb_lora(logits: np.ndarray, bank: np.ndarray, top: int) -> np.ndarray:
    """(r, d), piece by piece."""
    out = np.zeros((*logits.shape[:2], bank.shape[1]))
    for place in np.ndindex(logits.shape[:2]):
        chosen = np.argsort(-logits[place])[:top]
        weights = np.exp(logits[place][chosen])
        out[place] = sum(w * bank[n] for w, n in zip(weights / weights.sum(), chosen, strict=True))
    return out.reshape(len(logits), -1)


def zeroi2v(W: np.ndarray, p: Arrays, shared: Arrays) -> np.ndarray:
    """E W behind an adapter and W E in front of one, E = I + s D1 D2, s = 1/2."""
    index = int(p["before"] if "before" in p else p["after"])
    E = np.eye(shared["D1"].shape[1]) + 0.5 * shared["D1"][index] @ shared["D2"][index]
    return E @ W if "before" in p else W @ E


def snnk(y: np.ndarray, p: Arrays, shared: Arrays, clip: float) -> np.ndarray:
    """y + v * (phi(y) P), or y + (phi(y) P) U + b_U."""
    G = p["G"]
    h = np.maximum(y @ G.T, clip) / np.sqrt(len(G)) @ p["P"]
    return y + (h * p["v"] if "v" in p else h @ p["U"] + p["b_U"])
