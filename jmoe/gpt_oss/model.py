"""gpt-oss as a Flax module."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.attention import Implementation, attend
from jmoe.gpt_oss.attention_lora import AttentionLora
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.flash_attention import SEGMENTS
from jmoe.gpt_oss.layer import LayerAttention, Place, Remat
from jmoe.gpt_oss.layout import Layout, with_auto_axes
from jmoe.gpt_oss.lora_dropout import LoraDropout
from jmoe.gpt_oss.products import product
from jmoe.gpt_oss.rope import Heads
from jmoe.gpt_oss.run import Arrays, Inputs, Run, adapters_of, logits_on_mesh
from jmoe.gpt_oss.weights import LayerWeights, Linear, LoraWeights, qkv_rows
from jmoe.nn.variables import Frozen, values_of, variable_of, variables_of
from jmoe.ops.mesh_axes import mesh_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionWithin(LayerAttention[Any]):
    """Attention to tokens of the same call, from which nothing is carried. Fields as in jmoe.gpt_oss.attend."""

    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    segment_ids: Int32[Array, "B T"] | None
    implementation: Implementation = dataclasses.field(default=None, metadata={"static": True})
    most_segments: int = dataclasses.field(default=SEGMENTS, metadata={"static": True})

    def attend(self, heads: Heads, sinks: Array, state: Any, place: Place) -> tuple[Array, Any]:
        """(each query's values, the state as it is)."""
        attended = attend(
            *heads.rotated(),
            sinks,
            window=self.windows[place.within],
            segment_ids=self.segment_ids,
            implementation=self.implementation,
            most_segments=self.most_segments,
        )
        return attended, state


class GptOss(nnx.Module):
    """The whole model: embedding, layers, norm, head. Made by jmoe.gpt_oss.load.

    Variables: `embedding` [V, H], those of `layers` (LayerWeights, every array with a leading axis for the layers),
    `norm` [H] and `head` [V, H] are Frozen; with adapters those of `lora_a` and `lora_b` are nnx.LoRAParam, and those
    of `lora_scale` Frozen; see LoraWeights. On a mesh each has its PartitionSpec by the layout in its metadata, where
    nnx.get_partition_spec and nnx.get_named_sharding find it.
    """

    def __init__(
        self,
        config: Config,
        *,
        embedding: Float[Array, "V H"],
        layers: LayerWeights,
        norm: Float[Array, " H"],
        head: Float[Array, "V H"],
        lora: LoraWeights | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        remat: Remat = "nothing",
        layout: Layout | None = None,
    ) -> None:
        """A model of these weights.

        Args:
          dtype: of activations: bfloat16, or float32, for which experts run by XLA.
          remat: what the backward pass computes again, which takes time and saves memory: "nothing"; "experts", as
            recompute in jmoe.moe; or "layers", of which it keeps the input alone.
          layout: how the weights are split on the mesh that they are on; None: they are on one device, or whole on each
            device of a mesh.

        Raises:
          ValueError: another dtype or remat.
        """
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
            raise ValueError(f"dtype must be bfloat16 or float32, got {jnp.dtype(dtype)}")
        if remat not in typing.get_args(Remat.__value__):
            raise ValueError(f'remat must be "nothing", "experts" or "layers", got {remat!r}')
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        self.layout = layout
        whole = None if layout is None else PartitionSpec()
        self.embedding = variable_of(Frozen, embedding, whole)
        self.layers = nnx.data(variables_of(Frozen, layers, layout and layout.layers(layers.experts)))
        self.norm = variable_of(Frozen, norm, whole)
        self.head = variable_of(Frozen, head, whole)
        specs = None if layout is None or lora is None else layout.lora(lora)
        self.lora_a = None if lora is None else nnx.data(variables_of(nnx.LoRAParam, lora.a, specs and specs.a))
        self.lora_b = None if lora is None else nnx.data(variables_of(nnx.LoRAParam, lora.b, specs and specs.b))
        self.lora_scale = None if lora is None else nnx.data(variables_of(Frozen, lora.scale, specs and specs.scale))

    @property
    def lora(self) -> LoraWeights | None:
        """The adapters, or None."""
        if self.lora_a is None or self.lora_b is None or self.lora_scale is None:
            return None
        return LoraWeights(values_of(self.lora_a), values_of(self.lora_b), values_of(self.lora_scale))

    @property
    def stack(self) -> LayerWeights:
        """All layers' arrays."""
        return values_of(self.layers)

    def with_adapters(self, lora: LoraWeights | None) -> "GptOss":
        """The same weights with these adapters instead of its own; on a mesh they go where its layout has them."""
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((lora, self.embedding)))
        if self.layout is not None and lora is not None and not traced:
            lora = self.layout.place(self.embedding.get_value().sharding.mesh, lora, self.layout.lora(lora))
        return GptOss(
            self.config,
            embedding=self.embedding.get_value(),
            layers=self.stack,
            norm=self.norm.get_value(),
            head=self.head.get_value(),
            lora=lora,
            dtype=self.dtype,
            remat=self.remat,
            layout=self.layout,
        )

    def on_mesh(self, mesh: Mesh, layout: Layout) -> "GptOss":
        """The same model on a mesh: for models that one device holds; jmoe.gpt_oss.load reads others onto it at once.

        Raises:
          ValueError: this is on a mesh by a layout already; and as Layout.check.
        """
        if self.layout is not None:
            raise ValueError(f"the model is on a mesh already, by {self.layout}")
        layout.check(mesh, self.config)
        mesh = with_auto_axes(mesh)
        rows = qkv_rows(self.config, layout.size(mesh, layout.heads))
        stack, lora = self.stack, self.lora
        qkv = Linear(stack.qkv.weight[:, rows], stack.qkv.bias[:, rows])
        layers = dataclasses.replace(stack, qkv=qkv)
        arrays = {name: getattr(self, name).get_value() for name in ("embedding", "norm", "head")}
        return GptOss(
            self.config,
            **layout.place(mesh, arrays, dict.fromkeys(arrays, PartitionSpec())),
            layers=layout.place(mesh, layers, layout.layers(layers.experts)),
            lora=lora and layout.place(mesh, lora, layout.lora(lora)),
            dtype=self.dtype,
            remat=self.remat,
            layout=layout,
        )

    def attention_lora(self) -> AttentionLora | None:
        """The adapters on attention as the layers apply them."""
        parts = 1 if self.layout is None else self.layout.size(mesh_of(self.stack), self.layout.heads)
        return AttentionLora.of(self.lora, self.config, self.dtype, parts)

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        *,
        positions: Int32[Array, "B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        adapter_ids: Int32[Array, " B"] | Int32[Array, "B T"] | None = None,
        last_only: bool = False,
    ) -> Float[Array, "B T V"]:
        """float32 logits [B, T, V], or [B, 1, V] of the last token; arguments and errors as in `hidden`.

        Raises:
          ValueError: last_only, and there is no token.
        """
        if last_only and tokens.ndim == 2 and not tokens.size:
            raise ValueError(f"last_only needs at least one token in each sequence, got tokens {tokens.shape}")
        hidden = self.hidden(tokens, positions=positions, segment_ids=segment_ids, adapter_ids=adapter_ids)
        return self.logits(hidden[:, -1:] if last_only else hidden)

    def logits(self, hidden: Float[Array, "B T H"]) -> Float[Array, "B T V"]:
        """float32 logits of what `hidden` returns."""
        head = self.head.get_value()
        with jax.named_scope("head"):
            if self.layout is None or mesh_of(head).manual_axes:
                return product("bth,vh->btv", hidden, head)
            return logits_on_mesh(self.layout, mesh_of(head), hidden, head)

    def hidden(
        self,
        tokens: Int32[Array, "B T"],
        *,
        positions: Int32[Array, "B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        adapter_ids: Int32[Array, " B"] | Int32[Array, "B T"] | None = None,
        attention: Implementation = None,
        most_segments: int = SEGMENTS,
        dropout: LoraDropout | None = None,
    ) -> Float[Array, "B T H"]:
        """The last layer's results, after the norm, before the head.

        Args:
          tokens: NaN follows from a traced one that is not in the vocabulary.
          positions: None: 0, 1, ... in each segment.
          segment_ids: of sequences packed in a row, one after another; tokens see their own segment alone.
          adapter_ids: each sequence's or token's adapter, -1 for none; None: adapter 0 where there is one. NaN follows
            from a traced one that there is not.
          attention: the implementation of jmoe.gpt_oss.attend.
          most_segments: how many segments a row may have in it.
          dropout: of the inputs of LoRA on attention, in training; without adapter_ids.

        Raises:
          ValueError: tokens, positions or segment_ids are not [B, T] integers, tokens are not all in the vocabulary, or
            adapter_ids do not go with the model's adapters; and, with NotImplementedError, as `attend` does.
        """
        check_tokens(tokens, adapter_ids, self.lora, self.config.vocab_size)
        if dropout is not None and adapter_ids is not None:
            raise ValueError("dropout is for training, which has one adapter for all tokens, got adapter_ids too")
        for name, array in (("positions", positions), ("segment_ids", segment_ids)):
            if array is not None and (array.shape != tokens.shape or not jnp.issubdtype(array.dtype, jnp.integer)):
                raise ValueError(
                    f"{name} must be integers like tokens {tokens.shape}, got {array.dtype} with shape {array.shape}"
                )
        if not tokens.size:
            return jnp.zeros((*tokens.shape, self.config.hidden_size), self.dtype)
        if positions is None:
            positions = positions_in_segments(tokens.shape, segment_ids)
        if adapter_ids is not None and adapter_ids.ndim == 1:
            adapter_ids = jnp.broadcast_to(adapter_ids[:, None], tokens.shape)

        within = AttentionWithin(self.config.windows, segment_ids, attention, most_segments)
        inputs = Inputs(tokens, positions, adapter_ids)
        return self.run_layers(inputs, within, (None,) * self.period, dropout=dropout)[0]

    def run_layers[S](
        self,
        inputs: Inputs,
        attention: LayerAttention[S],
        states: tuple[S, ...],
        *,
        dropout: LoraDropout | None = None,
    ) -> tuple[Float[Array, "B T H"], tuple[S, ...]]:
        """(hidden, states): the layers one after another, with gradients of LoRA.

        states: for each layer of a group what its attention carries from group to group.
        dropout: as in `hidden`.
        """
        run = Run(self.config, self.dtype, self.remat, in_place=False)
        return run(self.layout, dataclasses.replace(self.arrays(inputs, attention, states), dropout=dropout))

    def run_layers_in_place[S](
        self,
        inputs: Inputs,
        attention: LayerAttention[S],
        states: tuple[S, ...],
        attention_lora: AttentionLora | None,
    ) -> tuple[Float[Array, "B T H"], tuple[S, ...]]:
        """As run_layers, for inference: there is no gradient, and what it would cost is not paid.

        LoRA on experts is read in place too, and for as few tokens as a decode step's so are all weights.

        attention_lora: the model's, which many calls share.
        """
        run = Run(self.config, self.dtype, self.remat, in_place=True)
        arrays = self.arrays(inputs, attention, states)
        return run(self.layout, dataclasses.replace(arrays, attention_lora=attention_lora))

    def arrays[S](self, inputs: Inputs, attention: LayerAttention[S], states: tuple[S, ...]) -> Arrays[S]:
        """What the layers are computed of and on."""
        return Arrays(
            self.embedding.get_value(), self.stack, self.norm.get_value(), self.lora, inputs, attention, states
        )

    @property
    def period(self) -> int:
        """Layers in a group."""
        return shortest_period(self.config.windows)


def shortest_period(windows: tuple[int | None, ...]) -> int:
    """Layers after which the kinds of attention repeat: one such group is compiled, of 2 in the released models."""
    count = len(windows)
    return next(p for p in range(1, count + 1) if count % p == 0 and windows == windows[:p] * (count // p))


def positions_in_segments(shape: tuple[int, ...], segment_ids: Int32[Array, "B T"] | None) -> Int32[Array, "B T"]:
    """0, 1, ... from the beginning of each segment."""
    index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if segment_ids is None:
        return index
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)], constant_values=True)
    return index - lax.cummax(jnp.where(begins, index, 0), axis=1)


