"""The weights of all layers on the device: room for them, and each layer put into its place in that room."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Shaped

from jmoe.checkpoint import Checkpoint
from jmoe.gpt_oss.weights import LayerWeights
from jmoe.ops.mxfp4 import BLOCK, Mxfp4, PackedMxfp4, quantize
from jmoe.ops.packed import empty_packed, pack_into


@dataclasses.dataclass(frozen=True)
class DenseExperts:
    """Dense experts [E, N, K] that are still in their file, to be rounded to MXFP4 one by one; a leaf of pytrees.

    name: in the checkpoint's view.
    """

    checkpoint: Checkpoint
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, N, K)."""
        experts, k, n = self.checkpoint.spec(self.name).shape
        return experts, n, k


def empty_stack(layer: LayerWeights, layers: int, packed: bool = False, device: Sharding | None = None) -> LayerWeights:
    """Room for so many layers like this one; for its MXFP4 experts packed, if they are to be."""

    def zeros(shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.zeros((layers, *shape), dtype, device=device)

    def room(leaf: Any) -> Any:
        if not isinstance(leaf, Mxfp4 | DenseExperts):
            return zeros(leaf.shape, leaf.dtype)
        experts, n, k = leaf.shape
        if packed:
            return empty_packed(layers, experts, n=n, k=k, device=device)
        groups = (experts, n, k // BLOCK)
        return Mxfp4(zeros((*groups, BLOCK // 2), jnp.uint8), zeros(groups, jnp.uint8))

    return jax.tree.map(room, layer, is_leaf=lambda leaf: isinstance(leaf, Mxfp4))


def put_layer(stack: LayerWeights, layer: LayerWeights, index: int) -> LayerWeights:
    """The stack with a layer in its place, in the stack's own memory; MXFP4 experts are packed on the way if it is."""

    def put_one(stacked: Any, one: Any) -> Any:
        if isinstance(one, DenseExperts):
            return round_into(stacked, one, index)
        if isinstance(stacked, PackedMxfp4) and isinstance(one, Mxfp4):
            return pack_into(stacked, beside(one, stacked.words), index)
        return jax.tree.map(
            lambda stacked_leaf, leaf: put(stacked_leaf, beside(leaf, stacked_leaf), index), stacked, one
        )

    return jax.tree.map(put_one, stack, layer, is_leaf=lambda leaf: isinstance(leaf, PackedMxfp4 | Mxfp4))


def round_into(stack: PackedMxfp4 | Mxfp4, dense: DenseExperts, layer: int) -> PackedMxfp4 | Mxfp4:
    """The stack with a layer's experts rounded to MXFP4, each from the file's own dtype; one is held at a time."""
    for expert in range(dense.shape[0]):
        weight = dense.checkpoint.expert(dense.name, expert)
        input_first = weight.flags.c_contiguous  # else its transpose is, which need not be copied on the host
        stored = beside(weight if input_first else weight.T, jax.tree.leaves(stack)[0])
        rounded = round_expert(stored, input_first=input_first)
        if isinstance(stack, PackedMxfp4):
            stack = pack_into(stack, rounded, layer, first=expert)
        else:
            stack = jax.tree.map(lambda room, part: put(room, part[0], (layer, expert)), stack, rounded)  # noqa: B023
        jax.block_until_ready(stack)
    return stack


@functools.partial(jax.jit, static_argnames="input_first")
def round_expert(weight: Float[Array, "K N"], *, input_first: bool) -> Mxfp4:
    """One expert [K, N], or else [N, K], as MXFP4 of [1, N, K]."""
    return quantize((weight.T if input_first else weight)[None])


def beside[T](tree: T, stacked: Array) -> T:
    """The tree on all devices of the stack's mesh, if it has one."""
    if not isinstance(stacked.sharding, NamedSharding):
        return tree
    return jax.device_put(tree, NamedSharding(stacked.sharding.mesh, PartitionSpec()))


@functools.partial(jax.jit, donate_argnums=0)
def put(
    stacked: Shaped[Array, "L ..."], leaf: Shaped[Array, "..."], index: int | tuple[int, ...]
) -> Shaped[Array, "L ..."]:
    """One array of the stack with a layer's, or an expert's of a layer, in its place."""
    place = index if isinstance(index, tuple) else (index,)
    leaf = jnp.expand_dims(leaf, tuple(range(len(place))))
    return lax.dynamic_update_slice(stacked, leaf, (*place, *(0,) * (stacked.ndim - len(place))))
