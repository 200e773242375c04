"""Keys and values of the tokens so far: all of them on full layers, a ring of the window's on sliding ones."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.config import Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Of layers with the same window, the first axis; a pytree. Token p of a sequence stands at slot p % S."""

    keys: Float[Array, "L B M S D"]
    values: Float[Array, "L B M S D"]


def slots(window: int | None, capacity: int) -> int:
    """S of a layer."""
    return capacity if window is None else min(window, capacity)


def cache_bytes(config: Config, batch: int, capacity: int) -> int:
    """Bytes in bfloat16 of the cache of all layers."""
    tokens = sum(slots(window, capacity) for window in config.windows)
    return 2 * 2 * batch * tokens * config.num_key_value_heads * config.head_dim


def empty_cache(config: Config, period: int, batch: int, capacity: int, dtype: DTypeLike) -> tuple[LayerCache, ...]:
    """Zeros for each of the `period` layers of a group, of all groups."""
    groups = config.num_hidden_layers // period

    def zeros(window: int | None) -> Array:
        size = slots(window, capacity)
        return jnp.zeros((groups, batch, config.num_key_value_heads, size, config.head_dim), dtype)

    return tuple(LayerCache(zeros(window), zeros(window)) for window in config.windows[:period])


def fill(
    cache: LayerCache,
    layer: Int32[Array, ""],
    keys: Float[Array, "B T M D"],
    values: Float[Array, "B T M D"],
    lengths: Int32[Array, " B"],
) -> LayerCache:
    """The cache with one layer's prompts of these lengths, padded at their ends to T."""
    position = held_positions(lengths - 1, cache.keys.shape[3])
    there = jnp.clip(position, 0, keys.shape[1] - 1)[:, None, :, None]

    def put(stack: Array, array: Array) -> Array:
        held = jnp.take_along_axis(jnp.swapaxes(array, 1, 2), there, axis=2)
        return lax.dynamic_update_index_in_dim(stack, held.astype(stack.dtype), layer, axis=0)

    return LayerCache(put(cache.keys, keys), put(cache.values, values))


def held_positions(last: Int32[Array, " B"], size: int) -> Int32[Array, "B S"]:
    """The token at each slot once token `last` is in; negative where there is none yet."""
    return last[:, None] - (last[:, None] - jnp.arange(size)[None, :]) % size


def attend_cached(
    q: Float[Array, "B 1 N D"],
    k: Float[Array, "B 1 M D"],
    v: Float[Array, "B 1 M D"],
    sinks: Float[Array, " N"],
    cache: LayerCache,
    layer: Int32[Array, ""],
    position: Int32[Array, " B"],
) -> tuple[Float[Array, "B 1 N D"], LayerCache]:
    """(attention of each sequence's token at `position` to those before it and itself, the cache with it)."""
    batch, _, heads, dim = q.shape
    key_heads, size = cache.keys.shape[2:4]
    rows = jnp.arange(batch)
    new = LayerCache(
        cache.keys.at[layer, rows, :, position % size].set(k[:, 0]),
        cache.values.at[layer, rows, :, position % size].set(v[:, 0]),
    )
    keys, values = (lax.dynamic_index_in_dim(array, layer, keepdims=False) for array in (new.keys, new.values))
    grouped = q.reshape(batch, key_heads, heads // key_heads, dim)
    scores = jnp.einsum(
        "bmgd,bmsd->bmgs", grouped, keys, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    ) / math.sqrt(dim)
    # A ring holds no token that has left the window.
    seen = held_positions(position, size) >= 0
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    sink = sinks.astype(jnp.float32).reshape(1, key_heads, -1)
    largest = jnp.maximum(jnp.max(scores, axis=-1), sink)
    weights = jnp.exp(scores - largest[..., None])
    weights = weights / (jnp.sum(weights, axis=-1) + jnp.exp(sink - largest))[..., None]
    out = jnp.einsum(
        "bmgs,bmsd->bmgd",
        weights.astype(values.dtype),
        values,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return out.astype(q.dtype).reshape(q.shape), new
