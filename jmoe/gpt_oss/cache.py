"""Keys and values of the tokens so far: all of them on full layers, a ring of the window's on sliding ones."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.config import Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Of one layer, or with a leading axis of several; a pytree. Token p of a sequence stands at slot p % S."""

    keys: Float[Array, "... B S M D"]
    values: Float[Array, "... B S M D"]


def slots(window: int | None, capacity: int) -> int:
    """S of a layer."""
    return capacity if window is None else min(window, capacity)


def cache_bytes(config: Config, batch: int, capacity: int) -> int:
    """Bytes in bfloat16 of the cache of all layers."""
    tokens = sum(slots(window, capacity) for window in config.windows)
    return 2 * 2 * batch * tokens * config.num_key_value_heads * config.head_dim


def fill(
    keys: Float[Array, "B T M D"],
    values: Float[Array, "B T M D"],
    lengths: Int32[Array, " B"],
    window: int | None,
    capacity: int,
) -> LayerCache:
    """The cache after prompts of these lengths, padded at their ends to T."""
    size = slots(window, capacity)
    position = held_positions(lengths - 1, size)
    there = jnp.clip(position, 0, keys.shape[1] - 1)[:, :, None, None]
    return LayerCache(*(jnp.take_along_axis(array, there, axis=1) for array in (keys, values)))


def held_positions(last: Int32[Array, " B"], size: int) -> Int32[Array, "B S"]:
    """The token at each slot once token `last` is in; negative where there is none yet."""
    return last[:, None] - (last[:, None] - jnp.arange(size)[None, :]) % size


def attend_cached(
    q: Float[Array, "B 1 N D"],
    k: Float[Array, "B 1 M D"],
    v: Float[Array, "B 1 M D"],
    sinks: Float[Array, " N"],
    cache: LayerCache,
    position: Int32[Array, " B"],
) -> tuple[Float[Array, "B 1 N D"], LayerCache]:
    """(attention of each sequence's token at `position` to those before it and itself, the cache with it)."""
    batch, _, heads, dim = q.shape
    size, key_heads = cache.keys.shape[1:3]
    rows = jnp.arange(batch)
    keys = cache.keys.at[rows, position % size].set(k[:, 0])
    values = cache.values.at[rows, position % size].set(v[:, 0])
    grouped = q.reshape(batch, key_heads, heads // key_heads, dim)
    scores = jnp.einsum(
        "bmgd,bsmd->bmgs", grouped, keys, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    ) / math.sqrt(dim)
    # A ring holds no token that has left the window.
    seen = held_positions(position, size) >= 0
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    sink = sinks.astype(jnp.float32).reshape(1, key_heads, -1)
    largest = jnp.maximum(jnp.max(scores, axis=-1), sink)
    weights = jnp.exp(scores - largest[..., None])
    weights = weights / (jnp.sum(weights, axis=-1) + jnp.exp(sink - largest))[..., None]
    out = jnp.einsum(
        "bmgs,bsmd->bmgd",
        weights.astype(values.dtype),
        values,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return out.astype(q.dtype).reshape(q.shape), LayerCache(keys, values)
