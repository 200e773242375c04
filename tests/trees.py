"""Comparing pytrees of arrays."""

import jax
import jax.numpy as jnp


def tree_equal(a: object, b: object) -> bool:
    """Whether two pytrees have one structure and equal leaves."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(jnp.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
