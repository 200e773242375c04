"""One call of the layer: its arrays as a pytree and what is static about it, and the names that launch plans use."""

import dataclasses
import math
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.ops.experts import Experts, Lora
from jmoe.ops.mxfp4 import Mxfp4, PackedMxfp4
from jmoe.ops.routing import Routing
from jmoe.ops.target import Target
from jmoe.triton_src.activation import SwiGLU
from jmoe.triton_src.scoring import Scoring


class Options(NamedTuple):
    """What is static about a call."""

    intermediate: int  # I, which padding hides in packed weights
    top_k: int
    activation: SwiGLU
    target: Target | None  # None: the GPU at hand when lowered
    forced: bool  # the caller named the Triton backend, so that what it cannot do is an error at once
    recompute: bool
    scoring: Scoring = Scoring()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """The arrays of a call that have axes of tokens, which come first; a pytree.

    Either router_logits or routing is given. adapter_ids: the adapter of each token, -1 for none; None: adapter 0 for
    all, if there is LoRA.
    """

    x: Float[Array, "... H"]
    router_logits: Float[Array, "... E"] | None
    routing: Routing | None
    adapter_ids: Int32[Array, "..."] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
    """The arrays of a call; a pytree, which goes as it is through differentiation, jax.vmap and the primitive.

    expert_offset: the first expert held here; None: 0.
    layer: which layer of experts that have a leading axis for layers, and of LoRA that has it too; None: they have not.
    choice_bias: what is added to the router's scores for the choice alone; None: nothing.
    """

    tokens: Tokens
    experts: Experts
    lora: Lora | None
    expert_offset: Int32[Array, "1"] | None
    layer: Int32[Array, "1"] | None
    choice_bias: Float[Array, " E"] | None = None

    @classmethod
    def of_arguments(
        cls,
        tokens: Tokens,
        experts: Experts,
        lora: Lora | None,
        expert_offset: Int32[Array, ""] | Int32[Array, "1"] | int,
        layer: Int32[Array, ""] | int | None,
        choice_bias: Float[Array, " E"] | None = None,
    ) -> Self:
        """The call of jmoe.moe's arguments: with one axis of tokens, and numbers as kernels read them."""
        axes = tokens.x.ndim - 1
        flat = [leaf.reshape(math.prod(leaf.shape[:axes]), *leaf.shape[axes:]) for leaf in jax.tree.leaves(tokens)]
        if lora is not None:
            scales = (lora.gate_up_scale, lora.down_scale)
            gate_up_scale, down_scale = lax.stop_gradient(scales)
            lora = dataclasses.replace(lora, gate_up_scale=gate_up_scale, down_scale=down_scale)
        no_offset = isinstance(expert_offset, int) and expert_offset == 0
        return cls(
            jax.tree.unflatten(jax.tree.structure(tokens), flat),
            experts,
            lora,
            None if no_offset else jnp.asarray(expert_offset, jnp.int32).reshape(1),
            None if layer is None else jnp.asarray(layer, jnp.int32).reshape(1),
            None if choice_bias is None else lax.stop_gradient(choice_bias),
        )

    def of_one_layer(self) -> Self:
        """With the layer that `layer` chooses taken out of stacks."""
        if self.layer is None:
            return self
        (layer,) = self.layer
        stacks = (self.experts, self.lora if lora_has_layers(self.lora) else None)
        chosen = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stacks)
        lora = self.lora if chosen[1] is None else chosen[1]
        return dataclasses.replace(self, experts=chosen[0], lora=lora, layer=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """What a forward pass keeps for the gradient beside its call; a pytree.

    routing: None where the call has it.
    pre_activations: [P, 2I] by position, gate_up's results before the activation; None: they are computed again.
    """

    routing: Routing | None
    pre_activations: Float[Array, "P 2I"] | None


def lora_has_layers(lora: Lora | None) -> bool:
    """Whether LoRA has a leading axis for layers; its scales tell."""
    scales = [] if lora is None else [lora.gate_up_scale, lora.down_scale]
    return any(scale is not None and scale.ndim == 2 for scale in scales)


def buffers_of(call: Call) -> dict[str, Any]:
    """The leaves of a call, whatever they are, by the names that launch plans use."""
    tokens, routing = call.tokens, call.tokens.routing
    named: dict[str, Any] = {"x": tokens.x, "router_logits": tokens.router_logits, "adapter_ids": tokens.adapter_ids}
    if routing is not None:
        named |= {"experts": routing.experts, "weights": routing.weights}
    named |= {"expert_offset": call.expert_offset, "layer": call.layer, "choice_bias": call.choice_bias}
    for projection in ("gate_up", "down"):
        match getattr(call.experts, projection):
            case Mxfp4(blocks, scales):
                named |= {projection: blocks, f"{projection}_scales": scales}
            case PackedMxfp4(words, scales):
                named |= {projection: words, f"{projection}_scales": scales}
            case dense:
                named[projection] = dense
        named[f"{projection}_bias"] = getattr(call.experts, f"{projection}_bias")
        for part in ("a", "b", "scale"):
            named[f"{projection}_{part}"] = getattr(call.lora, f"{projection}_{part}", None)
    return {name: leaf for name, leaf in named.items() if leaf is not None}


def like_call(call: Call, named: dict[str, Any]) -> Call:
    """A call's structure with what is named for leaves, and None for the others: the inverse of buffers_of."""
    tree: Any = jax.tree.structure(call)
    leaves = range(tree.num_leaves)
    places = buffers_of(tree.unflatten(leaves))
    found = {place: named[name] for name, place in places.items() if name in named}
    return tree.unflatten([found.get(place) for place in leaves])
