"""Attention of one query a sequence to pages that take its key and value in, by Triton on CUDA, else by XLA."""

import functools

import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.ops.launch.calls import register, triton_or_xla
from jmoe.ops.launch.paged import launch_paged
from jmoe.ops.paged.by_xla import attend_to_pages, most_pages, pages_before, rotated_parts, write_tokens
from jmoe.ops.target import Target

paged_decode_attention_p = jex.core.Primitive("jmoe_paged_decode_attention")
"""Operands as paged_decode_attention's, in the order of NAMES. Results: the attended values, and the cache."""

NAMES = ("heads", "cosine", "sine", "cache", "layer", "position", "pages", "sinks", "sinks_layer")

paged_decode_attention_p.multiple_results = True
paged_decode_attention_p.def_abstract_eval(
    lambda heads, cosine, sine, cache, layer, position, pages, sinks, *_, **__: [
        heads.update(shape=(heads.shape[0], sinks.shape[1], heads.shape[2])),
        cache,
    ]
)


def paged_decode_attention(
    heads: Float[Array, "B N+2M D"],
    cosine: Float[Array, "B D/2"],
    sine: Float[Array, "B D/2"],
    cache: Float[Array, "L pages M page 2D"],
    layer: Int32[Array, ""],
    position: Int32[Array, " B"],
    pages: Int32[Array, "B P"],
    sinks: Float[Array, "layers N"],
    sinks_layer: Int32[Array, ""],
    *,
    window: int | None,
    target: Target | None = None,
) -> tuple[Float[Array, "B N D"], Float[Array, "L pages M page 2D"]]:
    """(each query's mean of its sequence's values, weighted by softmax(q k / sqrt(D)) with exp(sink) in the sum; the
    cache).

    In a program to which the cache is given up it is written in place.

    Args:
      heads: q, k and v of each sequence's latest token, not yet rotated.
      cosine, sine: what rotates them, see jmoe.ops.rotary.rotate.
      cache: a key, rotated, and its value behind it; a page holds page_size tokens of one sequence, page 0 nobody's.
      layer: of the cache.
      position: of the latest token, which is written and, as those of tokens to come, not read; -1: there is no
        sequence, and the result is zeros.
      pages: of each sequence, that of token p in column p // page_size % P.
      sinks: of each layer a logit for each query head, of a key without value.
      window: keys that a query sees, its own among them; None: all.
      target: a GPU that may not be here, to lower for it; forces Triton.

    Raises:
      NotImplementedError: Triton is to run it, and pages are not a power of two of at least 16 tokens.
    """
    operands = (heads, cosine, sine, cache, layer.reshape(1), position, pages, sinks, sinks_layer.reshape(1))
    by_xla = functools.partial(decode_by_xla, window=window)

    takes = heads.dtype == jnp.bfloat16
    attended, cache = triton_or_xla(paged_decode_attention_p, by_xla, operands, target, takes=takes, window=window)
    return attended, cache


def decode_by_xla(
    heads: Array,
    cosine: Array,
    sine: Array,
    cache: Array,
    layer: Array,
    position: Array,
    pages: Array,
    sinks: Array,
    sinks_layer: Array,
    *,
    window: int | None,
) -> list[Array]:
    """paged_decode_attention by plain operations."""
    q, k, v = rotated_parts(heads, cosine, sine, sinks.shape[1])
    page_size, columns = cache.shape[3], pages.shape[1]
    count = most_pages(1, window, page_size, columns)
    found, positions = pages_before(position, count, pages, page_size)
    column = position // page_size % columns
    latest = jnp.take_along_axis(pages, column[:, None], axis=1)[:, 0]
    nowhere = cache.shape[1]
    cache = write_tokens(cache, layer, jnp.where(position < 0, nowhere, latest), position % page_size, k, v)
    seen = (positions >= 0) & (positions <= position[:, None])
    if window is not None:
        seen &= positions > position[:, None] - window
    own = lax.dynamic_index_in_dim(sinks, sinks_layer[0], keepdims=False)
    return [attend_to_pages(q[:, None], cache, layer, found, seen[:, None], own)[:, 0], cache]


def _launches(*operands: Array, window: int | None, target: Target | None) -> list[Array]:
    return launch_paged("paged_decode_attention", dict(zip(NAMES, operands, strict=True)), target, window=window)


register(paged_decode_attention_p, _launches)
