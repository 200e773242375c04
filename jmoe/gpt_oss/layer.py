"""One transformer layer of gpt-oss as a function of its weights."""

import dataclasses
import functools
from typing import ClassVar, Literal, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.attention_lora import AttentionLora, ProductLora
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.lora_dropout import LoraDropout, shrink_dropped
from jmoe.gpt_oss.products import linear_and_expand, product
from jmoe.gpt_oss.rope import Heads
from jmoe.gpt_oss.split import WHOLE, Split
from jmoe.gpt_oss.weights import LayerWeights, Linear, slice_layers
from jmoe.ops.experts import Experts, Lora
from jmoe.ops.lora.by_row import StackedFactors, lora_by_row
from jmoe.ops.moe import moe
from jmoe.ops.norm import rms_norm

type Remat = Literal["nothing", "experts", "layers"]
"""What the backward pass computes again: nothing; experts' first product, as jmoe.moe does with recompute; or whole
layers, of which it keeps the input alone."""


class Place(NamedTuple):
    """Which layer: that at `within` of a group; groups are counted, and `number` counts all layers."""

    group: Int32[Array, ""]
    within: int
    number: Int32[Array, ""]


class LayerAttention[S](Protocol):
    """Attention of one call's layers, and what it carries from a group of layers to the next; a pytree.

    splits_batch: whether sequences have states of their own, so that devices can have different ones.
    """

    splits_batch: ClassVar[bool] = True

    def attend(
        self, heads: Heads, sinks: Float[Array, " N"], state: S, place: Place
    ) -> tuple[Float[Array, "B T N D"], S]:
        """(each query's values, the state with what is kept of keys and values)."""

    def observe(self, router_logits: Float[Array, "B T E"], state: S, place: Place) -> S:
        """The state with what is kept of a layer's router."""
        return state

    def finish(self, states: tuple[S, ...], split: Split) -> tuple[S, ...]:
        """The states after the last layer, of all devices where they are not of a device's own sequences or heads."""
        return states

    def specs(self, batch: tuple[str, ...], heads: str | None) -> Self:
        """The split of each of its arrays, where these axes split the sequences and the heads."""
        return jax.tree.map_with_path(lambda path, _: P(batch or None), self)

    def state_spec(self, batch: tuple[str, ...], heads: str | None) -> P:
        """The split of a state's arrays."""
        return P()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerLora:
    """LoRA of all layers, or of one; None without; a pytree."""

    attention: AttentionLora | None
    experts: Lora | None

    def layer(self, index: Int32[Array, ""] | int) -> Self:
        """One layer's on attention; that on experts remains of all layers, as it is read in place."""
        return dataclasses.replace(self, attention=self.attention and self.attention.layer(index))


@dataclasses.dataclass(frozen=True)
class LayerCall[S]:
    """What is the same in every layer of one call.

    rotary: (cosine, sine) [B, T, D/2] of the tokens' positions.
    remat: what the backward pass computes again.
    dropout: of the inputs of LoRA on attention, in training.
    split: which part of the sequences, the heads and the experts is here; config has the heads that are.
    """

    config: Config
    attention: LayerAttention[S]
    rotary: tuple[Float[Array, "B T D/2"], Float[Array, "B T D/2"]]
    adapter_ids: Int32[Array, "B T"] | None
    remat: Remat = "nothing"
    dropout: LoraDropout | None = None
    split: Split = WHOLE


def linear(
    x: Float[Array, "B T K"],
    weights: Linear,
    lora: ProductLora | None = None,
    adapter_ids: Int32[Array, "B T"] | None = None,
    dropout: LoraDropout | None = None,
    index: Int32[Array, ""] | None = None,
) -> Float[Array, "B T N"]:
    """x weight^T + bias, plus LoRA; sums in float32, rounded once to x's dtype.

    dropout: of LoRA's inputs, where adapter_ids are None.
    index: which layer of LoRA, that of all of which is given; then there is no gradient.
    """
    if lora is not None and adapter_ids is None:
        shrunk = shrink(x, lora.a[0], lora.scale[0]) if dropout is None else shrink_dropped(x, lora, dropout)
        return linear_and_expand(x, weights.weight, weights.bias, shrunk, lora.b[0])
    y = product("btk,nk->btn", x, weights.weight)
    if lora is not None and adapter_ids is not None and index is not None:
        x_rows, y_rows = (array.reshape(-1, array.shape[-1]) for array in (x, y))
        factors = StackedFactors(lora.a, lora.scale, lora.b)
        rows = lora_by_row(x_rows, y_rows, weights.bias, adapter_ids.reshape(-1), index, factors)
        return rows.reshape(y.shape)
    y += weights.bias.astype(jnp.float32)
    if lora is not None:
        y += delta(x, lora, adapter_ids)
    return y.astype(x.dtype)


def shrink(x: Float[Array, "B T K"], a: Float[Array, "R K"], scale: Float[Array, " R"]) -> Float[Array, "B T R"]:
    """LoRA's first half, rounded to x's dtype."""
    return (product("btk,rk->btr", x, a) * scale).astype(x.dtype)


