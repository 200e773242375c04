"""The norm before each half of a layer."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... H"], weight: Float[Array, " H"], eps: float) -> Float[Array, "... H"]:
    """weight * x / sqrt(mean(x²) + eps) in float32, rounded to x's dtype after the product with the weight."""
    wide = x.astype(jnp.float32)
    wide *= lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (jnp.broadcast_to(weight.astype(jnp.float32), x.shape) * wide).astype(x.dtype)
