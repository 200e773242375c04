"""Keys and values of the tokens so far: all of them on full layers, a ring of the window's on sliding ones."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.rope import Heads
from jmoe.ops.decode.cached_attention import cached_attention

type Cache = tuple[Float[Array, "L B M S 2D"], ...]
"""For each layer of a group the entries of all groups, a key, rotated, and its value behind it.

Token p of a sequence stands at slot p % S.
"""


def slots(window: int | None, capacity: int) -> int:
    """S of a layer."""
    return capacity if window is None else min(window, capacity)


def cache_bytes(config: Config, batch: int, capacity: int) -> int:
    """Bytes in bfloat16 of the cache of all layers."""
    tokens = sum(slots(window, capacity) for window in config.windows)
    return 2 * 2 * batch * tokens * config.num_key_value_heads * config.head_dim


def empty_cache(config: Config, period: int, batch: int, capacity: int, dtype: DTypeLike) -> Cache:
    """Zeros for each of the `period` layers of a group."""
    groups = config.num_hidden_layers // period
    sizes = (slots(window, capacity) for window in config.windows[:period])
    return tuple(
        jnp.zeros((groups, batch, config.num_key_value_heads, size, 2 * config.head_dim), dtype) for size in sizes
    )


def fill(
    entries: Float[Array, "L B M S 2D"],
    layer: Int32[Array, ""],
    keys: Float[Array, "B T M D"],
    values: Float[Array, "B T M D"],
    lengths: Int32[Array, " B"],
) -> Float[Array, "L B M S 2D"]:
    """The entries with one layer's prompts of these lengths, padded at their ends to T."""
    position = slot_positions(lengths - 1, entries.shape[3])
    there = jnp.clip(position, 0, keys.shape[1] - 1)[:, None, :, None]
    both = jnp.swapaxes(jnp.concatenate([keys, values], axis=-1), 1, 2)
    updated = jnp.take_along_axis(both, there, axis=2).astype(entries.dtype)
    return lax.dynamic_update_index_in_dim(entries, updated, layer, axis=0)


def slot_positions(last: Int32[Array, " B"], size: int) -> Int32[Array, "B S"]:
    """The token at each slot once token `last` is in; negative where there is none yet."""
    return last[:, None] - (last[:, None] - jnp.arange(size)[None, :]) % size


def attend_cached(
    heads: Heads,
    sinks: Float[Array, "layers N"],
    sinks_layer: Int32[Array, ""],
    entries: Float[Array, "L B M S 2D"],
    layer: Int32[Array, ""],
    position: Int32[Array, " B"],
) -> tuple[Float[Array, "B 1 N D"], Float[Array, "L B M S 2D"]]:
    """(attention of each sequence's token at `position` to those before it and itself, the entries with it)."""
    qkv, cosine, sine = (array[:, 0] for array in (heads.qkv, heads.cosine, heads.sine))
    attended, entries = cached_attention(qkv, cosine, sine, entries, layer, position, sinks, sinks_layer)
    return attended[:, None], entries
