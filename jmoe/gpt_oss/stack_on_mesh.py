"""The weights of all layers on a mesh: room for them, and each layer, or one expert of each device, put into its place.

Every device has its part of the room and puts its part of a layer there: nothing is sent.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jmoe.gpt_oss.stack import round_expert
from jmoe.ops.mxfp4 import BLOCK, Mxfp4, PackedMxfp4
from jmoe.ops.packed import empty_packed, pack_into

type Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Room:
    """How the arrays of all layers lie: stacked along a first axis, whose other axes a mesh splits."""

    mesh: Mesh
    layers: int

    def sharding(self, spec: P) -> NamedSharding:
        """On the mesh, by a spec."""
        return NamedSharding(self.mesh, spec)

    def empty(self, shape: tuple[int, ...], dtype: Any, spec: P) -> Array:
        """Zeros for an array of this shape in each layer; spec: of the stack."""
        return jnp.zeros((self.layers, *shape), dtype, device=self.sharding(spec))

    def empty_mxfp4(self, shape: tuple[int, ...], spec: P, *, packed: bool) -> PackedMxfp4 | Mxfp4:
        """Zeros for MXFP4 experts (E, N, K) in each layer."""
        experts, n, k = shape
        if packed:
            return empty_packed(self.layers, experts, n=n, k=k, device=self.sharding(spec))
        groups = (experts, n, k // BLOCK)
        return Mxfp4(self.empty((*groups, BLOCK // 2), jnp.uint8, spec), self.empty(groups, jnp.uint8, spec))

    def read(self, shape: tuple[int, ...], spec: P, read: Callable[[Index], np.ndarray]) -> Array:
        """An array of which each process reads what its devices have, each part once."""
        parts: dict[Index, np.ndarray] = {}

        def part(index: Index | None) -> np.ndarray:
            assert index is not None
            if index not in parts:
                parts[index] = read(index)
            return parts[index]

        return jax.make_array_from_callback(shape, self.sharding(spec), part)

    def put(self, stack: Array, leaf: Array, spec: P, layer: int) -> Array:
        """The stack, in its own memory, with a layer's array in its place; spec: of the stack."""
        return put_part(put_layer, self.mesh, spec, P(*spec[1:]), stack, leaf, np.array([layer], np.int32))

    def put_experts[Stack](
        self, stack: Stack, experts: Any, spec: P, layer: int, first: int = 0, *, input_first: bool | None = None
    ) -> Stack:
        """The same with some experts of each device in their places.

        experts: of a layer, an axis of experts first, which is split as the stack's is; dense ones that a stack in
          MXFP4 takes rounded are [in, out] or [out, in], as input_first says.
        first: the place of each device's first one of them, counted among its own.
        """
        change = PUT_EXPERTS[input_first]
        return put_part(change, self.mesh, spec, P(*spec[1:]), stack, experts, np.array([layer, first], np.int32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def put_part(change: Callable[..., Any], mesh: Mesh, spec: P, of_part: P, stack: Any, part: Any, place: Array) -> Any:
    """Each device's stack with its part of what is put, as `change` does."""
    return jax.shard_map(change, mesh=mesh, in_specs=(spec, of_part, P()), out_specs=spec, check_vma=False)(
        stack, part, place
    )


def put_layer(stack: Array, leaf: Array, place: Array) -> Array:
    """A layer's array into its place."""
    return lax.dynamic_update_slice(stack, leaf[None], (place[0], *(0,) * leaf.ndim))


def put_experts(stack: Any, experts: Any, place: Array, input_first: bool | None = None) -> Any:
    """Experts of a layer into their places, one at a time: packed or rounded on the way, if the stack is so."""

    def put_one(number: Array | int, stack: Any) -> Any:
        one = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, number, 1), experts)
        if isinstance(stack, Mxfp4 | PackedMxfp4) and not isinstance(one, Mxfp4):
            assert input_first is not None
            one = round_expert(one[0], input_first=input_first)
        if isinstance(stack, PackedMxfp4):
            return pack_into(stack, one, place[0], first=place[1] + number)
        return jax.tree.map(
            lambda room, leaf: lax.dynamic_update_slice(
                room, leaf[None], (place[0], place[1] + number, *(0,) * (leaf.ndim - 1))
            ),
            stack,
            one,
        )

    return lax.fori_loop(0, jax.tree.leaves(experts)[0].shape[0], put_one, stack)


PUT_EXPERTS = {flag: functools.partial(put_experts, input_first=flag) for flag in (None, True, False)}
"""One object each, by which jax.jit knows what it has compiled."""
