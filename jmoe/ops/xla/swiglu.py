"""The activation in plain jax.numpy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmoe.triton_src.activation import SwiGLU


def swiglu(z: Float[Array, "T 2I"], activation: SwiGLU) -> Float[Array, "T I"]:
    """The activation of gate_up's results."""
    gate, up = (z[:, 0::2], z[:, 1::2]) if activation.interleaved else jnp.split(z, 2, axis=1)
    if activation.limit is not None:
        gate = jnp.minimum(gate, activation.limit)
        up = jnp.clip(up, -activation.limit, activation.limit)
    return gate * jax.nn.sigmoid(activation.alpha * gate) * (up + activation.offset)