def check_tokens(tokens: Array, adapter_ids: Array | None, lora: LoraWeights | None, vocabulary: int) -> None:
    """Raises ValueError unless arguments fit each other and the model; of values, those that are concrete."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype} with shape {tokens.shape}")
    check_range("tokens", tokens, 0, vocabulary)
    adapters = adapters_of(lora)
    if adapter_ids is None:
        if adapters > 1:
            raise ValueError(f"adapter_ids must be given with {adapters} adapters, got None")
        return
    if not adapters:
        raise ValueError("adapter_ids were given to a model without adapters")
    if adapter_ids.shape not in (tokens.shape[:1], tokens.shape) or not jnp.issubdtype(adapter_ids.dtype, jnp.integer):
        raise ValueError(
            f"adapter_ids must be integers [B] or [B, T] like tokens {tokens.shape}, "
            f"got {adapter_ids.dtype} with shape {adapter_ids.shape}"
        )
    check_range("adapter_ids", adapter_ids, -1, adapters)


def check_range(name: str, values: Array, least: int, end: int) -> None:
    """Raises ValueError if the values are concrete and one of them is not in [least, end)."""
    if isinstance(values, jax.core.Tracer) or not values.size:
        return
    on_host = np.asarray(values)
    wrong = on_host[(on_host < least) | (on_host >= end)]
    if wrong.size:
        raise ValueError(f"{name} must be in [{least}, {end}), got {wrong[0]}")
