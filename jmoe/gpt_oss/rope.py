"""Rotary positions with YaRN's stretching (arXiv 2309.00071)."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.rope_settings import Rope
from jmoe.ops.rotary import rotate


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
    return 0.1 * math.log(max(rope.factor, 1)) + 1


def cosine_and_sine(
    rope: Rope, head_dim: int, positions: Int32[Array, "B T"]
) -> tuple[Float[Array, "B T D/2"], Float[Array, "B T D/2"]]:
    """float32 factors of jmoe.ops.rotary.rotate at these positions."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inverse_frequencies(rope, head_dim), jnp.float32)
    return jnp.cos(angles) * scale(rope), jnp.sin(angles) * scale(rope)


class Heads(NamedTuple):
    """q, k and v of tokens, not yet rotated, and what rotates them.

    qkv: q's heads, then k's, then v's; queries: how many are q's.
    cosine, sine: float32, see cosine_and_sine.
    """

    qkv: Float[Array, "B T N+2M D"]
    queries: int
    cosine: Float[Array, "B T D/2"]
    sine: Float[Array, "B T D/2"]

    def rotated(self) -> tuple[Float[Array, "B T N D"], Float[Array, "B T M D"], Float[Array, "B T M D"]]:
        """(q, k, v), q and k rotated."""
        keys = (self.qkv.shape[2] - self.queries) // 2
        q, k, v = jnp.split(self.qkv, (self.queries, self.queries + keys), axis=2)
        return rotate(q, self.cosine, self.sine), rotate(k, self.cosine, self.sine), v
