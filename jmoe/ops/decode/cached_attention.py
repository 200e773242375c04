"""Attention of one query a sequence to a cache that takes its key and value in, by Triton on CUDA, else by XLA."""

import math

import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.ops.launch.calls import register, triton_or_xla
from jmoe.ops.launch.decode import launch_decode
from jmoe.ops.rotary import rotate
from jmoe.ops.target import Target

cached_attention_p = jex.core.Primitive("jmoe_cached_attention")
"""Operands as cached_attention's, in the order of NAMES. Results: the attended values, and the cache."""

NAMES = ("heads", "cosine", "sine", "cache", "layer", "position", "sinks", "sinks_layer")

cached_attention_p.multiple_results = True
cached_attention_p.def_abstract_eval(
    lambda heads, cosine, sine, cache, layer, position, sinks, *_, **__: [
        heads.update(shape=(heads.shape[0], sinks.shape[1], heads.shape[2])),
        cache,
    ]
)


def cached_attention(
    heads: Float[Array, "B N+2M D"],
    cosine: Float[Array, "B D/2"],
    sine: Float[Array, "B D/2"],
    cache: Float[Array, "L B M S 2D"],
    layer: Int32[Array, ""],
    position: Int32[Array, " B"],
    sinks: Float[Array, "layers N"],
    sinks_layer: Int32[Array, ""],
    *,
    target: Target | None = None,
) -> tuple[Float[Array, "B N D"], Float[Array, "L B M S 2D"]]:
    """(each query's mean of a layer's values, weighted by softmax(q k / sqrt(D)) with exp(sink) in the sum; the cache).

    In a program to which the cache is given up it is written in place.

    Args:
      heads: q, k and v of each sequence's latest token, not yet rotated.
      cosine, sine: what rotates them, see jmoe.ops.rotary.rotate.
      cache: a key, rotated, and its value behind it; token p stands at slot p % S.
      layer: of the cache.
      position: of the latest token, whose slot is written and, as those of tokens to come, not read.
      sinks: of each layer a logit for each query head, of a key without value.
      target: a GPU that may not be here, to lower for it; forces Triton.
    """
    operands = (heads, cosine, sine, cache, layer.reshape(1), position, sinks, sinks_layer.reshape(1))

    takes = heads.dtype == jnp.bfloat16
    attended, cache = triton_or_xla(cached_attention_p, keep_and_attend_by_xla, operands, target, takes=takes)
    return attended, cache


def keep_and_attend_by_xla(
    heads: Array,
    cosine: Array,
    sine: Array,
    cache: Array,
    layer: Array,
    position: Array,
    sinks: Array,
    sinks_layer: Array,
) -> list[Array]:
    """cached_attention by plain operations."""
    queries, keys = sinks.shape[1], cache.shape[2]
    q, k, v = jnp.split(heads[:, None], (queries, queries + keys), axis=2)
    q, k = (rotate(part, cosine[:, None], sine[:, None]) for part in (q, k))
    both = jnp.concatenate([k, v], axis=-1)[:, 0].astype(cache.dtype)
    # The layer is an index like the others: a slice of it would be copied out and back.
    slots = position % cache.shape[3]
    cache = cache.at[layer[0], jnp.arange(heads.shape[0]), :, slots].set(both, unique_indices=True)
    own = lax.dynamic_index_in_dim(sinks, sinks_layer[0], keepdims=False)
    return [attend_by_xla(q[:, 0], cache, own, layer, position), cache]


def attend_by_xla(q: Array, cache: Array, sinks: Array, layer: Array, position: Array) -> Array:
    """Attention to a cache that holds the latest token: q [B, N, D] rotated, sinks [N], layer [1]."""
    batch, heads, dim = q.shape
    key_heads, size = cache.shape[2:4]
    keys, values = jnp.split(lax.dynamic_index_in_dim(cache, layer[0], keepdims=False), 2, axis=-1)
    grouped = q.reshape(batch, key_heads, heads // key_heads, dim)
    scores = jnp.einsum(
        "bmgd,bmsd->bmgs", grouped, keys, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    ) / math.sqrt(dim)
    held = jnp.arange(size) <= position[:, None]
    scores = jnp.where(held[:, None, None], scores, -jnp.inf)
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
    return out.astype(q.dtype).reshape(q.shape)


def _launches(*operands: Array, target: Target | None) -> list[Array]:
    buffers = dict(zip(NAMES, operands, strict=True))
    key_heads, slots = buffers["cache"].shape[2:4]
    batch, _, dim = buffers["heads"].shape
    heads = buffers["sinks"].shape[1]
    sizes = {"rows": batch, "heads": heads, "key_heads": key_heads, "slots": slots, "head_dim": dim}
    written = launch_decode("cached_attention", buffers, target, **sizes)
    return [written["attended"], written["cache"]]


register(cached_attention_p, _launches)
