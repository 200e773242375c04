"""What attention to pages by plain operations has in common for one query a sequence and for many."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jmoe.ops.rotary import rotate


def write_tokens(
    cache: Float[Array, "L pages M page 2D"],
    layer: Int32[Array, "1"],
    pages: Int32[Array, " T"],
    slots: Int32[Array, " T"],
    keys: Float[Array, "T M D"],
    values: Float[Array, "T M D"],
) -> Float[Array, "L pages M page 2D"]:
    """The cache with each token's key and value; those whose page there is not are left out."""
    both = jnp.concatenate([keys, values], axis=-1).astype(cache.dtype)
    # The layer is an index like the others: a slice of it would be copied out and back.
    return cache.at[layer[0], pages, :, slots].set(both, mode="drop")


def rotated_parts(
    heads: Float[Array, "T N+2M D"], cosine: Float[Array, "T D/2"], sine: Float[Array, "T D/2"], queries: int
) -> tuple[Float[Array, "T N D"], Float[Array, "T M D"], Float[Array, "T M D"]]:
    """(q, k, v), q and k rotated."""
    keys = (heads.shape[1] - queries) // 2
    q, k, v = jnp.split(heads, (queries, queries + keys), axis=1)
    q, k = (rotate(part[:, None], cosine[:, None], sine[:, None])[:, 0] for part in (q, k))
    return q, k, v


def attend_to_pages(
    q: Float[Array, "B Q N D"],
    cache: Float[Array, "L pages M page 2D"],
    layer: Int32[Array, "1"],
    pages: Int32[Array, "B C"],
    seen: Bool[Array, "B Q C*page"],
    sinks: Float[Array, " N"],
) -> Float[Array, "B Q N D"]:
    """Each query's mean of the values that it sees in its C pages; zeros where it sees none.

    What no query sees may be NaN. Scores and softmax are float32.
    """
    batch, queries, heads, dim = q.shape
    key_heads = cache.shape[2]
    entries = jnp.swapaxes(cache[layer[0], pages], 2, 3).reshape(batch, -1, key_heads, 2 * dim)
    entries = jnp.where(seen.any(axis=1)[:, :, None, None], entries, 0)
    keys, values = jnp.split(entries, 2, axis=-1)
    grouped = q.reshape(batch, queries, key_heads, heads // key_heads, dim)
    scores = jnp.einsum(
        "bqmgd,bsmd->bmgqs", grouped, keys, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    ) / math.sqrt(dim)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    sink = sinks.astype(jnp.float32).reshape(1, key_heads, -1, 1)
    largest = jnp.maximum(jnp.max(scores, axis=-1), sink)
    weights = jnp.exp(scores - largest[..., None])
    weights = weights / (jnp.sum(weights, axis=-1) + jnp.exp(sink - largest))[..., None]
    out = jnp.einsum(
        "bmgqs,bsmd->bqmgd",
        weights.astype(values.dtype),
        values,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    out = out.astype(q.dtype).reshape(q.shape)
    return jnp.where(seen.any(axis=2)[:, :, None, None], out, 0)


def most_pages(queries: int, window: int | None, page_size: int, columns: int) -> int:
    """How many pages consecutive queries of a sequence can see, whose table has so many columns."""
    return columns if window is None else min((queries + window - 3) // page_size + 2, columns)


def pages_before(
    last: Int32[Array, " B"], count: int, pages: Int32[Array, "B P"], page_size: int
) -> tuple[Int32[Array, "B C"], Int32[Array, "B C*page"]]:
    """(the pages of tables in which token `last` and those before it lie, the tokens' positions), so many pages.

    Positions of tokens that there are not are negative.
    """
    columns = pages.shape[1]
    # With as many pages as columns the first column's come first, and so the shortest sums are of the same terms.
    logical = last[:, None] // page_size - jnp.arange(count)[::-1]
    if count == columns:
        logical = last[:, None] // page_size - (last[:, None] // page_size - jnp.arange(columns)) % columns
    found = jnp.take_along_axis(pages, logical % columns, axis=1)
    positions = logical[:, :, None] * page_size + jnp.arange(page_size)
    return found, positions.reshape(len(last), -1)
