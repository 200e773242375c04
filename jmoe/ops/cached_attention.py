"""Attention of one query a sequence to a cache, by Triton on CUDA and by XLA elsewhere."""

import math
from typing import Any

import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.ops.launch import decoding_plans, launch, local_capability, register

cached_attention_p = jex.core.Primitive("jmoe_cached_attention")
"""Operands as cached_attention's. Result: like q."""

cached_attention_p.def_abstract_eval(lambda q, *_, **__: q)


def cached_attention(
    q: Float[Array, "B N D"],
    cache: Float[Array, "L B M S 2D"],
    sinks: Float[Array, " N"],
    layer: Int32[Array, ""],
    position: Int32[Array, " B"],
    *,
    capability: int | None = None,
) -> Float[Array, "B N D"]:
    """Each query's mean of a layer's values, weighted by softmax(q k / sqrt(D)) with exp(sink) in the sum.

    Args:
      cache: a key, rotated, and its value behind it. Slot j holds a token if j <= position, and all do once a ring of S
        slots has gone round.
      sinks: a logit for each query head, of a key without value.
      position: of the latest token, which is in the cache.
      capability: compute capability * 10 of a GPU that is not here, to lower for it; forces Triton.
    """
    operands = (q, cache, sinks, layer.reshape(1), position)

    def triton(*operands: Array) -> Array:
        return cached_attention_p.bind(*operands, capability=capability)

    if capability is not None:
        return triton(*operands)
    if q.dtype != jnp.bfloat16:
        return attend_by_xla(*operands)
    return lax.platform_dependent(*operands, cuda=triton, default=attend_by_xla)


def attend_by_xla(q: Array, cache: Array, sinks: Array, layer: Array, position: Array) -> Array:
    """cached_attention by plain operations."""
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


def _launches(*operands: Array, capability: int | None) -> Array:
    names = ("q", "cache", "sinks", "layer", "position")
    buffers: dict[str, Any] = dict(zip(names, operands, strict=True))
    batch, heads, dim = buffers["q"].shape
    key_heads, slots = buffers["cache"].shape[2:4]
    plans = decoding_plans("cached_attention", batch=batch, heads=heads, key_heads=key_heads, slots=slots, head_dim=dim)
    capability = local_capability() if capability is None else capability
    return launch(plans, buffers, capability)["attended"]


register(cached_attention_p, _launches)
