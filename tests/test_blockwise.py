"""The 8-bit codec against numpy in float64 and the library's own codes."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockwise_oracle import almost_the_codes, in_numpy, nbytes, normal
from gradients import near
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pefts.optimizers.blockwise import codebook, dequantize, quantize

GOLDEN = Path(__file__).parents[1] / "../shared/golden/official/adam8bit_codec/golden.npz"


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.exists():
        pytest.skip("the golden vectors of the official code are not beside this repository")
    return np.load(GOLDEN)


def test_the_maps_are_those_of_the_library(golden: Any) -> None:
    near(codebook(True), golden["map_signed"], 6e-8)
    near(codebook(False), golden["map_unsigned"], 6e-8)
    np.testing.assert_allclose(codebook(True), golden["map_signed"], rtol=2e-7)
    np.testing.assert_allclose(codebook(False), golden["map_unsigned"], rtol=2e-7)


@pytest.mark.parametrize("case", ["signed", "unsigned", "signed_neg_absmax", "signed_zero_block"])
def test_the_codes_are_those_of_the_library(case: str, golden: Any) -> None:
    x, block_size = golden[f"{case}__x"], int(golden["blocksize"])
    actual = jax.jit(functools.partial(quantize, signed=case != "unsigned", block_size=block_size))(
        x
    )
    difference = np.abs(actual.codes.astype(int) - golden[f"{case}__q"].astype(int))
    assert difference.max() <= 1 and difference.sum() <= x.size / 1000
    np.testing.assert_array_equal(actual.absmax, golden[f"{case}__absmax"])
    same = difference == 0
    np.testing.assert_allclose(
        np.asarray(dequantize(actual))[same], golden[f"{case}__deq"][same], rtol=3e-7
    )


def test_the_facts_of_the_maps() -> None:
    signed, unsigned = codebook(True), codebook(False)
    assert signed.shape == unsigned.shape == (256,)
    assert signed.dtype == unsigned.dtype == np.float32
    assert np.all(np.diff(signed) > 0) and np.all(np.diff(unsigned) > 0)
    assert (np.sum(signed < 0), np.sum(signed > 0), np.sum(unsigned > 0)) == (127, 128, 255)
    assert signed[127] == unsigned[0] == 0 and signed[-1] == unsigned[-1] == 1
    near(signed[0], -0.99296875, 1e-7)
    np.testing.assert_allclose([signed[128], unsigned[1]], [5.5e-7, 3.25e-7], rtol=1e-6)
    np.testing.assert_array_equal(signed[1:127], -signed[128:254][::-1])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("shape", "stack", "block_size"),
    [
        ((48,), 0, 16),
        ((6, 8), 0, 1),
        ((6, 8), 0, 16),
        ((5, 11), 0, 7),
        ((5, 11), 0, 1000),
        ((4, 32), 0, 16),
        ((3, 5, 7), 1, 16),
        ((2, 6, 16), 1, 16),
    ],
    ids=str,
)
def test_blocks_are_those_of_the_flattened_layer(shape, stack, block_size, signed) -> None:
    x = normal(*shape) if signed else normal(*shape) ** 2
    actual = quantize(x, signed=signed, block_size=block_size, stack=stack)
    assert actual.codes.shape == shape and actual.codes.dtype == jnp.uint8
    assert actual.absmax.dtype == jnp.float32
    layers = math.prod(shape[:stack])
    layer = math.prod(shape[stack:])
    assert nbytes(actual) == layers * (layer + 4 * -(-layer // block_size))
    numbers = np.asarray(dequantize(actual)).reshape(layers, layer)
    scales = np.asarray(actual.absmax).reshape(layers, -1)
    for n, part in enumerate(x.reshape(layers, layer)):
        codes, expected, s = in_numpy(part, signed, block_size)
        almost_the_codes(actual.codes.reshape(layers, layer)[n], codes)
        np.testing.assert_allclose(numbers[n], expected, rtol=3e-7)
        np.testing.assert_array_equal(scales[n], s)


@pytest.mark.parametrize("signed", [True, False])
def test_halfway_is_the_lower_entry_and_the_error_half_a_gap(signed: bool) -> None:
    table = codebook(signed)
    middle = (table[:-1] + table[1:]) / np.float32(2)
    x = np.concatenate([middle, [np.float32(1)]])
    codes = np.asarray(quantize(x, signed=signed).codes)
    np.testing.assert_array_equal(codes[:-1], np.arange(255))
    above = np.concatenate([np.nextafter(middle, np.float32(2)), [np.float32(1)]])
    np.testing.assert_array_equal(quantize(above, signed=signed).codes[:-1], np.arange(1, 256))
    x = np.linspace(-1 if signed else 0, 1, 5001).astype(np.float32)
    after = quantize(x, signed=signed, block_size=len(x))
    gaps = np.diff(table.astype(np.float64))
    half = np.maximum(np.r_[gaps, 0], np.r_[0, gaps])[after.codes] / 2
    inside = x >= table[0]
    assert np.all(np.abs(np.asarray(dequantize(after)) - x)[inside] <= half[inside] + 1e-7)


def test_a_second_round_trip_changes_nothing_unless_the_largest_is_negative() -> None:
    positive = np.abs(normal(40))
    for x, signed in (
        (positive, False),
        (np.where(positive == positive.max(), 1, -1) * positive, True),
    ):
        once = quantize(x, signed=signed, block_size=40)
        twice = quantize(dequantize(once), signed=signed, block_size=40)
        jax.tree.map(np.testing.assert_array_equal, once, twice)
    seen, x = [], jnp.asarray([-5.0, 1.0])
    for _ in range(3):
        x = dequantize(quantize(x))
        seen.append(float(x[0]))
    near(seen, [-5 * 0.99296875**n for n in (1, 2, 3)], 1e-5)


def test_zeros_stay_zero_and_the_scale_may_be_of_any_size() -> None:
    x = normal(4, 16)
    x[1], x[2, ::3], x[:, 0] = 0, 0, 0
    for signed in (True, False):
        after = quantize(np.abs(x), signed=signed, block_size=16)
        numbers = np.asarray(dequantize(after))
        np.testing.assert_array_equal(numbers[np.abs(x) == 0], 0)
        assert float(after.absmax[1, 0]) == 0
        np.testing.assert_array_equal(after.codes[1], 127 if signed else 0)
    for scale in (8e37, 1e-37):
        np.testing.assert_allclose(dequantize(quantize(np.float32([scale, 0]))), [scale, 0])
    assert np.all(np.isfinite(dequantize(quantize(np.float32([1e-45, 1e-42, 0])))))
    np.testing.assert_array_equal(dequantize(quantize(np.float32([-1, 2]), signed=False)), [0, 2])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_takes_its_block_with_it(poison: float, signed: bool) -> None:
    x = np.abs(normal(3, 16))
    x[1, 5] = poison
    after = np.asarray(dequantize(quantize(x, signed=signed, block_size=16)))
    assert not np.any(np.isfinite(after[1])) and np.all(np.isfinite(after[::2]))


def sizes(jaxpr: Any) -> Iterator[int]:
    """Of everything that a program computes."""
    for equation in jaxpr.eqns:
        yield from (math.prod(var.aval.shape) for var in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_no_table_of_distances_is_made() -> None:
    x = jnp.zeros((8, 1024))
    jaxpr = jax.make_jaxpr(lambda x: dequantize(quantize(x)))(x).jaxpr
    assert x.size <= max(sizes(jaxpr)) <= 2 * x.size
    ragged = jax.make_jaxpr(lambda x: dequantize(quantize(x)))(jnp.zeros((7, 1001))).jaxpr
    assert max(sizes(ragged)) <= 2 * 7168


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("block_size=0: give", {"block_size": 0}),
        ("block_size=2.0: give", {"block_size": 2.0}),
        ("stack=3: x has 2 axes", {"stack": 3}),
        ("stack=-1: x has 2 axes", {"stack": -1}),
    ],
)
def test_the_codec_refuses(message: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(jnp.ones((2, 3)), **arguments)
    with pytest.raises(ValueError, match="x is int32: give floating-point numbers"):
        quantize(jnp.ones(3, jnp.int32))


def test_a_shard_by_itself_has_the_same_blocks() -> None:
    x = jnp.asarray(normal(8, 32))
    one = Mesh(np.array(jax.devices()), ("data",))
    spec = P("data", None)
    codes, absmax = jax.shard_map(
        lambda part: jax.tree.leaves(quantize(part, block_size=16)), mesh=one, in_specs=spec,
        out_specs=[spec, spec],
    )(x)  # fmt: skip
    expected = quantize(x, block_size=16)
    np.testing.assert_array_equal(codes, expected.codes)
    np.testing.assert_array_equal(absmax, expected.absmax)
