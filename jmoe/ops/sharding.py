"""Arrays inside jax.shard_map, and on meshes whose axes are explicit."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def vary_alike[T](tree: T) -> T:
    """The arrays of a pytree, each marked as varying over every mesh axis that one of them varies over.

    Inside jax.shard_map a replicated x and sharded experts differ in this; results vary where any operand does.
    """
    axes = frozenset().union(*(varying_axes(leaf) for leaf in jax.tree.leaves(tree)))

    def mark(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(leaf), key=str))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree) if axes else tree


def varying_axes(array: Any) -> frozenset[Any]:
    """The mesh axes over which an array's value differs."""
    return frozenset(jax.typeof(array).manual_axis_type.varying)


def by_auto_axes(function: Callable[[dict[str, jax.Array]], jax.Array], buffers: dict[str, jax.Array]) -> jax.Array:
    """function(buffers), sharded as x is; on explicit axes, as jax.make_mesh makes them, XLA shards what is within.

    Results of a scan over experts, or of launches, have no sharding that JAX could tell by rules.
    """
    meshes = (jax.typeof(array).sharding.mesh for array in buffers.values())
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if mesh is None:
        return function(buffers)
    sharding = jax.NamedSharding(mesh, jax.typeof(buffers["x"]).sharding.spec)
    return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=sharding)(buffers)
