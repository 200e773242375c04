"""Kinds of variables, and trees of them."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec


class Frozen(nnx.Variable):
    """A weight that no optimizer sees: not an nnx.Param. May hold a pytree, as MXFP4 experts are."""


def variables_of[T](kind: type[nnx.Variable], tree: T, specs: T | None = None) -> T:
    """The tree with a variable of this kind in place of each array.

    specs: a PartitionSpec for each, which becomes the variable's metadata: nnx.get_partition_spec finds it, and nothing
      is moved for it. None: without.
    """
    if specs is None:
        return jax.tree.map(kind, tree)

    def variable(array: Any, spec: PartitionSpec) -> nnx.Variable:
        return kind(array, out_sharding=tuple(spec), eager_sharding=False)

    return jax.tree.map(variable, tree, specs)


def values_of[T](tree: T) -> T:
    """The tree with each variable's array in its place."""
    return jax.tree.map(
        lambda variable: variable.get_value(), tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
