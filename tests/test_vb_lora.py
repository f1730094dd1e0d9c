"""VB-LoRA beyond the table: which vectors a piece is made of, the bank, the start."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts
from pefts.core import SHARED


def problem(**kwargs: Any) -> tuple[Any, ...]:
    params = {
        name: {"kernel": jax.random.normal(jax.random.key(3), shape)}
        for name, shape in (("query", (12, 8)), ("up", (8, 20)))
    }
    peft = pefts.vb_lora(rank=3, vectors=9, length=4, **kwargs)
    return peft, params, peft.init(jax.random.key(0), params)


def gradients(peft: Any, params: Any, state: Any) -> Any:
    def loss(trainable: Any) -> jax.Array:
        merged = peft.merge(params, state._replace(trainable=trainable))
        return sum((jnp.sum(one["kernel"] ** 2) for one in merged.values()), jnp.zeros(()))

    return jax.grad(loss)(state.trainable)


@pytest.mark.parametrize("top", [1, 2, 4])
def test_a_piece_is_made_of_its_largest_logits_alone(top: int) -> None:
    peft, params, state = problem(top=top)
    logits = np.asarray(state.trainable["query/kernel"]["logits_A"])
    grads = np.asarray(gradients(peft, params, state)["query/kernel"]["logits_A"])
    places = np.argsort(-logits, axis=-1)
    assert (np.take_along_axis(grads, places[..., top:], -1) == 0).all()
    used = np.take_along_axis(grads, places[..., :top], -1)
    # A softmax's gradients add up to nothing: none is left where one vector has all the weight.
    np.testing.assert_allclose(used.sum(-1), 0, atol=1e-6)
    assert (used != 0).any() == (top > 1)


def test_a_piece_is_a_mean_of_vectors() -> None:
    """A bank of equal rows makes all factors equal to it, whatever the logits."""
    peft, params, state = problem(top=3)
    row = jnp.arange(1.0, 5.0)
    bank = {SHARED: {"bank": jnp.broadcast_to(row, (9, 4))}}
    merged = peft.merge(params, state._replace(trainable={**state.trainable, **bank}))
    update = np.asarray(merged["query"]["kernel"] - params["query"]["kernel"])
    np.testing.assert_allclose(update, 3 * np.outer(np.tile(row, 3), np.tile(row, 2)), rtol=1e-5)


def test_one_bank_serves_all_kernels_and_hears_from_all() -> None:
    peft, params, state = problem()
    assert [path for path, group in state.trainable.items() if "bank" in group] == [SHARED]
    assert state.frozen == {}
    together = gradients(peft, params, state)[SHARED]["bank"]
    alone = []
    for name in params:
        kept = {path: state.trainable[path] for path in (f"{name}/kernel", SHARED)}
        part = {name: params[name]}
        alone.append(gradients(peft, part, pefts.PeftState(kept, {}))[SHARED]["bank"])
    np.testing.assert_allclose(together, alone[0] + alone[1], rtol=1e-5, atol=1e-6)
    assert all(float(jnp.abs(g).max()) > 0 for g in alone)


def test_the_start_is_small_but_not_the_identity() -> None:
    params = {"query": {"kernel": jnp.zeros((256, 128))}}
    peft = pefts.vb_lora(rank=4, vectors=64, length=16)
    state = peft.init(jax.random.key(0), params)
    bank, logits = state.trainable[SHARED]["bank"], state.trainable["query/kernel"]["logits_A"]
    assert 0.019 < float(jnp.abs(bank).max()) <= 0.02
    assert abs(float(jnp.std(logits)) - 0.1) < 0.01
    update = jnp.abs(peft.merge(params, state)["query"]["kernel"])
    assert 0 < float(update.max()) <= 4 * 0.02**2
    assert not peft.traits.identity_at_init