def delta(
    x: Float[Array, "B T K"], lora: ProductLora, adapter_ids: Int32[Array, "B T"] | None
) -> Float[Array, "B T N"]:
    """What each token's own adapter adds, in float32."""

    def of_one(a: Array, scale: Array, b: Array) -> Array:
        return product("btr,nr->btn", shrink(x, a, scale), b)

    if adapter_ids is None:
        return of_one(lora.a[0], lora.scale[0], lora.b[0])

    def add(total: Array, adapter: tuple[Array, ProductLora]) -> tuple[Array, None]:
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
    x: Float[Array, "B T H"], weights: LayerWeights, lora: LayerLora, call: LayerCall[S], place: Place, state: S
) -> tuple[Float[Array, "B T H"], S]:
    """x after attention and experts, each added to what went in, and the attention's state.

    weights, lora: of this layer; experts, and LoRA on them, may be of all layers, and so may LoRA on attention where
    tokens have adapters of their own.
    """
    config, adapter_ids = call.config, call.adapter_ids
    dropout = None if call.dropout is None else call.dropout.number(place.number)
    of_qkv, of_o = (None, None)
    if dropout is not None:
        of_qkv, of_o = dropout.number(0), dataclasses.replace(dropout.number(1), of_heads=True)
    with jax.named_scope("attention"):
        normal = rms_norm(x, weights.attention_norm, config.rms_norm_eps)
        on_qkv, on_o = (None, None) if lora.attention is None else (lora.attention.qkv, lora.attention.o)
        index = place.number if lora.attention is not None and lora.attention.of_all_layers else None
        qkv = linear(normal, weights.qkv, on_qkv, adapter_ids, of_qkv, index)
        qkv = qkv.reshape(*x.shape[:2], -1, config.head_dim)
        heads = Heads(qkv, config.num_attention_heads, *call.rotary)
        attended, state = call.attention.attend(heads, weights.sinks, state, place)
        by_heads = linear(attended.reshape(*x.shape[:2], -1), weights.o, on_o, adapter_ids, of_o, index)
        x = x + call.split.sum_over_heads(by_heads)
    with jax.named_scope("router"):
        normal = rms_norm(x, weights.moe_norm, config.rms_norm_eps)
        router_logits = linear(normal, weights.router)
    state = call.attention.observe(router_logits, state, place)
    with jax.named_scope("experts"):
        y = moe_block(normal, router_logits, weights.experts, lora.experts, call, place.number)
    return x + y, state


def moe_block(
    x: Float[Array, "B T H"],
    router_logits: Float[Array, "B T E"],
    experts: Experts,
    lora: Lora | None,
    call: LayerCall,
    index: Int32[Array, ""],
) -> Float[Array, "B T H"]:
    """What a layer's experts make of each token: jmoe.moe with the model's constants, by XLA in float32.

    experts: of all layers.
    lora: of this layer or of all.
    """
    split = call.split
    layer: Int32[Array, ""] | None = index
    if split.experts is not None:  # the logits' gradient is a sum over devices, and rounded once then
        router_logits = router_logits.astype(jnp.float32)
    adapter_ids = None if lora is None else call.adapter_ids
    tokens, router_logits, adapter_ids = split.gather_tokens((x, router_logits, adapter_ids))
    if split.fsdp is not None:
        (experts, lora), layer = split.gather_layer(experts, lora, index), None
    y = moe(
        tokens,
        router_logits,
        experts,
        top_k=call.config.num_experts_per_tok,
        lora=lora,
        adapter_ids=adapter_ids,
        expert_offset=split.first_expert(experts),
        activation=call.config.activation,
        layer=layer,
        recompute=call.remat == "experts",
        backend="xla" if x.dtype == jnp.float32 else None,
    )
    return split.sum_over_experts(y)


def run_groups[S](
    x: Float[Array, "B T H"],
    stack: LayerWeights,
    lora: LayerLora,
    call: LayerCall[S],
    states: tuple[S, ...],
    *,
    in_place: bool,
) -> tuple[Float[Array, "B T H"], tuple[S, ...]]:
    """(x, states) after all layers, one group of them compiled.

    Experts are read in place, since XLA would copy each layer's out of the stack.

    stack, lora: of all layers.
    states: for each layer of a group.
    in_place: LoRA is read in place too, for which it has no gradient.
    """
    groups = call.config.num_hidden_layers // len(states)

    def one(x: Array, index: Array, sliced: LayerLora | None, state: S, group: Array, within: int) -> tuple[Array, S]:
        # The layer's weights are taken within: what goes into jax.checkpoint is kept, for every layer.
        if sliced is not None:
            own = jax.tree.map(lambda leaf: leaf[within], sliced)
        else:
            own = lora.layer(index) if call.adapter_ids is None else lora
        return layer(x, stack.layer(index, ("experts",)), own, call, Place(group, within, index), state)

    def run_group(
        carry: tuple[Array, tuple[S, ...]], scanned: tuple[Array, LayerLora | None]
    ) -> tuple[tuple[Array, tuple[S, ...]], None]:
        x, states = carry
        group, sliced = scanned
        kept = []
        for within, state in enumerate(states):
            plain = functools.partial(one, group=group, within=within)
            if call.remat == "layers":
                run = jax.checkpoint(plain)
            elif call.split.fsdp is not None:  # a layer's experts are gathered again, not kept
                run = jax.checkpoint(plain, policy=call.split.keeps)
            else:
                run = plain
            x, state = run(x, group * len(states) + within, sliced, state)
            kept.append(state)
        return (x, tuple(kept)), None

    sliced = None if in_place else slice_layers(lora, groups)
    return lax.scan(run_group, (x, states), (jnp.arange(groups), sliced))[0]
