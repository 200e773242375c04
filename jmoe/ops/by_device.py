"""The layer as a jax.shard_map: each device computes its own experts, for the tokens of its group."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jmoe.ops.call import Tokens
from jmoe.ops.experts import Experts, Lora
from jmoe.ops.mesh_axes import MeshAxes, names_of, specs_of

type Layer = Callable[[Tokens, Experts, Lora | None, Any, Any, Any], jax.Array]
"""y, shaped as x is, of tokens, experts, LoRA, expert_offset, layer and choice_bias: the arguments below."""


def split_over_devices(function: Layer, mesh: AbstractMesh, axes: MeshAxes, arguments: tuple[Any, ...]) -> jax.Array:
    """function of each device's own experts, summed over the devices that hold them."""
    on_device = functools.partial(_on_device, function, axes)
    specs = specs_of_arguments(axes, arguments)
    split = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=axes.tokens, axis_names=free_axes(mesh))
    return split(*arguments)


def specs_of_arguments(axes: MeshAxes, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The PartitionSpec of each array."""
    tokens, experts, lora, *others = arguments
    whole = (None if other is None else P() for other in others)
    return *specs_of(tokens, experts, lora, others[1] is not None, axes), *whole


def free_axes(mesh: AbstractMesh) -> set[Any]:
    """Those that no jax.shard_map around has split."""
    return {name for name in mesh.axis_names if name not in mesh.manual_axes}


def alike(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arrays, each marked as varying over every axis of a jax.shard_map that one of them varies over.

    Inside one a replicated x and sharded experts differ in that, and results vary where any operand does.
    """
    varying = frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(arguments)))
    if not varying:
        return arguments

    def mark(leaf: Any) -> Any:
        missing = varying - jax.typeof(leaf).manual_axis_type.varying
        return lax.pcast(leaf, tuple(sorted(missing, key=str)), to="varying") if missing else leaf

    return jax.tree.map(mark, arguments)


def _on_device(
    function: Layer,
    axes: MeshAxes,
    tokens: Tokens,
    experts: Experts,
    lora: Lora | None,
    offset: Any,
    layer: Any,
    choice_bias: Any,
) -> jax.Array:
    """What splits both tokens and experts is taken from the tokens for the products: they are gathered, and the sums
    scattered as they were."""
    here = names_of((axes.experts,))
    both = [tuple(name for name in names_of((entry,)) if name in here) for entry in axes.tokens]
    elsewhere = tuple(name for name in here if name not in names_of(both))
    if here and tokens.router_logits is not None:
        # Their gradient is a sum over devices, and rounded once then.
        tokens = dataclasses.replace(tokens, router_logits=lax.convert_element_type(tokens.router_logits, jnp.float32))
    for axis, names in enumerate(both):
        if names:
            tokens = jax.tree.map(functools.partial(lax.all_gather, axis_name=names, axis=axis, tiled=True), tokens)
    offset = 0 if offset is None else offset
    if here:
        offset = offset + lax.axis_index(here).astype(jnp.int32) * experts.down.shape[-3]
    y = function(*alike((tokens, experts, lora, offset, layer, choice_bias)))
    for axis, names in enumerate(both):
        if names:
            y = lax.psum_scatter(y, names, scatter_dimension=axis, tiled=True)
    return lax.psum(y, elsewhere) if elsewhere else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def split_inside_shard_map(
    function: Layer, mesh: AbstractMesh, axes: MeshAxes, arguments: tuple[Any, ...]
) -> jax.Array:
    """As split_over_devices, inside a jax.shard_map over other axes.

    JAX cannot lower the gradient of one shard_map inside another that it makes itself (0.11.2 and 0.12.0.1: what is
    kept of the forward pass names axes of both). Here it is a shard_map too, which computes the forward pass again.
    """
    return split_over_devices(function, mesh, axes, arguments)


@jax.tree_util.register_static
class _Places(tuple[int, ...]):
    """Places of leaves, static among what is kept."""


def _forward(
    function: Layer, mesh: AbstractMesh, axes: MeshAxes, primals: tuple[Any, ...]
) -> tuple[jax.Array, tuple[_Places, tuple[Any, ...]]]:
    arguments = jax.tree.map(lambda primal: primal.value, primals)
    wanted = _Places(place for place, primal in enumerate(jax.tree.leaves(primals)) if primal.perturbed)
    return split_inside_shard_map(function, mesh, axes, arguments), (wanted, arguments)


def _backward(
    function: Layer, mesh: AbstractMesh, axes: MeshAxes, kept: tuple[_Places, tuple[Any, ...]], dy: Any
) -> tuple[Any]:
    wanted, arguments = kept
    leaves, tree = jax.tree.flatten(arguments)
    specs = jax.tree.leaves(specs_of_arguments(axes, arguments))
    gradients: dict[int, jax.Array] = {}
    if wanted and not isinstance(dy, SymbolicZero):

        def on_device(dy: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
            def y(point: list[jax.Array]) -> jax.Array:
                at = list(leaves)
                for place, leaf in zip(wanted, point, strict=True):
                    at[place] = leaf
                return _on_device(function, axes, *jax.tree.unflatten(tree, at))

            return jax.vjp(y, [leaves[place] for place in wanted])[1](dy)[0]

        of_wanted = [specs[place] for place in wanted]
        inputs = (axes.tokens, *specs)
        pullback = jax.shard_map(on_device, mesh=mesh, in_specs=inputs, out_specs=of_wanted, axis_names=free_axes(mesh))
        gradients = dict(zip(wanted, pullback(dy, *leaves), strict=True))
    return (jax.tree.unflatten(tree, [gradients.get(place) for place in range(len(leaves))]),)


split_inside_shard_map.defvjp(_forward, _backward, symbolic_zeros=True)
