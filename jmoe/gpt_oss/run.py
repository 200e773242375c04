"""All layers of the model, one after another, on one device or on each device of a mesh."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.attention_lora import AttentionLora
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.decode_layers import run_decode_layers
from jmoe.gpt_oss.layer import LayerAttention, LayerCall, LayerLora, Remat, run_groups
from jmoe.gpt_oss.layout import Layout
from jmoe.gpt_oss.lora_dropout import LoraDropout
from jmoe.gpt_oss.products import product
from jmoe.gpt_oss.rope import cosine_and_sine
from jmoe.gpt_oss.split import WHOLE, Split
from jmoe.gpt_oss.weights import LayerWeights, LoraWeights
from jmoe.ops.decode.linear import MOST_ROWS
from jmoe.ops.mesh_axes import mesh_of
from jmoe.ops.norm import rms_norm


class Inputs(NamedTuple):
    """Tokens, where they stand in their sequences, and their adapters, -1 for none; None: adapter 0, if any."""

    tokens: Int32[Array, "B T"]
    positions: Int32[Array, "B T"]
    adapter_ids: Int32[Array, "B T"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrays[S]:
    """What the layers are computed of and on; a pytree.

    norm: the last.
    states: for each layer of a group what its attention carries from group to group.
    attention_lora: the adapters on attention as the layers apply them, where they are laid out already.
    """

    embedding: Float[Array, "V H"]
    layers: LayerWeights
    norm: Float[Array, " H"]
    lora: LoraWeights | None
    inputs: Inputs
    attention: LayerAttention[S]
    states: tuple[S, ...]
    attention_lora: AttentionLora | None = None
    dropout: LoraDropout | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """What is static about a run of the layers.

    in_place: for inference: LoRA is read in place, and for as few tokens as a decode step's so are all weights. There
      is no gradient, and what it would cost is not paid.
    """

    config: Config
    dtype: Any
    remat: Remat
    in_place: bool

    def __call__[S](self, layout: Layout | None, arrays: Arrays[S]) -> tuple[Float[Array, "B T H"], tuple[S, ...]]:
        """(the last layer's results after the norm, the states), where the arrays lie by a layout, if there is one.

        Inside a jax.shard_map over the layout's axes the arrays are this device's parts.

        Raises:
          ValueError: the arrays are on no mesh that has the layout's axes, or a jax.shard_map around this is over some
            of them alone.
        """
        if layout is None:
            return self.on_device(WHOLE, arrays)
        mesh = mesh_of(arrays.layers)
        missing = [name for name in layout.axes if name not in mesh.axis_names]
        if missing:
            raise ValueError(f"the model's layout names mesh axis {missing[0]!r}, and its arrays are on no such mesh")
        split = [name for name in layout.axes if name in mesh.manual_axes]
        if len(split) == len(layout.axes):
            return self.on_device(layout.split(), arrays)
        if split:
            raise ValueError(
                f"a jax.shard_map around the model must be over all axes of its layout, {', '.join(layout.axes)}, or "
                f"over none, got {', '.join(split)}"
            )
        return on_mesh(self, layout, mesh, arrays)

    def on_device[S](self, split: Split, arrays: Arrays[S]) -> tuple[Float[Array, "B T H"], tuple[S, ...]]:
        """The same of one device's part."""
        config, inputs = split.config(self.config), arrays.inputs
        stack = split.with_one_bias(arrays.layers)
        rotary = cosine_and_sine(config.rope, config.head_dim, inputs.positions)
        dropout = arrays.dropout and dataclasses.replace(arrays.dropout, split=split)
        call = LayerCall(config, arrays.attention, rotary, inputs.adapter_ids, self.remat, dropout, split)
        x = embed(arrays.embedding, inputs, adapters_of(arrays.lora), self.dtype)
        on_attention = arrays.attention_lora
        if not self.in_place:
            on_attention = AttentionLora.of(arrays.lora, config, self.dtype)
        lora = LayerLora(on_attention, None if arrays.lora is None else arrays.lora.on_experts)
        if self.in_place and inputs.tokens.size <= MOST_ROWS and x.dtype == jnp.bfloat16:
            hidden, states = run_decode_layers(x, stack, arrays.norm, lora, call, arrays.states)
        else:
            x, states = run_groups(x, stack, lora, call, arrays.states, in_place=self.in_place)
            hidden = rms_norm(x, arrays.norm, config.rms_norm_eps)
        return hidden, arrays.attention.finish(states, split)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def on_mesh(run: Run, layout: Layout, mesh: AbstractMesh, arrays: Arrays) -> tuple[Array, tuple[Any, ...]]:
    """The run of each device's part."""
    attention, sequences = arrays.attention, arrays.inputs.tokens.shape[0]
    batch = layout.batch_axes(mesh, sequences) if attention.splits_batch else ()
    state = attention.state_spec(batch, layout.heads)
    specs: Any = Arrays(
        embedding=P(),  # type: ignore[arg-type]
        layers=layout.layers(arrays.layers.experts),
        norm=P(),  # type: ignore[arg-type]
        lora=arrays.lora and layout.lora(arrays.lora),
        inputs=jax.tree.map(lambda _: P(batch or None), arrays.inputs),
        attention=attention.specs(batch, layout.heads),
        states=jax.tree.map(lambda _: state, arrays.states),
        attention_lora=arrays.attention_lora and layout.attention_lora(arrays.attention_lora),
        dropout=jax.tree.map(lambda _: P(), arrays.dropout),
    )
    # Types of which device's values vary would want a rule of each kernel's; sums are written out instead.
    return jax.shard_map(
        functools.partial(run.on_device, layout.split(batch)),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(P(batch or None), specs.states),
        check_vma=False,
    )(arrays)


def embed(embedding: Float[Array, "V H"], inputs: Inputs, adapters: int, dtype: Any) -> Float[Array, "B T H"]:
    """What goes into the first layer: NaN for tokens that are not in the vocabulary, and adapters there are not."""
    tokens, adapter_ids = inputs.tokens, inputs.adapter_ids
    there = (tokens >= 0) & (tokens < embedding.shape[0])
    if adapter_ids is not None:
        there &= (adapter_ids >= -1) & (adapter_ids < adapters)
    x = jnp.take(embedding, tokens, axis=0, mode="clip").astype(dtype)
    return jnp.where(there[..., None], x, jnp.nan)


def adapters_of(lora: LoraWeights | None) -> int:
    """How many adapters there are."""
    return 0 if lora is None else next(iter(lora.scale.values())).shape[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits_on_mesh(
    layout: Layout, mesh: AbstractMesh, hidden: Float[Array, "B T H"], head: Float[Array, "V H"]
) -> Float[Array, "B T V"]:
    """The model's logits: devices that have the same sequences each multiply by a part of the vocabulary."""
    batch = layout.batch_axes(mesh, hidden.shape[0])
    others = tuple(name for name in layout.axes if name not in batch)
    if head.shape[0] % layout.size(mesh, *others):
        others = ()
    split = NamedSharding(mesh, P(batch or None, None, others or None))
    return jax.lax.with_sharding_constraint(product("bth,vh->btv", hidden, head), split)
