"""ZO-AE-DS: a model that answers queries only, robust through a denoiser trained in front of it.

    h = E(D(x + sigma n)),  loss = mean_b CE(f(Dec(h)), argmax f(x))
    cge: ghat_k = (l(h + mu e_k) - l(h - mu e_k)) / (2 mu)                 2 d queries
    rge: ghat = d / q sum_j (l(h + mu u_j) - l(h)) / mu  u_j,  |u_j| = 1   q queries more than l(h)

D and E are differentiated as always; of the decoder and the classifier f only values are known. The
estimate ghat (B, d) stands for the gradient of the losses l (B,) with respect to the latents h
(B, d), each example's own: a query moves every example of the batch at once. The classifier must
treat examples by themselves (batch norms with fixed statistics, no dropout).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pefts import linalg
from pefts.zeroth_order.coordinates import check_chunk, check_mu, check_queries

ESTIMATORS = ("cge", "rge")


def estimate_gradient(
    fn: Callable[..., Any],
    h: Any,
    *args: Any,
    estimator: str = "cge",
    mu: float = 5e-3,
    queries: int = 192,
    chunk: int = 1,
    key: jax.Array | None = None,
    losses: Any = None,
) -> jax.Array:
    """ghat, of the shape of h: how each example's loss changes with its own latent.

    NOTE(paper): differences of coordinates are summed; the released code's CGE_sim divides by d
      also, which makes the learning rate another.

    Args:
      fn: (h, *args) -> losses (B,) for h (B, ...).
      h: the latents (B, ...), in float32 or better.
      args: what else fn takes, such as labels.
      estimator: "cge", all d coordinates by central differences, or "rge", random directions.
      mu: the step (paper: 5e-3).
      queries: q, the number of random directions of "rge" (paper: 192).
      chunk: how many queries are answered side by side.
      key: a random key, for "rge".
      losses: fn(h, *args), where "rge" need not ask for them again.

    Returns:
      The estimate, in the dtype of h; not finite where a loss is not.

    Raises:
      ValueError: an argument is out of range or unknown, "rge" has no key, fn gives no
        (B,), h is not of float32 or better.

    Example:
      >>> import jax.numpy as jnp
      >>> from pefts.zeroth_order.black_box import estimate_gradient
      >>> h = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
      >>> estimate_gradient(lambda h: jnp.sum(h * h, axis=1), h, mu=0.5).tolist()
      [[2.0, 4.0], [6.0, 8.0]]

    Source: How to Robustify Black-Box ML Models? A Zeroth-Order Optimization Perspective,
      arXiv 2203.14195.
    """
    _check(estimator, mu, queries, chunk)
    _check_losses(fn, h, args)
    if estimator == "rge" and key is None:
        raise ValueError("key=None: estimator='rge' draws directions; give it a random key.")
    flat = h.reshape(h.shape[0], -1)

    def at(moved: jax.Array) -> jax.Array:
        return linalg.precise(jnp.asarray(fn(moved.reshape(h.shape), *args)))

    if estimator == "cge":
        ghat = _central(at, flat, mu, chunk)
    else:
        base = at(flat) if losses is None else linalg.precise(losses)
        ghat = _random(at, flat, base, key, mu, queries, chunk)
    return ghat.reshape(h.shape).astype(h.dtype)  # losses may be of another


def black_box(
    fn: Callable[..., Any],
    *,
    estimator: str = "cge",
    mu: float = 5e-3,
    queries: int = 192,
    chunk: int = 1,
    remote: bool = False,
) -> Callable[..., jax.Array]:
    """A function (h, *args, key=None) -> losses (B,), whose gradient is `estimate_gradient`'s.

    Nothing but its values is asked of fn, and queries only if a gradient is taken: backward,
    ghat * cotangent for h, and zero for args and whatever fn closes over.

    Args:
      fn: (h, *args) -> losses (B,), a JAX function; if `remote` any function of numpy arrays.
      estimator, mu, queries, chunk: as in `estimate_gradient`.
      remote: whether fn is called on the host, by jax.pure_callback, once for each query with the
        whole batch. It must give the same answer to the same question.

    Returns:
      The function. Of its arguments `key`, needed for the gradient of "rge", is named.

    Raises:
      ValueError: as `estimate_gradient`.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from pefts.zeroth_order.black_box import black_box
      >>> losses = black_box(lambda h: np.sum(h**2, axis=1), remote=True)
      >>> g = jax.grad(lambda h: jnp.mean(losses(h)))(jnp.asarray([[1.0, 2.0], [3.0, 4.0]]))
      >>> np.round(g, 2).tolist()
      [[1.0, 2.0], [3.0, 4.0]]

    Source: How to Robustify Black-Box ML Models? A Zeroth-Order Optimization Perspective,
      arXiv 2203.14195.
    """
    _check(estimator, mu, queries, chunk)
    ask = _remote(fn) if remote else fn
    options = {"estimator": estimator, "mu": mu, "queries": queries, "chunk": chunk}

    def asked(h: Any, *args: Any, key: jax.Array | None = None) -> jax.Array:
        _check_losses(ask, h, args)
        # Parameters that fn closes over may be traced: the rule below needs them as arguments.
        pure, held = jax.closure_convert(ask, h, *args)
        return _asked(pure, options)(h, key, (*args, *held))

    return asked


def stability_losses(logits: jax.Array, clean: jax.Array) -> jax.Array:
    """CE(logits, argmax clean) (B,), of logits (B, C): how far a prediction is from the clean one.

    Computed in float32 or better. No label is needed, and `clean` gets no gradient.
    """
    logs = jax.nn.log_softmax(linalg.precise(logits), axis=-1)
    target = jnp.argmax(clean, axis=-1)
    return -jnp.take_along_axis(logs, target[..., None], axis=-1)[..., 0]


def robust_loss(
    encode: Callable[[Any, jax.Array], jax.Array],
    decode: Callable[[jax.Array], jax.Array],
    classify: Callable[[jax.Array], jax.Array],
    *,
    sigma: float = 0.25,
    estimator: str = "cge",
    mu: float = 5e-3,
    queries: int = 192,
    chunk: int = 1,
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """The loss (params, x, key) -> mean_b CE(f(Dec(h)), argmax f(x)), h = E(D(x + sigma n)).

    Train the autoencoder on reconstruction first (first-order), and then params by jax.grad of it.

    Args:
      encode: (params, x) -> h, E(D(x)), of the denoiser's params, and the encoder's if it is
        trained too.
      decode: h -> x, frozen.
      classify: x -> logits (B, C), the black box.
      sigma: the noise's deviation (paper: 0.25).
      estimator, mu, queries, chunk: as in `estimate_gradient`.

    Returns:
      The loss, a scalar; its gradient needs 2 d, or q, answers of decode and classify.

    Raises:
      ValueError: sigma is negative; as `estimate_gradient`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from pefts.zeroth_order.black_box import robust_loss
      >>> loss = robust_loss(lambda w, x: x * w, lambda h: h, lambda x: x @ jnp.eye(3))
      >>> value, g = jax.value_and_grad(loss)(jnp.float32(0.0), jnp.eye(3), jax.random.key(0))
      >>> round(float(value), 4), bool(g < 0)
      (1.0986, True)

    Source: How to Robustify Black-Box ML Models? A Zeroth-Order Optimization Perspective,
      arXiv 2203.14195.
    """
    if isinstance(sigma, int | float) and not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma={sigma!r}: give the noise's standard deviation, from 0.")

    def losses(h: jax.Array, clean: jax.Array) -> jax.Array:
        return stability_losses(classify(decode(h)), clean)

    asked = black_box(losses, estimator=estimator, mu=mu, queries=queries, chunk=chunk)

    def loss(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        noise_key, query_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, x.shape, x.dtype)
        h = encode(params, x + jnp.asarray(sigma, x.dtype) * noise)
        return jnp.mean(asked(h, classify(x), key=query_key))

    return loss


def _asked(fn: Callable[..., Any], options: dict[str, Any]) -> Callable[..., jax.Array]:
    """(h, key, args) -> fn(h, *args), with the rule for its gradient."""

    @jax.custom_vjp
    def losses(h: Any, key: Any, args: tuple[Any, ...]) -> jax.Array:
        del key
        return fn(h, *args)

    def forward(h: Any, key: Any, args: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        value = fn(h, *args)
        return value, (h, key, args, value)

    def backward(saved: Any, cotangent: jax.Array) -> tuple[Any, None, None]:
        h, key, args, value = saved
        ghat = estimate_gradient(fn, h, *args, key=key, losses=value, **options)
        rows = cotangent.reshape(-1, *[1] * (h.ndim - 1)).astype(h.dtype)
        return ghat * rows, None, None

    losses.defvjp(forward, backward)
    return losses


def _central(at: Callable[[jax.Array], jax.Array], h_BxD: jax.Array, mu: float, chunk: int) -> Any:
    step = jnp.asarray(mu, h_BxD.dtype)

    def one(k: jax.Array) -> jax.Array:
        up, down = h_BxD.at[:, k].add(step), h_BxD.at[:, k].add(-step)
        return (at(up) - at(down)) / jnp.asarray(2 * mu, h_BxD.dtype)

    return jax.lax.map(one, jnp.arange(h_BxD.shape[1]), batch_size=chunk).T


def _random(
    at: Callable[[jax.Array], jax.Array],
    h_BxD: jax.Array,
    base_B: jax.Array,
    key: Any,
    mu: float,
    queries: int,
    chunk: int,
) -> jax.Array:
    """The directions are added up chunk by chunk: all q of them are never in memory."""
    d = h_BxD.shape[1]

    def one(number: jax.Array) -> jax.Array:
        n_BxD = jax.random.normal(jax.random.fold_in(key, number), h_BxD.shape, h_BxD.dtype)
        u_BxD = n_BxD / jnp.linalg.norm(n_BxD, axis=1, keepdims=True)
        change_B = at(h_BxD + jnp.asarray(mu, h_BxD.dtype) * u_BxD) - base_B
        return change_B.astype(h_BxD.dtype)[:, None] * u_BxD

    def some(total: jax.Array, numbers: jax.Array) -> tuple[jax.Array, None]:
        return total + jnp.sum(jax.vmap(one)(numbers), axis=0), None

    width = min(chunk, queries)
    whole = queries // width * width
    total, _ = jax.lax.scan(some, jnp.zeros_like(h_BxD), jnp.arange(whole).reshape(-1, width))
    if whole < queries:
        total, _ = some(total, jnp.arange(whole, queries))
    return total * jnp.asarray(d / (queries * mu), h_BxD.dtype)


def _remote(fn: Callable[..., Any]) -> Callable[..., jax.Array]:
    def ask(h: Any, *args: Any) -> jax.Array:
        kind = linalg.precise(h).dtype

        def call(*values: Any) -> np.ndarray:
            return np.asarray(fn(*jax.tree.map(np.asarray, values)), kind)

        # One question after the other: what the host's function takes is a batch of examples.
        like = jax.ShapeDtypeStruct(h.shape[:1], kind)
        return jax.pure_callback(call, like, h, *args, vmap_method="sequential")

    return ask


def _check(estimator: str, mu: Any, queries: int, chunk: int) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r} is unknown; choose one of {ESTIMATORS}.")
    check_mu(mu)
    check_queries(queries)
    check_chunk(chunk)


def _check_losses(fn: Callable[..., Any], h: Any, args: tuple[Any, ...]) -> None:
    known = jnp.issubdtype(h.dtype, jnp.floating) and jnp.finfo(h.dtype).eps < 1e-6
    if not h.ndim or not known:
        raise ValueError(
            f"h is {h.dtype} of shape {h.shape}: give latents (B, ...), one for each example, in "
            "float32 or better; steps as small as mu are rounded away in less."
        )
    losses = jax.eval_shape(fn, h, *args)
    shape = getattr(losses, "shape", None)
    if shape != h.shape[:1] or not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(
            f"fn returns {losses} for latents of shape {h.shape}: it must return the {h.shape[0]} "
            "losses of the examples, a floating array; their mean is taken outside."
        )
