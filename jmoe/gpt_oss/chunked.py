"""Attention of a chunk of prompts to the cache of the chunks before it and to itself."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.attention import BLOCK, attend_to_seen
from jmoe.gpt_oss.cache import slot_positions


def attend_chunk(
    q: Float[Array, "B C N D"],
    k: Float[Array, "B C M D"],
    v: Float[Array, "B C M D"],
    sinks: Float[Array, " N"],
    entries: Float[Array, "L B M S 2D"],
    layer: Int32[Array, ""],
    start: Int32[Array, ""],
    lengths: Int32[Array, " B"],
    *,
    window: int | None,
) -> tuple[Float[Array, "B C N D"], Float[Array, "L B M S 2D"]]:
    """(attention of the prompts' tokens from `start` on, the entries with them).

    Args:
      entries: hold each prompt's tokens before `start`, on windowed layers the last of them.
      lengths: tokens of each prompt; those behind are neither kept nor is their attention of use.
      window: as in jmoe.gpt_oss.attend.
    """
    batch, chunk, heads, dim = q.shape
    key_heads, size = entries.shape[2:4]
    old = lax.dynamic_index_in_dim(entries, layer, keepdims=False)
    new = jnp.swapaxes(jnp.concatenate([k, v], axis=-1), 1, 2).astype(entries.dtype)
    keys, values = jnp.split(jnp.swapaxes(jnp.concatenate([old, new], axis=2), 1, 2), 2, axis=-1)
    before = slot_positions(jnp.minimum(lengths, start) - 1, size)
    own = jnp.broadcast_to(start + jnp.arange(chunk), (batch, chunk))
    key_positions = jnp.concatenate([before, own], axis=1)
    block = min(BLOCK, chunk)
    blocks = -(-chunk // block)
    queries = jnp.pad(q, [(0, 0), (0, blocks * block - chunk), (0, 0), (0, 0)])
    queries = jnp.moveaxis(queries.reshape(batch, blocks, block, key_heads, heads // key_heads, dim), 1, 0)
    sinks = sinks.astype(jnp.float32).reshape(key_heads, -1)

    def one_block(number_and_queries: tuple[Array, Array]) -> Array:
        number, queries = number_and_queries
        query = (start + number * block + jnp.arange(block))[None, :, None]
        key = key_positions[:, None, :]
        seen = (key >= 0) & (key <= query)
        if window is not None:
            seen &= key > query - window
        return attend_to_seen(queries, keys, values, seen, sinks)

    out = lax.map(one_block, (jnp.arange(blocks), queries))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, blocks * block, heads, dim)[:, :chunk]
    updated = extend(old, new, start, lengths)
    return out, lax.dynamic_update_index_in_dim(entries, updated, layer, axis=0)


def extend(
    old: Float[Array, "B M S 2D"], new: Float[Array, "B M C 2D"], start: Int32[Array, ""], lengths: Int32[Array, " B"]
) -> Float[Array, "B M S 2D"]:
    """One layer's entries with the tokens from `start` on, as far as the prompts' lengths go."""
    chunk = new.shape[2]
    place = slot_positions(jnp.minimum(lengths, start + chunk) - 1, old.shape[2]) - start
    there = jnp.clip(place, 0, chunk - 1)[:, None, :, None]
    return jnp.where((place >= 0)[:, None, :, None], jnp.take_along_axis(new, there, axis=2), old)
