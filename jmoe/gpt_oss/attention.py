"""Causal attention with learned sinks and sliding windows, in memory linear in the sequence.

By FlashAttention where it can run, and else by plain XLA, which is here.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jmoe.gpt_oss.flash_attention import SEGMENTS, flash_attend, segments_a_row, why_not

type Implementation = Literal["xla", "flash"] | None

BLOCK = 256
"""Queries whose scores are held at once."""

GROUPS = 8
"""Of queries at most, in full attention. Each is compiled for the keys up to its end; later ones are skipped."""


def attend(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T M D"],
    v: Float[Array, "B T M D"],
    sinks: Float[Array, " N"],
    *,
    window: int | None,
    segment_ids: Int32[Array, "B T"] | None = None,
    implementation: Implementation = None,
    most_segments: int = SEGMENTS,
) -> Float[Array, "B T N D"]:
    """Each query's mean of the values up to its own, weighted by softmax(q k / sqrt(D)) with exp(sink) in the sum.

    Query head n reads key head n // (N / M). Scores and softmax are float32.

    Args:
      sinks: a logit for each query head, of a key without value.
      window: keys that a query sees, its own among them; None: all.
      segment_ids: of sequences packed in a row, one after another; a query sees its own segment alone. None: one
        segment.
      implementation: "xla"; "flash", which takes bfloat16 on a Hopper GPU, and gives NaN for more than most_segments;
        or None: "flash" where it can run and this is lowered for CUDA, but for batches of more segments, "xla"
        elsewhere.
      most_segments: a row, on average.

    Raises:
      NotImplementedError: "flash" cannot run on these arrays or on this machine; the message says what is missing.
      ValueError: another implementation.
    """
    if implementation not in (None, "xla", "flash"):
        raise ValueError(f'implementation must be "xla", "flash" or None, got {implementation!r}')
    by_xla = functools.partial(attend_by_xla, window=window)
    by_flash = functools.partial(flash_attend, window=window, most_segments=most_segments)
    reason = None if implementation == "xla" else why_not((q.dtype, k.dtype, v.dtype), q.shape[-1])
    if implementation == "xla" or (implementation is None and reason is not None):
        return by_xla(q, k, v, sinks, segment_ids=segment_ids)
    if implementation == "flash":
        if reason is not None:
            raise NotImplementedError(f'implementation "flash" of attention cannot run: {reason}')
        return by_flash(q, k, v, sinks, segment_ids=segment_ids)

    def flash_if_segments_fit(*arrays: Array, segment_ids: Array | None) -> Array:
        if segment_ids is None:
            return by_flash(*arrays)
        # Rare, and so not worth the compilation of many groups.
        by_one_group = functools.partial(by_xla, groups=1)
        choices = (functools.partial(by, segment_ids=segment_ids) for by in (by_flash, by_one_group))
        return lax.cond(segments_a_row(segment_ids) <= most_segments, *choices, *arrays)

    return lax.platform_dependent(
        q,
        k,
        v,
        sinks,
        cuda=functools.partial(flash_if_segments_fit, segment_ids=segment_ids),
        default=functools.partial(by_xla, segment_ids=segment_ids),
    )


def attend_by_xla(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B T M D"],
    v: Float[Array, "B T M D"],
    sinks: Float[Array, " N"],
    *,
    window: int | None,
    segment_ids: Int32[Array, "B T"] | None = None,
    groups: int = GROUPS,
) -> Float[Array, "B T N D"]:
    """attend in blocks of queries, of which full attention makes so many groups."""
    batch, length, heads, dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    blocks = -(-length // BLOCK)
    padding = blocks * BLOCK - length
    grouped, k, v, segment_ids = (
        jnp.pad(array, [(0, 0), (0, padding), *([(0, 0)] * (array.ndim - 2))]) for array in (grouped, k, v, segment_ids)
    )
    sinks = sinks.astype(jnp.float32).reshape(k.shape[2], -1)
    through = functools.partial(attend_blocks, sinks=sinks, window=window)
    if window is not None and window - 1 + BLOCK < blocks * BLOCK:
        out = windowed(through, grouped, k, v, segment_ids, window, blocks)
    else:
        out = full(through, grouped, k, v, segment_ids, blocks, groups)
    return out.reshape(batch, blocks * BLOCK, heads, dim)[:, :length]


def windowed(
    through: Callable[..., Array], q: Array, k: Array, v: Array, segment_ids: Array, window: int, blocks: int
) -> Array:
    """Each block of queries with the keys of its own block and of the window before it."""
    before = -(-(window - 1) // 8) * 8  # a round number of keys
    k, v = (jnp.pad(array, [(0, 0), (before, 0), (0, 0), (0, 0)]) for array in (k, v))
    # No query is in the segment before the first key.
    keys_segments = jnp.pad(segment_ids, [(0, 0), (before, 0)], constant_values=-1)

    def one_block(start: Int32[Array, ""]) -> Array:
        keys = [lax.dynamic_slice_in_dim(array, start, before + BLOCK, axis=1) for array in (k, v, keys_segments)]
        return through(
            lax.dynamic_slice_in_dim(q, start, BLOCK, axis=1),
            *keys,
            lax.dynamic_slice_in_dim(segment_ids, start, BLOCK, axis=1),
            start,
            start - before,
        )

    out = lax.map(one_block, jnp.arange(blocks) * BLOCK)
    return jnp.moveaxis(out, 0, 1)


def full(
    through: Callable[..., Array], q: Array, k: Array, v: Array, segment_ids: Array, blocks: int, groups: int
) -> Array:
    """Groups of blocks of queries, each with the keys up to its end."""
    outs = []
    # XLA inlines a map of one step, and would then hold the scores of all groups at once.
    size = max(2, -(-blocks // groups))
    for first in range(0, blocks, size):
        last = min(first + size, blocks)
        end = last * BLOCK
        keys = k[:, :end], v[:, :end], segment_ids[:, :end]

        def one_block(start: Int32[Array, ""], keys: tuple = keys) -> Array:
            queries = lax.dynamic_slice_in_dim(q, start, BLOCK, axis=1)
            segments = lax.dynamic_slice_in_dim(segment_ids, start, BLOCK, axis=1)
            return through(queries, *keys, segments, start, 0)

        outs.append(jnp.moveaxis(lax.map(one_block, jnp.arange(first, last) * BLOCK), 0, 1))
    return jnp.concatenate(outs, axis=1)


@functools.partial(jax.checkpoint, static_argnums=(8,))
def block_of_queries(
    q: Float[Array, "B Q M G D"],
    k: Float[Array, "B S M D"],
    v: Float[Array, "B S M D"],
    key_segments: Int32[Array, "B S"],
    query_segments: Int32[Array, "B Q"],
    query_start: Int32[Array, ""],
    key_start: Int32[Array, ""],
    sinks: Float[Array, "M G"],
    window: int | None,
) -> Float[Array, "B Q M G D"]:
    """The queries from query_start on, with the keys from key_start on; the backward pass computes its scores again."""
    seen = visible(query_segments, key_segments, query_start, key_start, window)
    return attend_to_seen(q, k, v, seen, sinks)


def attend_to_seen(
    q: Float[Array, "B Q M G D"],
    k: Float[Array, "B S M D"],
    v: Float[Array, "B S M D"],
    seen: Bool[Array, "B Q S"],
    sinks: Float[Array, "M G"],
) -> Float[Array, "B Q M G D"]:
    """Each query's mean of the values that it sees, all scores at once."""
    scores = jnp.einsum(
        "bqmgd,bsmd->bmgqs", q, k, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    ) / math.sqrt(q.shape[-1])
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    sink = sinks[None, :, :, None]
    largest = lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1), sink))
    weights = jnp.exp(scores - largest[..., None])
    total = jnp.sum(weights, axis=-1) + jnp.exp(sink - largest)
    weights = (weights / total[..., None]).astype(v.dtype)
    out = jnp.einsum(
        "bmgqs,bsmd->bqmgd", weights, v, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return out.astype(q.dtype)


def attend_blocks(*arrays: Array, sinks: Array, window: int | None) -> Array:
    """block_of_queries with what is the same for all blocks named."""
    return block_of_queries(*arrays, sinks, window)


def visible(
    query_segments: Int32[Array, "B Q"],
    key_segments: Int32[Array, "B S"],
    query_start: Int32[Array, ""],
    key_start: Int32[Array, ""],
    window: int | None,
) -> Bool[Array, "B Q S"]:
    """Which keys a query sees: none after it, none of another segment, none at window or more before it."""
    query = query_start + jnp.arange(query_segments.shape[1])[:, None]
    key = key_start + jnp.arange(key_segments.shape[1])[None, :]
    seen = (key <= query) & (key >= 0)
    if window is not None:
        seen &= key > query - window
    return seen[None] & (query_segments[:, :, None] == key_segments[:, None, :])
