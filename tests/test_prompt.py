"""Prompt tuning: what the model sees, which arguments grow, initial values, tied tables, errors."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefts

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "peft" / "prompt"
VOCABULARY, WIDTH, BATCH, TOKENS, LENGTH = 13, 6, 3, 5, 2


class Reader(nn.Module):
    """Embeds ids and returns the embeddings, the mask and the types as it was given them."""

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        token_types: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> tuple:
        x = nn.Embed(VOCABULARY, WIDTH, name="word_embeddings")(tokens)
        positions = nn.Embed(20, WIDTH, name="position_embeddings")(
            jnp.arange(tokens.shape[1])[None, :]
        )
        return x, tokens, mask, token_types, weights, positions


class Tied(nn.Module):
    """One table at both ends."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = nn.Embed(VOCABULARY, WIDTH, name="wte")
        return table.attend(jnp.tanh(nn.Dense(WIDTH, name="mix")(table(tokens))))


@pytest.fixture
def tokens(key: jax.Array) -> jax.Array:
    return jax.random.randint(key, (BATCH, TOKENS), 0, VOCABULARY)


@pytest.fixture
def mask() -> jax.Array:
    return jnp.arange(TOKENS)[None, :] < jnp.asarray([5, 4, 2])[:, None]


@pytest.fixture
def params(key: jax.Array, tokens: jax.Array, mask: jax.Array) -> dict:
    return Reader().init(key, tokens, mask)["params"]


def read(peft: pefts.Peft, params: dict, state: pefts.PeftState, *args, **kwargs) -> tuple:
    bound = peft.bind(params, state)
    return jax.jit(lambda *a, **k: pefts.apply(Reader().apply)({"params": bound}, *a, **k))(
        *args, **kwargs
    )


def P_of(state: pefts.PeftState) -> np.ndarray:
    return np.asarray(state.trainable["word_embeddings/embedding"]["P"])


def test_virtual_tokens_stand_in_front(key, params, tokens, mask) -> None:
    peft = pefts.prompt(LENGTH, init="normal", placeholder=7)
    state = peft.init(key, params)
    types = jnp.ones_like(tokens)
    x, ids, longer, new_types, _, positions = read(
        peft, params, state, tokens, mask, token_types=types
    )
    table = np.asarray(params["word_embeddings"]["embedding"])
    np.testing.assert_array_equal(
        x[:, :LENGTH], np.broadcast_to(P_of(state), (BATCH, LENGTH, WIDTH))
    )
    np.testing.assert_array_equal(x[:, LENGTH:], table[np.asarray(tokens)])
    np.testing.assert_array_equal(ids, np.pad(tokens, ((0, 0), (2, 0)), constant_values=7))
    np.testing.assert_array_equal(longer, np.pad(mask, ((0, 0), (2, 0)), constant_values=True))
    np.testing.assert_array_equal(new_types, np.pad(types, ((0, 0), (2, 0))))
    assert (ids.dtype, longer.dtype, new_types.dtype) == (jnp.int32, jnp.bool_, jnp.int32)
    assert positions.shape == (1, TOKENS + LENGTH, WIDTH)


def test_it_is_the_model_on_given_embeddings(key, tokens) -> None:
    model = Tied()
    params = model.init(key, tokens)["params"]
    peft = pefts.prompt(LENGTH, init="normal", std=1.0)
    state = peft.init(key, params)
    logits = pefts.apply(model.apply)({"params": peft.bind(params, state)}, tokens)
    E = np.asarray(params["wte"]["embedding"])
    P = np.asarray(state.trainable["wte/embedding"]["P"])
    x = np.concatenate([np.broadcast_to(P, (BATCH, LENGTH, WIDTH)), E[np.asarray(tokens)]], axis=1)
    mix = params["mix"]
    expected = np.tanh(x @ np.asarray(mix["kernel"]) + np.asarray(mix["bias"])) @ E.T
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_one_virtual_token_gets_the_gradient_of_its_own_position(key, params, tokens, mask) -> None:
    peft = pefts.prompt(LENGTH)
    state = peft.init(key, params)
    weight = jax.random.normal(key, (BATCH, LENGTH + TOKENS, WIDTH))

    def loss(trainable):
        full = state._replace(trainable=trainable)
        return jnp.sum(weight * read(peft, params, full, tokens, mask)[0])

    grads = jax.grad(loss)(state.trainable)["word_embeddings/embedding"]["P"]
    np.testing.assert_allclose(grads, weight[:, :LENGTH].sum(0), rtol=1e-6)


def test_names_and_positions_of_arguments(key, params, tokens, mask) -> None:
    state = pefts.prompt(LENGTH).init(key, params)
    by_name = pefts.prompt(LENGTH, tokens="tokens")
    out = read(by_name, params, state, tokens=tokens, mask=mask)
    np.testing.assert_array_equal(out[2][:, :LENGTH], True)
    weights = jax.random.normal(key, (BATCH, TOKENS, 4))
    declared = pefts.prompt(LENGTH, aligned={"2": 1, "3": -100.0})
    out = read(declared, params, state, tokens, mask, jnp.zeros_like(tokens), weights)
    np.testing.assert_array_equal(out[3][:, :LENGTH], 1)
    np.testing.assert_array_equal(out[4][:, :LENGTH], -100.0)
    np.testing.assert_array_equal(out[4][:, LENGTH:], weights)
    alone = pefts.prompt(LENGTH, aligned={"weights": None})
    np.testing.assert_array_equal(
        read(alone, params, state, tokens, mask, weights=weights)[4], weights
    )
    per_row = jnp.ones((BATCH, 4))
    np.testing.assert_array_equal(
        read(alone, params, state, tokens, mask, token_types=None, weights=per_row)[4], per_row
    )


