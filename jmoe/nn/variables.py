"""Kinds of variables."""

from flax import nnx


class Frozen(nnx.Variable):
    """A weight that no optimizer sees: not an nnx.Param. May hold a pytree, as MXFP4 experts are."""
