"""The next token from logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray

LEAST_TEMPERATURE = 1e-30
"""Below it float32 would divide by zero, or nearly so."""


def sample(
    logits: Float[Array, "B V"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""] | float,
    top_p: Float[Array, ""] | float,
) -> Int32[Array, " B"]:
    """A token of softmax(logits / temperature), of the fewest whose probabilities sum to top_p or more.

    The largest is among them whatever top_p is.
    """
    # However small the temperature is, the largest stays 0 and no other becomes NaN.
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    ordered, tokens = jax.lax.top_k(below / jnp.maximum(temperature, LEAST_TEMPERATURE), logits.shape[-1])
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p) | (jnp.arange(logits.shape[-1]) == 0)
    chosen = jax.random.categorical(key, jnp.where(kept, ordered, -jnp.inf), axis=-1)
    return jnp.take_along_axis(tokens, chosen[:, None], axis=1)[:, 0].astype(jnp.int32)


def greedy(logits: Float[Array, "B V"]) -> Int32[Array, " B"]:
    """The likeliest token; of equals the first."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
