"""Estimates for a box that answers queries only, and a denoiser trained in front of one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import close, near
from sklearn.datasets import load_digits

from pefts.zeroth_order.black_box import (
    black_box,
    estimate_gradient,
    robust_loss,
    stability_losses,
)

Array = np.ndarray


def linear(dtype: Any = jnp.float64) -> tuple[jax.Array, jax.Array, Any]:
    """Latents (B, 2, 3), weights (B, 2, 3), and the losses sum(weights * h) of each example."""
    random = np.random.default_rng(0)
    h, c = (jnp.asarray(random.normal(size=(4, 2, 3)), dtype) for _ in range(2))
    return h, c, lambda h, c: jnp.sum(h * c, axis=(1, 2))


def curved(h: jax.Array, y: jax.Array) -> jax.Array:
    """Cross-entropy of a small network of h (B, 6)."""
    logits = jnp.tanh(h @ jnp.cos(jnp.arange(30.0, dtype=h.dtype)).reshape(6, 5))
    return optax.softmax_cross_entropy_with_integer_labels(3 * logits, y)


def latents(dtype: Any = jnp.float64) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(1)
    return jnp.asarray(random.normal(size=(4, 6)), dtype), jnp.asarray([0, 4, 2, 1])


# --- the estimates ---


@pytest.mark.parametrize("chunk", [1, 4, 50])
@pytest.mark.parametrize("mu", [5e-3, 0.5])
def test_differences_of_coordinates_are_exact_on_a_linear_head(mu, chunk, x64: None) -> None:
    h, c, losses = linear()
    near(estimate_gradient(losses, h, c, mu=mu, chunk=chunk), c, 1e-12)
    g = jax.grad(lambda h: jnp.mean(black_box(losses, mu=mu, chunk=chunk)(h, c)))(h)
    near(g, c / 4, 1e-12)


def test_differences_of_coordinates_err_by_the_square_of_mu(x64: None) -> None:
    h, y = latents()
    exact = jax.grad(lambda h: jnp.sum(curved(h, y)))(h)
    errors = [
        np.abs(estimate_gradient(curved, h, y, mu=mu) - exact).max() for mu in (0.04, 0.02, 0.01)
    ]
    near(np.divide(errors[:-1], errors[1:]), [4, 4], 0.05)
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("chunk", [1, 2])
def test_random_directions_are_unbiased_for_every_example(chunk: int, x64: None) -> None:
    h, c, losses = linear()
    one = lambda key: estimate_gradient(  # noqa: E731
        losses, h, c, estimator="rge", queries=3, chunk=chunk, key=key
    )
    samples = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), 4000)))
    error = samples.std(axis=0) / np.sqrt(4000)
    assert np.all(np.abs(samples.mean(axis=0) - c) < 4 * error)
    assert error.max() < 0.1 * np.abs(c).mean()  # of a factor beside d / q it would be seen
    # Directions of norm 1, others for each example: E|ghat|^2 = (d / q + 1 - 1 / q) |c|^2.
    ratio = np.mean(np.sum(samples**2, (2, 3)), 0) / np.sum(np.square(c), (1, 2))
    near(ratio, 6 / 3 + 1 - 1 / 3, 0.15)
    correlation = np.corrcoef(samples[:, 0, 0, 0], samples[:, 1, 0, 0])[0, 1]
    assert abs(correlation) < 0.1


def test_chunks_change_no_direction(x64: None) -> None:
    h, y = latents()

    def ask(chunk: int = 1, losses: Any = None) -> jax.Array:
        options = {"estimator": "rge", "queries": 7, "key": jax.random.key(3), "losses": losses}
        return jax.jit(lambda h: estimate_gradient(curved, h, y, chunk=chunk, **options))(h)

    one = ask()
    for chunk in (3, 100):
        near(ask(chunk=chunk), one, 1e-11)
    near(ask(losses=curved(h, y)), one, 1e-12)
    assert not np.allclose(ask(losses=curved(h, y) + 1), one)  # they are made use of


def test_how_often_the_box_is_asked() -> None:
    h, y = latents(jnp.float32)
    asked: list[int] = []

    def losses(h: Array, y: Array) -> Array:
        asked.append(len(h))
        return np.asarray(curved(jnp.asarray(h), jnp.asarray(y)))

    def count(run: Any) -> int:
        asked.clear()
        jax.block_until_ready(run())
        jax.effects_barrier()
        assert set(asked) == {4}  # the batch at once
        return len(asked)

    boxes = {
        name: black_box(losses, estimator=name, queries=5, chunk=2, remote=True)
        for name in ("cge", "rge")
    }
    key = jax.random.key(0)
    for box in boxes.values():
        assert count(lambda box=box: box(h, y, key=key)) == 1
    grads = {
        name: jax.jit(jax.value_and_grad(lambda h, box=box: jnp.mean(box(h, y, key=key))))
        for name, box in boxes.items()
    }
    assert count(lambda: grads["cge"](h)) == 2 * 6 + 1
    assert count(lambda: grads["rge"](h)) == 5 + 1


# --- the box ---


@pytest.mark.parametrize("estimator", ["cge", "rge"])
def test_a_remote_box_is_as_a_jax_function(estimator: str, x64: None) -> None:
    h, y = latents()

    def on_host(h: Array, y: Array) -> Array:
        assert isinstance(h, np.ndarray) and isinstance(y, np.ndarray)
        logits = 3 * np.tanh(h @ np.cos(np.arange(30.0)).reshape(6, 5))
        return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]

    options, key = {"estimator": estimator, "queries": 4, "chunk": 2}, jax.random.key(1)
    remote, here = black_box(on_host, **options, remote=True), black_box(curved, **options)
    near(remote(h, y), curved(h, y), 1e-13)
    both = [
        jax.jit(jax.value_and_grad(lambda h, box=box: jnp.sum(box(h, y, key=key) ** 2)))(h)
        for box in (remote, here)
    ]
    close(*both, 1e-9, 1e-9)
    # The cotangent of each example multiplies its own estimate.
    ghat = estimate_gradient(curved, h, y, estimator=estimator, queries=4, key=key)
    near(both[1][1], 2 * curved(h, y)[:, None] * ghat, 1e-10)


def test_only_the_latents_have_a_gradient(x64: None) -> None:
    h, c, losses = linear()
    box = black_box(lambda h, c: losses(h, c) * jnp.exp(c[:, 0, 0]))
    gh, gc = jax.grad(lambda h, c: jnp.sum(box(h, c)), argnums=(0, 1))(h, c)
    assert np.all(gh != 0)
    np.testing.assert_array_equal(gc, 0)


def test_a_box_keeps_the_dtype_of_its_latents() -> None:
    h, c, losses = linear(jnp.float32)
    box = black_box(lambda h: losses(h, c).astype(jnp.bfloat16), mu=0.5)
    g = jax.grad(lambda h: jnp.sum(box(h).astype(jnp.float32)))(h)
    assert g.dtype == jnp.float32
    near(g, c, 0.2)


# --- robust training ---


def test_the_stability_loss_is_the_cross_entropy_with_the_clean_prediction(x64: None) -> None:
    random = np.random.default_rng(5)
    logits, clean = random.normal(size=(2, 6, 4))
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), clean.argmax(1)]
    near(stability_losses(jnp.asarray(logits), jnp.asarray(clean)), expected, 1e-13)
    g = jax.grad(lambda c: jnp.sum(stability_losses(jnp.asarray(logits), c)))(jnp.asarray(clean))
    np.testing.assert_array_equal(g, 0)
    assert stability_losses(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((2, 3))).dtype == jnp.float32


class Parts:
    """A denoiser x + tanh(x V) U, an encoder, a decoder and a classifier."""

    def __init__(self, dtype: Any, d: int, latent: int, classes: int) -> None:
        random = np.random.default_rng(6)
        make = lambda *shape: jnp.asarray(random.normal(size=shape) / np.sqrt(shape[0]), dtype)  # noqa: E731
        self.params = {"V": make(d, d), "U": 0.1 * make(d, d)}
        self.frozen = {"E": make(d, latent), "D": make(latent, d), "C": 3 * make(d, classes)}

    def encode(self, params: dict, x: jax.Array) -> jax.Array:
        return (x + jnp.tanh(x @ params["V"]) @ params["U"]) @ self.frozen["E"]

    def decode(self, h: jax.Array) -> jax.Array:
        return jnp.tanh(h @ self.frozen["D"])

    def classify(self, x: jax.Array) -> jax.Array:
        return x @ self.frozen["C"]


def exact_loss(parts: Parts, sigma: float) -> Any:
    """The same loss without a box."""

    def loss(params: dict, x: jax.Array, key: jax.Array) -> jax.Array:
        n = jax.random.normal(jax.random.split(key)[0], x.shape, x.dtype)
        logits = parts.classify(parts.decode(parts.encode(params, x + sigma * n)))
        target = jnp.argmax(parts.classify(x), axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

    return loss


def test_the_denoisers_gradient_is_that_of_backpropagation_to_the_square_of_mu(x64: None) -> None:
    parts = Parts(jnp.float64, 5, 3, 4)
    x, key = jnp.asarray(np.random.default_rng(7).normal(size=(6, 5))), jax.random.key(4)
    value, exact = jax.value_and_grad(exact_loss(parts, 0.25))(parts.params, x, key)
    errors = []
    for mu in (0.02, 0.01):
        loss = robust_loss(parts.encode, parts.decode, parts.classify, mu=mu)
        ours, g = jax.value_and_grad(loss)(parts.params, x, key)
        near(ours, value, 1e-13)
        errors.append(max(np.abs(g[name] - exact[name]).max() for name in g))
    near(errors[0] / errors[1], 4, 0.05)
    assert errors[1] < 1e-4 < max(np.abs(leaf).max() for leaf in exact.values())


def test_decoder_and_classifier_have_no_gradient_though_they_may_be_traced(x64: None) -> None:
    parts = Parts(jnp.float64, 5, 3, 4)
    x, key = jnp.asarray(np.random.default_rng(7).normal(size=(6, 5))), jax.random.key(4)

    def loss(params: dict, frozen: dict, x: jax.Array) -> jax.Array:
        decode = lambda h: jnp.tanh(h @ frozen["D"])  # noqa: E731
        box = robust_loss(parts.encode, decode, lambda x: x @ frozen["C"])
        return box(params, x, key)

    g, frozen = jax.jit(jax.grad(loss, argnums=(0, 1)))(parts.params, parts.frozen, x)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(frozen))
    expected = jax.grad(loss)(parts.params, parts.frozen, x)
    close(g, expected, 1e-9, 1e-9)


def test_a_denoiser_makes_digits_robust_to_noise() -> None:
    images, labels = load_digits(return_X_y=True)
    chosen = labels < 4
    x = jnp.asarray(images[chosen][:96] / 8 - 1, jnp.float32)
    y, random = labels[chosen][:96], np.random.default_rng(0)
    U, _, _ = np.linalg.svd(np.asarray(x).T, full_matrices=False)
    basis = jnp.asarray(U[:, :24], jnp.float32)  # the autoencoder
    targets = np.eye(4, dtype=np.float32)[y]
    C = jnp.asarray(np.linalg.lstsq(np.asarray(x), 8 * targets, rcond=1e-6)[0], jnp.float32)
    frozen = jax.tree.map(np.array, (basis, C))

    def encode(params: dict, x: jax.Array) -> jax.Array:
        return (x + jnp.tanh(x @ params["V"]) @ params["U"]) @ basis

    classify = lambda x: x @ C  # noqa: E731
    decode = lambda h: h @ basis.T  # noqa: E731
    loss = robust_loss(encode, decode, classify, sigma=0.8, chunk=8)
    params = {
        "V": jnp.asarray(random.normal(size=(64, 32)) / 8, jnp.float32),
        "U": jnp.zeros((32, 64)),
    }
    tx = optax.adam(0.01)

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple:
        updates, state = tx.update(jax.grad(loss)(params, x, key), state, params)
        return optax.apply_updates(params, updates), state

    def score(params: Any) -> tuple[float, float]:
        keys = jax.random.split(jax.random.key(99), 4)
        noisy = jnp.concatenate([x + 0.8 * jax.random.normal(key, x.shape) for key in keys])
        found = jnp.argmax(classify(decode(encode(params, noisy))), axis=1)
        clean = np.tile(np.argmax(classify(x), axis=1), 4)
        return float(np.mean([loss(params, x, key) for key in keys])), float(
            np.mean(found == clean)
        )

    before, state = score(params), tx.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes integers and floats
        for t in range(60):
            params, state = step(params, state, jax.random.fold_in(jax.random.key(0), t))
    after = score(params)
    assert after[0] < 0.5 * before[0]
    assert after[1] > before[1] + 0.02
    jax.tree.map(np.testing.assert_array_equal, (basis, C), frozen)


# --- errors ---

BAD = {
    "estimator='spsa' is unknown; choose one of": {"estimator": "spsa"},
    "mu=0: give the step": {"mu": 0},
    "queries=0: give q": {"queries": 0},
    "queries=1.5": {"queries": 1.5},
    "chunk=0": {"chunk": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_arguments_out_of_range_are_refused(message: str) -> None:
    parts = Parts(jnp.float32, 5, 3, 4)
    with pytest.raises(ValueError, match=message):
        black_box(curved, **BAD[message])
    with pytest.raises(ValueError, match=message):
        estimate_gradient(curved, *latents(jnp.float32), **BAD[message])
    with pytest.raises(ValueError, match=message):
        robust_loss(parts.encode, parts.decode, parts.classify, **BAD[message])


def test_what_does_not_fit_is_refused() -> None:
    h, y = latents(jnp.float32)
    with pytest.raises(ValueError, match="key=None: estimator='rge' draws directions"):
        estimate_gradient(curved, h, y, estimator="rge")
    with pytest.raises(ValueError, match="key=None: estimator='rge' draws directions"):
        jax.grad(lambda h: jnp.sum(black_box(curved, estimator="rge")(h, y)))(h)
    with pytest.raises(ValueError, match=r"it must return the 4 losses of the examples"):
        black_box(lambda h: jnp.mean(h))(h)
    with pytest.raises(ValueError, match="it must return the 4 losses"):
        estimate_gradient(lambda h: jnp.argmax(h, axis=1), h)
    with pytest.raises(ValueError, match=r"h is bfloat16 of shape \(4, 6\): give latents"):
        estimate_gradient(curved, h.astype(jnp.bfloat16), y)
    with pytest.raises(ValueError, match="h is int32"):
        black_box(curved)(y, y)
    parts = Parts(jnp.float32, 5, 3, 4)
    with pytest.raises(ValueError, match="sigma=-1: give the noise"):
        robust_loss(parts.encode, parts.decode, parts.classify, sigma=-1)
