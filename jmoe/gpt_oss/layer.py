"""One transformer layer of gpt-oss as a function of its weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.attention_lora import AttentionLora, Factors
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.lora_dropout import LoraDropout, shrink_dropped
from jmoe.gpt_oss.products import linear_and_expand, product
from jmoe.gpt_oss.rope import Heads
from jmoe.gpt_oss.weights import LayerWeights, Linear
from jmoe.ops.experts import Experts, Lora
from jmoe.ops.moe import moe
from jmoe.ops.norm import rms_norm

type Attention[S] = Callable[[Heads, Array], tuple[Array, S]]


def linear(
    x: Float[Array, "B T K"],
    weights: Linear,
    lora: Factors | None = None,
    adapter_ids: Int32[Array, "B T"] | None = None,
    dropout: LoraDropout | None = None,
) -> Float[Array, "B T N"]:
    """x weight^T + bias, plus LoRA; sums in float32, rounded once to x's dtype.

    dropout: of LoRA's inputs, where adapter_ids are None.
    """
    if lora is not None and adapter_ids is None:
        shrunk = shrink(x, lora.a[0], lora.scale[0]) if dropout is None else shrink_dropped(x, lora, dropout)
        return linear_and_expand(x, weights.weight, weights.bias, shrunk, lora.b[0])
    y = product("btk,nk->btn", x, weights.weight) + weights.bias.astype(jnp.float32)
    if lora is not None:
        y += delta(x, lora, adapter_ids)
    return y.astype(x.dtype)


def shrink(x: Float[Array, "B T K"], a: Float[Array, "R K"], scale: Float[Array, " R"]) -> Float[Array, "B T R"]:
    """LoRA's first half, rounded to x's dtype."""
    return (product("btk,rk->btr", x, a) * scale).astype(x.dtype)


def delta(x: Float[Array, "B T K"], lora: Factors, adapter_ids: Int32[Array, "B T"] | None) -> Float[Array, "B T N"]:
    """What each token's own adapter adds, in float32."""

    def of_one(a: Array, scale: Array, b: Array) -> Array:
        return product("btr,nr->btn", shrink(x, a, scale), b)

    if adapter_ids is None:
        return of_one(lora.a[0], lora.scale[0], lora.b[0])

    def add(total: Array, adapter: tuple[Array, Factors]) -> tuple[Array, None]:
        index, own = adapter
        # Selected, not multiplied by zero: another adapter may hold NaN. Unused, it is zero for gradients' sake.
        mine = (adapter_ids == index)[..., None]
        own = jax.tree.map(lambda factor: jnp.where(mine.any(), factor, 0), own)
        return jnp.where(mine, of_one(own.a, own.scale, own.b), total), None

    # One after another, so that one adapter's [B, T, N] is held at a time.
    count = lora.a.shape[0]
    nothing = jnp.zeros((*x.shape[:2], lora.b.shape[1]), jnp.float32)
    if count == 1:
        return add(nothing, (jnp.int32(0), jax.tree.map(lambda leaf: leaf[0], lora)))[0]
    return lax.scan(add, nothing, (jnp.arange(count), lora))[0]


def layer[S](
    x: Float[Array, "B T H"],
    weights: LayerWeights,
    lora: AttentionLora | None,
    on_experts: Lora | None,
    config: Config,
    *,
    attention: Attention[S],
    rotary: tuple[Float[Array, "B T D/2"], Float[Array, "B T D/2"]],
    adapter_ids: Int32[Array, "B T"] | None,
    index: Int32[Array, ""],
    recompute: bool,
    observe: Callable[[Array, S], S] | None = None,
    dropout: LoraDropout | None = None,
) -> tuple[Float[Array, "B T H"], S]:
    """x after attention and experts, each added to what went in, and what the attention keeps.

    weights, lora: of this layer, but for the experts, which are of all layers.
    on_experts: LoRA of this layer or of all.
    attention: (heads, sinks) -> (each query's values, what is kept of keys and values).
    observe: (router logits [B, T, E], what attention keeps) -> what is kept instead.
    dropout: of the inputs of LoRA on attention in this layer.
    """
    of_qkv, of_o = (None, None) if dropout is None else (dropout.number(0), dropout.number(1))
    with jax.named_scope("attention"):
        normal = rms_norm(x, weights.attention_norm, config.rms_norm_eps)
        on_qkv, on_o = (None, None) if lora is None else (lora.qkv, lora.o)
        heads = linear(normal, weights.qkv, on_qkv, adapter_ids, of_qkv).reshape(*x.shape[:2], -1, config.head_dim)
        attended, kept = attention(Heads(heads, config.num_attention_heads, *rotary), weights.sinks)
        x = x + linear(attended.reshape(*x.shape[:2], -1), weights.o, on_o, adapter_ids, of_o)
    with jax.named_scope("router"):
        normal = rms_norm(x, weights.moe_norm, config.rms_norm_eps)
        router_logits = linear(normal, weights.router)
    if observe is not None:
        kept = observe(router_logits, kept)
    with jax.named_scope("experts"):
        y = through_experts(
            normal,
            router_logits,
            weights.experts,
            on_experts,
            config,
            adapter_ids=adapter_ids,
            index=index,
            recompute=recompute,
        )
    return x + y, kept


def through_experts(
    x: Float[Array, "B T H"],
    router_logits: Float[Array, "B T E"],
    experts: Experts,
    lora: Lora | None,
    config: Config,
    *,
    adapter_ids: Int32[Array, "B T"] | None,
    index: Int32[Array, ""],
    recompute: bool = False,
) -> Float[Array, "B T H"]:
    """What a layer's experts make of each token: jmoe.moe with the model's constants, by XLA in float32.

    experts: of all layers.
    lora: of this layer or of all.
    """
    return moe(
        x,
        router_logits,
        experts,
        top_k=config.num_experts_per_tok,
        lora=lora,
        adapter_ids=None if lora is None else adapter_ids,
        activation=config.activation,
        layer=index,
        recompute=recompute,
        backend="xla" if x.dtype == jnp.float32 else None,
    )
