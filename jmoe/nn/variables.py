"""Kinds of variables, and trees of them."""

import functools
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec


class Frozen(nnx.Variable):
    """A weight that no optimizer sees: not an nnx.Param. May hold a pytree, as MXFP4 experts are."""


def variable_of[V: nnx.Variable](kind: type[V], array: Any, spec: PartitionSpec | None = None) -> V:
    """A variable of this kind.

    spec: becomes the variable's metadata: nnx.get_partition_spec finds it, and nothing is moved for it. None: without.
    """
    return kind(array) if spec is None else kind(array, out_sharding=tuple(spec), eager_sharding=False)


def variables_of[T](kind: type[nnx.Variable], tree: T, specs: Any = None) -> T:
    """The tree with a variable of this kind in place of each array; specs: of each, as in variable_of, or None."""
    variable = functools.partial(variable_of, kind)
    return jax.tree.map(variable, tree) if specs is None else jax.tree.map(variable, tree, specs)


def values_of[T](tree: T) -> T:
    """The tree with each variable's array in its place."""
    return jax.tree.map(
        lambda variable: variable.get_value(), tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
