"""Rotary positions with YaRN's stretching (arXiv 2309.00071)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " D/2"]:
    """Radians a position, float64: slow dimensions are stretched by the factor, fast ones are not."""
    fast = rope.rope_theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if rope.factor == 1.0:
        return fast

    def dimension(turns: float) -> float:
        """The one that turns so often over the original length."""
        length = rope.original_max_position_embeddings
        return head_dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    slow = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return fast / rope.factor * slow + fast * (1 - slow)


def scale(rope: Rope) -> float:
    """What multiplies cosine and sine, and so attention's logits by its square."""
    return 0.1 * math.log(rope.factor) + 1


def cosine_and_sine(
    rope: Rope, head_dim: int, positions: Int32[Array, "B T"]
) -> tuple[Float[Array, "B T D/2"], Float[Array, "B T D/2"]]:
    """float32 factors of rotate at these positions."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inverse_frequencies(rope, head_dim), jnp.float32)
    return jnp.cos(angles) * scale(rope), jnp.sin(angles) * scale(rope)


def rotate(
    x: Float[Array, "B T N D"], cosine: Float[Array, "B T D/2"], sine: Float[Array, "B T D/2"]
) -> Float[Array, "B T N D"]:
    """x with its first and second halves turned against each other."""
    first, second = jnp.split(x, 2, axis=-1)
    cosine, sine = (factor[:, :, None, :].astype(x.dtype) for factor in (cosine, sine))
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