def test_an_undeclared_argument_along_the_tokens_is_refused(key, params, tokens, mask) -> None:
    peft = pefts.prompt(LENGTH)
    state = peft.init(key, params)
    for shape in ((BATCH, TOKENS), (BATCH, TOKENS, 4), (BATCH, 1, TOKENS, TOKENS)):
        with pytest.raises(ValueError, match="argument 'weights' of shape .* seems to run along"):
            read(peft, params, state, tokens, mask, weights=jnp.ones(shape))
    with pytest.raises(ValueError, match="argument '2' of shape .* seems to run along the 5"):
        read(peft, params, state, tokens, mask, jnp.zeros_like(tokens))
    with pytest.raises(ValueError, match="argument '1' of shape .* does not run along ids"):
        read(peft, params, state, tokens, mask[:, None, None, :])


def test_a_call_without_ids_is_refused(key, params, tokens, mask) -> None:
    peft = pefts.prompt(LENGTH)
    state = peft.init(key, params)
    with pytest.raises(
        ValueError, match=r"tokens=0 is no array of integer ids.*\['mask', 'tokens'\]"
    ):
        read(peft, params, state, tokens=tokens, mask=mask)
    with pytest.raises(ValueError, match="tokens=0 is no array of integer ids"):
        read(peft, params, state, tokens.astype(jnp.float32), mask)


def test_vocabulary_rows_are_drawn_once_each(key, params) -> None:
    table = np.asarray(params["word_embeddings"]["embedding"])
    P = P_of(pefts.prompt(VOCABULARY).init(key, params))
    np.testing.assert_array_equal(np.sort(P, axis=0), np.sort(table, axis=0))
    assert not np.array_equal(P, table)
    more = P_of(pefts.prompt(3 * VOCABULARY).init(key, params))
    assert all((row == table).all(axis=1).any() for row in more)


def test_normal_values_have_the_given_deviation(key) -> None:
    params = {"wte": {"embedding": jnp.ones((9, 500))}}
    P = pefts.prompt(100, init="normal", std=0.3).init(key, params).trainable["wte/embedding"]["P"]
    assert abs(float(P.std()) - 0.3) < 0.005 and abs(float(P.mean())) < 0.01


def test_two_matching_tables_are_refused(key, params) -> None:
    with pytest.raises(ValueError, match="match 2: .*position_embeddings.*word_embeddings"):
        pefts.prompt(LENGTH, targets="embedding$").init(key, params)


def test_only_tables_are_taken(key) -> None:
    params = {"mix": {"kernel": jnp.ones((4, 6))}, "many": {"embedding": jnp.ones((2, 4, 6))}}
    with pytest.raises(ValueError, match="'mix/kernel' of shape .4, 6. is none"):
        pefts.prompt(LENGTH, targets="mix").init(key, params)
    with pytest.raises(ValueError, match="'many/embedding' of shape .2, 4, 6. is none"):
        pefts.prompt(LENGTH, targets="many", axes={"many": "lio"}).init(key, params)


def test_a_lookup_shorter_than_the_prompt_is_refused(key) -> None:
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array, first: jax.Array) -> tuple:
            table = nn.Embed(VOCABULARY, WIDTH, name="wte")
            return table(tokens), table(first)

    tokens, first = jnp.zeros((2, 4), jnp.int32), jnp.zeros((2, 1), jnp.int32)
    params = Twice().init(key, tokens, first)["params"]
    peft = pefts.prompt(3, aligned={"1": None})
    bound = peft.bind(params, peft.init(key, params))
    with pytest.raises(ValueError, match=r"looked up for \(2, 1\) ids, too few for its 3 virtual"):
        pefts.apply(Twice().apply)({"params": bound}, tokens, first)


def test_it_cannot_be_merged(key, params) -> None:
    peft = pefts.prompt(LENGTH)
    with pytest.raises(ValueError, match="prompt cannot be merged"):
        peft.merge(params, peft.init(key, params))


def test_it_chains_with_lora_on_the_same_table(key, tokens) -> None:
    model = Tied()
    params = model.init(key, tokens)["params"]
    lora = pefts.lora(rank=2, targets="wte")
    both = pefts.chain(lora, pefts.prompt(LENGTH))
    state = pefts.randomize(key, both.init(key, params), 0.3)
    logits = pefts.apply(model.apply)({"params": both.bind(params, state)}, tokens)
    merged = lora.merge(params, pefts.PeftState(state.trainable["0"], state.frozen["0"]))
    alone = pefts.prompt(LENGTH)
    bound = alone.bind(merged, pefts.PeftState(state.trainable["1"], state.frozen["1"]))
    np.testing.assert_allclose(
        logits, pefts.apply(model.apply)({"params": bound}, tokens), rtol=1e-5, atol=1e-5
    )


def test_the_file_of_hugging_face_peft_has_our_shape(key) -> None:
    """PEFT's prompt_embeddings (n, d) are P as it stands, without a transposition."""
    file = GOLDEN / "adapter_model.safetensors"
    if not file.exists():
        pytest.skip("../shared/golden/peft/prompt is not on this machine")
    from safetensors.numpy import load_file

    values = load_file(file)["prompt_embeddings"]
    params = {"embed_tokens": {"embedding": jnp.ones((50, values.shape[1]))}}
    state = pefts.prompt(values.shape[0]).init(key, params)
    assert state.trainable["embed_tokens/embedding"]["P"].shape == values.shape == (5, 24)
