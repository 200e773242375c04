"""What a device of a mesh computes of the model: its own sequences, heads and experts, and the sums with the others'.

Everything here is inside a jax.shard_map over all axes of a layout, where arrays are this device's parts.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.weights import LayerWeights, Linear
from jmoe.ops.call import lora_has_layers
from jmoe.ops.experts import Experts, Lora


@dataclasses.dataclass(frozen=True)
class Split:
    """The axes over which one call's arrays are split; static.

    batch: the sequences.
    experts: the experts, gathered from `fsdp` too, layer by layer.
    heads: heads of attention.
    """

    batch: tuple[str, ...] = ()
    experts: str | None = None
    heads: str | None = None
    fsdp: str | None = None

    def config(self, config: Config) -> Config:
        """The model's with the heads that a device has."""
        if self.heads is None:
            return config
        parts = lax.axis_size(self.heads)
        return dataclasses.replace(
            config,
            num_attention_heads=config.num_attention_heads // parts,
            num_key_value_heads=config.num_key_value_heads // parts,
        )

    def with_one_bias(self, stack: LayerWeights) -> LayerWeights:
        """The layers with o's bias on the first of the devices whose products are summed, and zeros on the others."""
        if self.heads is None:
            return stack
        bias = jnp.where(lax.axis_index(self.heads) == 0, stack.o.bias, 0)
        return dataclasses.replace(stack, o=Linear(stack.o.weight, bias))

    def sum_over_heads(self, y: Float[Array, "..."]) -> Float[Array, "..."]:
        """What all heads' devices have together."""
        return y if self.heads is None else lax.psum(y, self.heads)

    def gather_layer(self, experts: Experts, lora: Lora | None, index: Int32[Array, ""]) -> tuple[Experts, Lora | None]:
        """One layer's experts, all that this device is to compute, and LoRA on them.

        lora: of all layers, or of this one.
        """
        assert self.fsdp is not None

        def take(leaf: Array) -> Array:
            return lax.dynamic_index_in_dim(leaf, index, keepdims=False)

        def gather(leaf: Array) -> Array:
            return lax.all_gather(take(leaf), self.fsdp, axis=0, tiled=True)

        if lora_has_layers(lora):
            lora = jax.tree.map(take, lora)
        return jax.tree.map(gather, experts), lora

    def keeps(self, primitive: Any, *_: Any, **params: Any) -> bool:
        """What the backward pass keeps, for jax.checkpoint: all but gathered experts and what was cut out for them."""
        gathers = primitive.name == "all_gather" and self.fsdp in params["axis_name"]
        return not gathers and primitive.name not in ("dynamic_slice", "squeeze")

    def first_expert(self, experts: Experts) -> Int32[Array, ""] | int:
        """The number of this device's first."""
        if self.experts is None:
            return 0
        return lax.axis_index(self.experts).astype(jnp.int32) * experts.down.shape[-3]

    @property
    def gathers_tokens(self) -> bool:
        """Whether devices with other experts have other tokens."""
        return self.experts in self.batch

    def gather_tokens[T](self, tokens: T) -> T:
        """Arrays with the tokens of all devices that have other experts."""
        if not self.gathers_tokens:
            return tokens
        return jax.tree.map(lambda leaf: lax.all_gather(leaf, self.experts, axis=0, tiled=True), tokens)

    def sum_over_experts(self, y: Float[Array, "all T H"]) -> Float[Array, "B T H"]:
        """Of this device's tokens what all experts make of them."""
        if self.experts is None:
            return y
        if self.gathers_tokens:
            return lax.psum_scatter(y, self.experts, scatter_dimension=0, tiled=True)
        return lax.psum(y, self.experts)

    def sum_over_batch(self, count: Array) -> Array:
        """Of all sequences."""
        return lax.psum(count, self.batch) if self.batch else count

    def whole_batch(self, batch: int) -> tuple[int, Any]:
        """(how many sequences all devices have together, which of them is this device's first), of so many here."""
        if not self.batch:
            return batch, 0
        return batch * math.prod(map(lax.axis_size, self.batch)), lax.axis_index(self.batch) * batch

    def whole_columns(self, columns: int) -> tuple[int, Any]:
        """(how many columns of heads all devices have together, which is this device's first), of so many here."""
        if self.heads is None:
            return columns, 0
        return columns * lax.axis_size(self.heads), lax.axis_index(self.heads) * columns


WHOLE = Split()
"""One device has it all."""
