"""Calls inside jax.shard_map, and on meshes: each device computes the tokens of its group on its own experts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jmoe.ops.by_device import Layer, alike, free_axes, specs_of_arguments, split_inside_shard_map, split_over_devices
from jmoe.ops.call import Tokens
from jmoe.ops.experts import Experts, Lora
from jmoe.ops.mesh_axes import MeshAxes, check_divides, explicit_axes, mesh_of


def on_mesh(
    function: Layer,
    tokens: Tokens,
    experts: Experts,
    lora: Lora | None,
    expert_offset: Any,
    layer: Any,
    choice_bias: Any,
    mesh_axes: MeshAxes | None,
) -> jax.Array:
    """function(...), whatever mesh its arrays are on.

    On explicit axes, whose splits are part of the arrays' types, and on those that mesh_axes names, each device
    computes its own experts in a jax.shard_map; y is sharded as x is. On Auto axes the rule of jmoe.ops.partition does
    so.
    """
    arguments = tokens, experts, lora, expert_offset, layer, choice_bias
    mesh, mesh_axes = mesh_of(arguments), mesh_axes or None
    if mesh_axes is None and not mesh.explicit_axes:
        compiled = mesh.size > 1 and not mesh.manual_axes
        return (_compiled if compiled else _as_it_is)(function, *arguments)
    axes = explicit_axes(tokens, experts, lora, layer is not None)
    if mesh_axes is not None:
        check_divides(mesh_axes, mesh, tokens.x.shape[:-1], experts.down.shape[-3])
        if axes and axes != mesh_axes:
            raise ValueError(f"mesh_axes must be what the arrays' types say on explicit axes, {axes}, got {mesh_axes}")
        axes = mesh_axes
    elif not axes or mesh.size == 1 or any(mesh.shape[name] > 1 for name in mesh.auto_axes) or _in_vmap_over_axes(mesh):
        # What Auto axes split is not known here, nor what those do over which a jax.vmap around this maps.
        sharding = jax.NamedSharding(mesh, jax.typeof(tokens.x).sharding.spec)
        whole = jax.sharding.auto_axes(
            lambda *arguments: function(*alike(arguments)), axes=mesh.explicit_axes, out_sharding=sharding
        )
        return whole(*arguments)
    return _by_device(function, mesh, axes, *arguments)


def _as_it_is(function: Layer, *arguments: Any) -> jax.Array:
    return function(*alike(arguments))


_compiled = jax.jit(_as_it_is, static_argnums=0)
"""Also where nothing around is compiled: XLA asks for the rule of Auto axes when it compiles."""


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _by_device(function: Layer, mesh: AbstractMesh, axes: MeshAxes, *arguments: Any) -> jax.Array:
    """function of each device's own experts, summed over the devices that hold them."""
    tokens, experts, lora, offset, layer, choice_bias = arguments
    offset = None if isinstance(offset, int) and offset == 0 else jnp.asarray(offset, jnp.int32)
    given = tokens, experts, lora, offset, None if layer is None else jnp.asarray(layer), choice_bias
    placed = jax.tree.map(functools.partial(_place, mesh), given, specs_of_arguments(axes, given))
    split = split_inside_shard_map if mesh.manual_axes else split_over_devices
    return split(function, mesh, axes, placed)


def _in_vmap_over_axes(mesh: AbstractMesh) -> bool:
    """Whether a jax.vmap maps over an axis of arrays that explicit axes of the mesh split, which types do not tell."""
    try:
        jax.eval_shape(jax.shard_map(tuple, mesh=mesh, in_specs=(), out_specs=(), axis_names=free_axes(mesh)))
    except ValueError:  # such axes cannot be named
        return True
    return False


def _place(mesh: AbstractMesh, array: jax.Array, spec: P) -> jax.Array:
    """The array split as shard_map wants it, whose rule on explicit axes is that it is so already."""
    if any(kind == AxisType.Explicit for kind in mesh.axis_types):
        return jax.sharding.reshard(array, jax.NamedSharding(mesh, spec))
    return array
