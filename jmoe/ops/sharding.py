"""Calls inside jax.shard_map, and on meshes: each device computes the tokens of its group on its own experts."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jmoe.ops.call import Tokens
from jmoe.ops.experts import Experts, Lora
from jmoe.ops.mesh_axes import MeshAxes, check_divides, explicit_axes, mesh_of, names_of, specs_of

type Layer = Callable[[Tokens, Experts, Lora | None, Any, Any], jax.Array]
"""y, shaped as x is, of tokens, experts, LoRA, expert_offset and layer."""


def on_mesh(
    function: Layer,
    tokens: Tokens,
    experts: Experts,
    lora: Lora | None,
    expert_offset: Any,
    layer: Any,
    mesh_axes: MeshAxes | None,
) -> jax.Array:
    """function(...), whatever mesh its arrays are on.

    On explicit axes, whose splits are part of the arrays' types, and on those that mesh_axes names, each device
    computes its own experts in a jax.shard_map; y is sharded as x is. On Auto axes the rule of jmoe.ops.partition does
    so.
    """
    arguments = tokens, experts, lora, expert_offset, layer
    mesh = mesh_of(arguments)
    if mesh_axes is None and not mesh.explicit_axes:
        return function(*_alike(arguments))
    axes = explicit_axes(tokens, experts, lora, layer is not None)
    if mesh_axes is not None:
        check_divides(mesh_axes, mesh, tokens.x.shape[:-1], experts.down.shape[-3])
        if axes and axes != mesh_axes:
            raise ValueError(f"mesh_axes must be what the arrays' types say on explicit axes, {axes}, got {mesh_axes}")
        axes = mesh_axes
    elif not axes or any(mesh.shape[name] > 1 for name in mesh.auto_axes) or _in_vmap_over_axes(mesh):
        # What Auto axes split is not known here, nor what those do over which a jax.vmap around this maps.
        sharding = jax.NamedSharding(mesh, jax.typeof(tokens.x).sharding.spec)
        whole = jax.sharding.auto_axes(
            lambda *arguments: function(*_alike(arguments)), axes=mesh.explicit_axes, out_sharding=sharding
        )
        return whole(*arguments)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
        return _by_device(function, mesh, axes, *arguments)
    return _compiled_by_device(function, mesh, axes, *arguments)


def _by_device(function: Layer, mesh: AbstractMesh, axes: MeshAxes, *arguments: Any) -> jax.Array:
    """function of each device's own experts, summed over the devices that hold them.

    What splits both tokens and experts is taken from the tokens for the products: they are gathered, and the sums
    scattered as they were.
    """
    tokens, experts, lora, offset, layer = arguments
    here = names_of((axes.experts,))
    both = [tuple(name for name in names_of((entry,)) if name in here) for entry in axes.tokens]
    elsewhere = tuple(name for name in here if name not in names_of(both))
    own = experts.down.shape[-3] // math.prod(mesh.shape[name] for name in here)

    def on_device(tokens: Tokens, experts: Experts, lora: Lora | None, offset: Any, layer: Any) -> jax.Array:
        for axis, names in enumerate(both):
            if names:
                tokens = jax.tree.map(functools.partial(lax.all_gather, axis_name=names, axis=axis, tiled=True), tokens)
        if here:
            offset = offset + lax.axis_index(here).astype(jnp.int32) * own
        y = function(*_alike((tokens, experts, lora, offset, layer)))
        for axis, names in enumerate(both):
            if names:
                y = lax.psum_scatter(y, names, scatter_dimension=axis, tiled=True)
        return lax.psum(y, elsewhere) if elsewhere else y

    specs = (*specs_of(tokens, experts, lora, layer is not None, axes), P(), None if layer is None else P())
    given = tokens, experts, lora, jnp.asarray(offset, jnp.int32), None if layer is None else jnp.asarray(layer)
    placed = jax.tree.map(functools.partial(_place, mesh), given, specs)
    split = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=axes.tokens, axis_names=_free(mesh))
    return split(*placed)


_compiled_by_device = jax.jit(_by_device, static_argnums=(0, 1, 2))
"""For calls outside jax.jit."""


def _in_vmap_over_axes(mesh: AbstractMesh) -> bool:
    """Whether a jax.vmap maps over an axis of arrays that explicit axes of the mesh split, which types do not tell."""
    try:
        jax.eval_shape(jax.shard_map(tuple, mesh=mesh, in_specs=(), out_specs=(), axis_names=_free(mesh)))
    except ValueError:  # such axes cannot be named
        return True
    return False


def _free(mesh: AbstractMesh) -> set[Any]:
    return {name for name in mesh.axis_names if name not in mesh.manual_axes}


def _place(mesh: AbstractMesh, array: jax.Array, spec: P) -> jax.Array:
    """The array split as shard_map wants it, whose rule on explicit axes is that it is so already."""
    if any(kind == AxisType.Explicit for kind in mesh.axis_types):
        return jax.sharding.reshard(array, jax.NamedSharding(mesh, spec))
    return array


def _alike(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
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
