"""Attention of a chunk of prompts to pages that take their keys and values in, by Triton on CUDA, else by XLA."""

import functools

import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.ops.launch.calls import register, triton_or_xla
from jmoe.ops.launch.paged import launch_paged
from jmoe.ops.paged.by_xla import attend_to_pages, most_pages, pages_before, rotated_parts, write_tokens
from jmoe.ops.target import Target

paged_prefill_attention_p = jex.core.Primitive("jmoe_paged_prefill_attention")
"""Operands as paged_prefill_attention's, in the order of NAMES. Results: the attended values, and the cache."""

NAMES = (
    "heads", "cosine", "sine", "cache", "layer", "offsets", "first_positions", "pages", "sinks", "sinks_layer",
)  # fmt: skip

paged_prefill_attention_p.multiple_results = True
paged_prefill_attention_p.def_abstract_eval(
    lambda heads, cosine, sine, cache, layer, offsets, first_positions, pages, sinks, *_, **__: [
        heads.update(shape=(heads.shape[0], sinks.shape[1], heads.shape[2])),
        cache,
    ]
)

BLOCK = 64
"""Queries whose scores plain operations hold at once."""


def paged_prefill_attention(
    heads: Float[Array, "T N+2M D"],
    cosine: Float[Array, "T D/2"],
    sine: Float[Array, "T D/2"],
    cache: Float[Array, "L pages M page 2D"],
    layer: Int32[Array, ""],
    offsets: Int32[Array, " S+1"],
    first_positions: Int32[Array, " S"],
    pages: Int32[Array, "S P"],
    sinks: Float[Array, "layers N"],
    sinks_layer: Int32[Array, ""],
    *,
    window: int | None,
    target: Target | None = None,
) -> tuple[Float[Array, "T N D"], Float[Array, "L pages M page 2D"]]:
    """(each token's mean of its sequence's values, weighted by softmax(q k / sqrt(D)) with exp(sink) in the sum; the
    cache).

    The tokens' keys and values go into the pages first. A token sees those of its own sequence up to itself, the ones
    that earlier chunks have put there among them. In a program to which the cache is given up it is written in place.

    Args:
      heads: q, k and v of the tokens of up to S sequences, one sequence after another, not yet rotated.
      cosine, sine: what rotates them, see jmoe.ops.rotary.rotate.
      cache: a key, rotated, and its value behind it; a page holds page_size tokens of one sequence, page 0 nobody's.
      layer: of the cache.
      offsets: sequence s has the rows from offsets[s] to offsets[s + 1], which may be none; offsets[0] is 0. Results of
        rows from offsets[S] on, which belong to no sequence, are zeros.
      first_positions: of each sequence's first token in the chunk.
      pages: of each sequence, that of token p in column p // page_size % P. With a window, P pages hold the chunk and
        the window before it.
      sinks: of each layer a logit for each query head, of a key without value.
      window: keys that a query sees, its own among them; None: all.
      target: a GPU that may not be here, to lower for it; forces Triton.

    Raises:
      NotImplementedError: Triton is to run it, and pages are not a power of two of at least 16 tokens.
    """
    by_sequence = offsets, first_positions, pages
    operands = (heads, cosine, sine, cache, layer.reshape(1), *by_sequence, sinks, sinks_layer.reshape(1))
    by_xla = functools.partial(prefill_by_xla, window=window)

    takes = heads.dtype == jnp.bfloat16
    attended, cache = triton_or_xla(paged_prefill_attention_p, by_xla, operands, target, takes=takes, window=window)
    return attended, cache


def prefill_by_xla(
    heads: Array,
    cosine: Array,
    sine: Array,
    cache: Array,
    layer: Array,
    offsets: Array,
    first_positions: Array,
    pages: Array,
    sinks: Array,
    sinks_layer: Array,
    *,
    window: int | None,
) -> list[Array]:
    """paged_prefill_attention by plain operations, in blocks of queries of one sequence."""
    q, k, v = rotated_parts(heads, cosine, sine, sinks.shape[1])
    tokens, sequences, page_size, columns = len(q), len(pages), cache.shape[3], pages.shape[1]
    rows = jnp.arange(tokens)
    owner = jnp.searchsorted(offsets[1:], rows, side="right").astype(jnp.int32)  # S: nobody's
    own = jnp.minimum(owner, sequences - 1)
    positions = first_positions[own] + rows - offsets[own]
    page = jnp.where(owner < sequences, pages[own, positions // page_size % columns], cache.shape[1])
    cache = write_tokens(cache, layer, page, positions % page_size, k, v)
    block = min(BLOCK, tokens)
    first_block = jnp.cumulative_sum(-(-jnp.diff(offsets) // block), include_initial=True)
    own_sinks = lax.dynamic_index_in_dim(sinks, sinks_layer[0], keepdims=False)
    count = most_pages(block, window, page_size, columns)

    def attend(number: Int32[Array, ""], sequence: Int32[Array, ""]) -> Array:
        within = (number - first_block[sequence]) * block + jnp.arange(block)
        length = offsets[sequence + 1] - offsets[sequence]
        query = (first_positions[sequence] + jnp.minimum(within, length - 1))[:, None]
        found, key = pages_before(query[-1], count, pages[sequence][None], page_size)
        seen = (key >= 0) & (key <= query)
        if window is not None:
            seen &= key > query - window
        queries = q[jnp.minimum(offsets[sequence] + within, tokens - 1)]
        return attend_to_pages(queries[None], cache, layer, found, seen[None], own_sinks)[0]

    def one_block(number: Int32[Array, ""]) -> Array:
        sequence = jnp.searchsorted(first_block[1:], number, side="right").astype(jnp.int32)
        nothing = lambda *_: jnp.zeros((block, *q.shape[1:]), q.dtype)  # noqa: E731
        return lax.cond(sequence < sequences, attend, nothing, number, sequence)

    blocks = lax.map(one_block, jnp.arange(-(-tokens // block) + sequences, dtype=jnp.int32))
    within = rows - offsets[own]
    attended = blocks[first_block[own] + within // block, within % block]
    return [jnp.where((owner < sequences)[:, None, None], attended, 0), cache]


def _launches(*operands: Array, window: int | None, target: Target | None) -> list[Array]:
    buffers = dict(zip(NAMES, operands, strict=True))
    sizes = {"window": window, "sequences": buffers["pages"].shape[0]}
    return launch_paged("paged_prefill_attention", buffers, target, **sizes)


register(paged_prefill_attention_p, _launches)
