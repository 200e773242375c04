"""The layers of a decode step: few launches, weights read in place from all layers'."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.attention_lora import ProductLora
from jmoe.gpt_oss.layer import LayerCall, LayerLora, Place, moe_block
from jmoe.gpt_oss.rope import Heads
from jmoe.gpt_oss.weights import LayerWeights, Linear, take
from jmoe.ops.decode.linear import Expand, decode_linear
from jmoe.ops.decode.norm_linear import Narrow, norm_linear


def run_decode_layers[S](
    x: Float[Array, "B T H"],
    stack: LayerWeights,
    norm: Float[Array, " H"],
    lora: LayerLora,
    call: LayerCall[S],
    states: tuple[S, ...],
) -> tuple[Float[Array, "B T H"], tuple[S, ...]]:
    """(hidden, states) as GptOss.run_layers_in_place, from embedded tokens and the last norm's weight."""

    def run_group(
        carry: tuple[Array, Array, tuple[S, ...]], group: Array
    ) -> tuple[tuple[Array, Array, tuple[S, ...]], None]:
        x, addend, states = carry
        kept = []
        for within, state in enumerate(states):
            place = Place(group, within, group * len(states) + within)
            x, addend, state = decode_layer(x, addend, stack, lora, call, place, state)
            kept.append(state)
        return (x, addend, tuple(kept)), None

    groups = jnp.arange(call.config.num_hidden_layers // len(states))
    (x, addend, states), _ = lax.scan(run_group, (x, jnp.zeros_like(x), states), groups)
    eps = call.config.rms_norm_eps
    last = norm_linear(rows_of(x), jnp.int32(0), addend=rows_of(addend), norm=norm[None], eps=eps).normal
    return last.reshape(x.shape), states


def decode_layer[S](
    x: Float[Array, "B T H"],
    addend: Float[Array, "B T H"],
    stack: LayerWeights,
    lora: LayerLora,
    call: LayerCall[S],
    place: Place,
    state: S,
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"], S]:
    """(x, addend, the attention's state): jmoe.gpt_oss.layer's result is x + addend, which the next norm adds.

    x, addend: likewise what goes in is their sum.
    stack, lora: of all layers.
    """
    config, index = call.config, place.number
    adapter_ids = None if call.adapter_ids is None else call.adapter_ids.reshape(-1)
    eps = config.rms_norm_eps

    def multiply(x: Array, shrunk: Array | None, linears: Linear, factors: ProductLora | None) -> Array:
        expand = None
        if factors is not None and shrunk is not None:
            expand = Expand(shrunk, factors.b.reshape(factors.b.shape[0], -1, factors.b.shape[-1]), adapter_ids)
        return decode_linear(x, linears.weight, linears.bias, index, expand)

    shape = x.shape[:2]
    on_qkv, on_o = (None, None) if lora.attention is None else (lora.attention.qkv, lora.attention.o)
    with jax.named_scope("attention"):
        narrow = shrinking(on_qkv, adapter_ids)
        before = norm_linear(
            rows_of(x), index, addend=rows_of(addend), norm=stack.attention_norm, eps=eps, narrow=narrow
        )
        qkv = multiply(before.normal, before.product, stack.qkv, on_qkv)
        heads = Heads(qkv.reshape(*shape, -1, config.head_dim), config.num_attention_heads, *call.rotary)
        attended, state = call.attention.attend(heads, take(stack.sinks, index), state, place)
        attended = attended.reshape(-1, config.num_attention_heads * config.head_dim)
        narrow = shrinking(on_o, adapter_ids)
        shrunk = None if narrow is None else norm_linear(attended, index, narrow=narrow).product
        addend = call.split.sum_over_heads(multiply(attended, shrunk, stack.o, on_o))
    with jax.named_scope("router"):
        narrow = Narrow(stack.router.weight, stack.router.weight.shape[1], bias=stack.router.bias)
        routed = norm_linear(before.sum, index, addend=addend, norm=stack.moe_norm, eps=eps, narrow=narrow)
    with jax.named_scope("experts"):
        normal, router_logits = routed.normal.reshape(x.shape), routed.product.reshape(*shape, -1)
        y = moe_block(normal, router_logits, stack.experts, lora.experts, call, index)
    return routed.sum.reshape(x.shape), y, state


def rows_of(array: Array) -> Array:
    """[..., N] -> [T, N]."""
    return array.reshape(-1, array.shape[-1])


def shrinking(factors: ProductLora | None, adapter_ids: Int32[Array, " T"] | None) -> Narrow | None:
    """LoRA's first half as a narrow product; None without LoRA."""
    if factors is None:
        return None
    layers, _, rank, k = factors.a.shape
    return Narrow(
        factors.a.reshape(layers, -1, k), rank, scale=factors.scale.reshape(layers, -1), adapter_ids=adapter_ids
    )
