"""Rotation of queries and keys by their positions."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(
    x: Float[Array, "B T N D"], cosine: Float[Array, "B T D/2"], sine: Float[Array, "B T D/2"]
) -> Float[Array, "B T N D"]:
    """x with its first and second halves turned against each other."""
    first, second = jnp.split(x, 2, axis=-1)
    cosine, sine = (factor[:, :, None, :].astype(x.dtype) for factor in (cosine, sine))
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
