"""Arrays inside jax.shard_map."""

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
