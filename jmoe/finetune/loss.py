"""Cross-entropy of the next token, without the logits of all tokens at once."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.log_probs import in_chunks, log_probs_of_logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden: Float[Array, "P H"],
    head: Float[Array, "V H"],
    targets: Int32[Array, " P"],
    weights: Float[Array, " P"],
    chunk: int,
) -> Float[Array, ""]:
    """The sum over positions of weight * -log softmax(hidden head^T)[target], in float32.

    The logits of `chunk` positions are held at a time. The head is a constant. When differentiated, the gradient in
    `hidden` is taken along with the loss, so that no logits are computed twice, as Liger (arXiv 2410.10989) does; that
    takes weights that are known before, which jmoe.gpt_oss.log_probs does without.

    Args:
      hidden: after the norm; the products with the head are of its dtype, summed in float32.
      targets: in [0, V).
      weights: 0 leaves a position out.
    """
    return _sum(hidden, head, targets, weights, chunk, with_gradient=False)[0]


def _sum(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int, *, with_gradient: bool
) -> tuple[Array, Array | None]:
    """(the loss, its gradient in hidden or None)."""
    positions, width = hidden.shape

    def one(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, Array | None]:
        x, target, weight = part
        logits = _product("ph,vh->pv", x, head)
        log_probs, normalizer = log_probs_of_logits(logits, target)
        # Selected, as a position that is left out may hold NaN.
        losses = jnp.where(weight > 0, -log_probs * weight, 0)
        if not with_gradient:
            return total + losses.sum(), None
        there = (jnp.arange(head.shape[0]) == target[:, None]).astype(logits.dtype)
        gradient = (jnp.exp(logits - normalizer[:, None]) - there) * weight[:, None]
        gradient = jnp.where(weight[:, None] > 0, gradient, 0).astype(x.dtype)
        return total + losses.sum(), _product("pv,vh->ph", gradient, head).astype(x.dtype)

    parts = in_chunks(hidden, chunk), in_chunks(targets, chunk), in_chunks(weights, chunk)
    total, gradients = lax.scan(one, jnp.float32(0), parts)
    return total, None if gradients is None else gradients.reshape(-1, width)[:positions]


def _product(equation: str, x: Array, head: Array) -> Array:
    """An einsum in x's dtype, summed in float32."""
    precision = lax.Precision.HIGHEST
    return jnp.einsum(equation, x, head.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)


def _forward(hidden: Array, head: Array, targets: Array, weights: Array, chunk: int) -> tuple[Array, Array | None]:
    return _sum(hidden, head, targets, weights, chunk, with_gradient=True)


def _backward(chunk: int, gradient: Array, scale: Array) -> tuple[Array, None, None, None]:
    # The head is frozen, targets are integers, and weights are given.
    return (gradient.astype(scale.dtype) * scale).astype(gradient.dtype), None, None, None


cross_entropy.defvjp(_forward, _backward)
