"""One transformer layer of gpt-oss as a function of its weights."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.checkpoint import rms_norm
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.rope import rotate
from jmoe.gpt_oss.weights import LayerWeights, Linear, LoraWeights
from jmoe.ops.moe import moe

type Attention[S] = Callable[[Array, Array, Array, Array], tuple[Array, S]]


def linear(
    x: Float[Array, "B T K"],
    weights: Linear,
    name: str = "",
    lora: LoraWeights | None = None,
    adapter_ids: Int32[Array, "B T"] | None = None,
) -> Float[Array, "B T N"]:
    """x weight^T + bias, plus LoRA if there is any on `name`; sums in float32, rounded once to x's dtype."""
    y = product("btk,nk->btn", x, weights.weight) + weights.bias.astype(jnp.float32)
    if lora is not None and name in lora.a:
        a, b, scale = lora.a[name], lora.b[name], lora.scale[name]
        shrunk = product("btk,ark->btar", x, a) * scale[:, None]
        if adapter_ids is not None:
            mine = adapter_ids[..., None] == jnp.arange(a.shape[0])
            # Selected, not multiplied by zero: another adapter may hold NaN.
            shrunk = jnp.where(mine[..., None], shrunk, 0)
        if a.shape[0] == 1 or adapter_ids is None:
            y += product("btr,nr->btn", shrunk[:, :, 0].astype(x.dtype), b[0])
        else:
            expanded = product("btar,anr->btan", shrunk.astype(x.dtype), b)
            y += jnp.sum(jnp.where(mine[..., None], expanded, 0), axis=2)
    return y.astype(x.dtype)


def product(equation: str, x: Array, w: Array) -> Array:
    """An einsum in x's dtype, summed in float32."""
    return jnp.einsum(
        equation, x, w.astype(x.dtype), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def layer[S](
    x: Float[Array, "B T H"],
    weights: LayerWeights,
    lora: LoraWeights | None,
    config: Config,
    *,
    attention: Attention[S],
    rotary: tuple[Float[Array, "B T D/2"], Float[Array, "B T D/2"]],
    adapter_ids: Int32[Array, "B T"] | None,
    index: Int32[Array, ""],
    recompute: bool,
) -> tuple[Float[Array, "B T H"], S]:
    """x after attention and experts, each added to what went in, and what the attention keeps.

    weights, lora: of this layer, but for the experts, which are of all layers; LoRA on experts is of either.
    attention: (q, k, v, sinks) -> (each query's values, what is kept of keys and values), q and k rotated.
    """
    normal = rms_norm(x, weights.attention_norm, config.rms_norm_eps)
    heads = {
        name: linear(normal, getattr(weights, name), name, lora, adapter_ids).reshape(*x.shape[:2], -1, config.head_dim)
        for name in ("q", "k", "v")
    }
    q, k = (rotate(heads[name], *rotary) for name in ("q", "k"))
    attended, kept = attention(q, k, heads["v"], weights.sinks)
    x = x + linear(attended.reshape(*x.shape[:2], -1), weights.o, "o", lora, adapter_ids)
    normal = rms_norm(x, weights.moe_norm, config.rms_norm_eps)
    on_experts = None if lora is None else lora.on_experts
    y = moe(
        normal,
        linear(normal, weights.router),
        weights.experts,
        top_k=config.num_experts_per_tok,
        lora=on_experts,
        adapter_ids=None if on_experts is None else adapter_ids,
        swiglu_alpha=config.swiglu_alpha,
        swiglu_limit=config.swiglu_limit,
        layer=index,
        recompute=recompute,
        backend="xla" if x.dtype == jnp.float32 else None,
    )
    return x + y, kept
