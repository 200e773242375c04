"""Calls inside jax.shard_map, and on meshes whose axes are explicit."""

from collections.abc import Callable

import jax
from jax import lax

from jmoe.ops.call import Call


def on_mesh(function: Callable[[Call], jax.Array], call: Call) -> jax.Array:
    """function(call), whatever mesh its arrays are on.

    Inside jax.shard_map a replicated x and sharded experts differ in the mesh axes that they vary over: each array is
    marked as varying over every axis that one of them varies over, as results vary where any operand does. On explicit
    axes, as jax.make_mesh makes them, XLA shards what is within, and y is sharded as x is: results of a scan over
    experts, or of launches, have no sharding that JAX could tell by rules.
    """
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(call)]
    varying = frozenset().union(*(kind.manual_axis_type.varying for kind in types))
    if varying:
        call = jax.tree.map(
            lambda leaf: (
                lax.pcast(leaf, tuple(sorted(missing, key=str)), to="varying")
                if (missing := varying - jax.typeof(leaf).manual_axis_type.varying)
                else leaf
            ),
            call,
        )
    mesh = next((kind.sharding.mesh for kind in types if kind.sharding.mesh.explicit_axes), None)
    if mesh is None:
        return function(call)
    sharding = jax.NamedSharding(mesh, jax.typeof(call.tokens.x).sharding.spec)
    return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=sharding)(call)
