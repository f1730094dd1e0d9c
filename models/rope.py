"""Rotary positions (Su et al., arXiv 2104.09864) with every scaling that config.json can name.

    angle_j(t) = t f_j,  f_j = theta^(-2j/H),  j = 0 .. H/2 - 1

turns the pair (x_j, x_{j + H/2}) of a head: the two halves of a head are the two coordinates, as in
transformers. A scaling changes the frequencies f, so that a model reaches beyond the positions of
its pretraining, and with YaRN and LongRoPE the length of the turned vectors too.

Shape legend: B batch, T tokens, N heads, H head size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_ALIASES = {"su": "longrope", None: "default"}


@dataclass(frozen=True)
class Rope:
    """One set of rotary frequencies.

    Fields beside `theta` and `kind` are those of the scaling in config.json, under its names there;
    a kind reads what it needs. `max_positions` is the longest sequence of pretraining.

    Raises:
      ValueError: unknown kind, a field that it needs is absent, or theta is not positive.
    """

    max_positions: int
    theta: float = 10_000.0
    kind: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in NEEDED:
            raise ValueError(f"rope_type={self.kind!r} is not supported; one of {sorted(NEEDED)}")
        absent = [name for name in NEEDED[self.kind] if getattr(self, name) is None]
        if absent:
            raise ValueError(f"rope_type={self.kind!r} needs {', '.join(absent)} in config.json")
        if self.theta <= 0:
            raise ValueError(f"rope_theta={self.theta} must be positive")

    @property
    def trained_positions(self) -> int:
        """Positions of pretraining, before the scaling."""
        return self.original_max_position_embeddings or self.max_positions

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any], theta: float, max_positions: int) -> "Rope":
        """Reads `rope_parameters` (or the older `rope_scaling`) of a config.json.

        Args:
          parameters: that section; unknown fields are refused.
          theta: the base, where the section has no rope_theta.
          max_positions: max_position_embeddings.

        Raises:
          ValueError: an unknown kind or field, or one that the kind needs is absent.
        """
        fields = {name: _hashable(value) for name, value in parameters.items() if value is not None}
        kind = fields.pop("rope_type", fields.pop("type", None))
        fields.pop("type", None)
        theta = fields.pop("rope_theta", theta)
        if fields.pop("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor is not supported: all of a head is turned here")
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"rope scaling has fields that are not supported: {unknown}")
        return cls(max_positions, float(theta), _ALIASES.get(kind, str(kind)), **fields)

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` of a config.json."""
        fields = {"rope_type": self.kind, "rope_theta": self.theta}
        for name, field in self.__dataclass_fields__.items():
            value = getattr(self, name)
            if name not in ("max_positions", "theta", "kind") and value != field.default:
                fields[name] = list(value) if isinstance(value, tuple) else value
        return fields


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def table(rope: Rope, head_dim: int, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every angle, (B, T, H/2) each, in float32.

    >>> cos, sin = table(Rope(16), 4, jnp.arange(3)[None])
    >>> cos.shape
    (1, 3, 2)
    """
    f_J, length = _FREQUENCIES[rope.kind](rope, head_dim, positions_BxT)
    angles = positions_BxT.astype(jnp.float32)[:, :, None] * f_J[None, None]
    return jnp.cos(angles) * length, jnp.sin(angles) * length


def rotate(x_BxTxNxH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns every head of x by the angles of its position; float32 inside, x's dtype outside."""
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxTxNxH.dtype)


def _powers(theta: Any, head_dim: int) -> Any:
    """theta^(2j/H)."""
    return theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))


def _default(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[Any, float]:
    del positions
    return np.float32(1) / _powers(np.float32(rope.theta), head_dim), 1.0


def _linear(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[Any, float]:
    f_J, length = _default(rope, head_dim, positions)
    return f_J / np.float32(rope.factor), length


def _dynamic(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[Any, float]:
    """The base grows with the longest sequence of the batch, once that passes pretraining's."""
    seen = jnp.maximum(jnp.max(positions) + 1, rope.max_positions).astype(jnp.float32)
    factor = rope.factor or 1.0
    growth = factor * seen / rope.max_positions - (factor - 1)
    return 1.0 / _powers(rope.theta * growth ** (head_dim / (head_dim - 2)), head_dim), 1.0


def _longrope(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[Any, float]:
    """One factor for each frequency: a set for short sequences and one for long ones."""
    trained = rope.trained_positions
    is_long = jnp.max(positions) + 1 > trained
    factors = jnp.where(
        is_long,
        np.asarray(rope.long_factor, np.float32),
        np.asarray(rope.short_factor, np.float32),
    )
    if factors.shape != (head_dim // 2,):
        raise ValueError(f"long_factor and short_factor need head_dim / 2 = {head_dim // 2} values")
    factor = rope.factor or rope.max_positions / trained
    length = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    length = length if rope.attention_factor is None else rope.attention_factor
    return 1.0 / (factors * _powers(np.float32(rope.theta), head_dim)), length


def _llama3(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[Any, float]:
    """Waves longer than the pretraining's context / low are stretched, short ones stay."""
    f_J, length = _default(rope, head_dim, positions)
    low, high, factor = rope.low_freq_factor, rope.high_freq_factor, rope.factor
    assert low is not None and high is not None and factor is not None
    turns = rope.trained_positions * f_J / np.float32(2 * math.pi)  # within that context
    smooth = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
    return (1 - smooth) * f_J / np.float32(factor) + smooth * f_J, length


def _yarn(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[Any, float]:
    """YaRN (arXiv 2309.00071): fast waves stay, slow ones are stretched, a ramp lies between."""
    del positions
    factor, powers = rope.factor or 1.0, _powers(np.float32(rope.theta), head_dim)

    def dimension(turns: float) -> float:
        """The index of the wave that makes so many turns within pretraining's context."""
        wave = rope.trained_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low or 0.001)
    stretched = np.clip(ramp, 0, 1).astype(np.float32)
    f_J = stretched / (np.float32(factor) * powers) + (1 - stretched) / powers
    return f_J, _yarn_length(rope, factor)


def _yarn_length(rope: Rope, factor: float) -> float:
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return grown(rope.mscale) / grown(rope.mscale_all_dim)
    return grown(1.0)


_FREQUENCIES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
