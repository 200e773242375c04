"""Dense products whose gradients are products in the dtype of activations."""

import functools
import re

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

ALIGNMENT = 64
"""Columns of a product's operands that are a multiple of it are read by whole tiles."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, x: Array, w: Array) -> Array:
    """An einsum in x's dtype, summed in float32.

    Its gradients are products in x's dtype too, in which torch's backward pass multiplies as well: XLA's own would
    multiply by the float32 gradient of the result, which no GPU's matrix units take.
    """
    return einsum_in_float32(equation, x, w.astype(x.dtype))


def einsum_in_float32(equation: str, *arrays: Array) -> Array:
    """Summed in float32, whatever the dtype of the arrays."""
    return jnp.einsum(equation, *arrays, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _product_forward(equation: str, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(equation, x, w), (x, w)


def _product_backward(equation: str, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, w = kept
    of_x, of_w, of_result = re.split(",|->", equation)
    gradient = gradient.astype(x.dtype)
    to_x = einsum_in_float32(f"{of_result},{of_w}->{of_x}", gradient, w.astype(x.dtype))
    to_w = einsum_in_float32(f"{of_result},{of_x}->{of_w}", gradient, x)
    return to_x.astype(x.dtype), to_w.astype(w.dtype)


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def linear_and_expand(
    x: Float[Array, "B T K"],
    weight: Float[Array, "N K"],
    bias: Float[Array, " N"],
    shrunk: Float[Array, "B T R"],
    b: Float[Array, "N R"],
) -> Float[Array, "B T N"]:
    """x weight^T + bias + shrunk b^T as one product, of x, shrunk and 1 beside each other.

    A sum of several would go through memory in float32.
    """
    ones = jnp.ones((*x.shape[:2], 1), x.dtype)
    return jnp.einsum(
        "btk,nk->btn",
        side_by_side(x, shrunk, ones),
        side_by_side(weight, b, bias[:, None], dtype=x.dtype),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=x.dtype,
    )


def side_by_side(*columns: Array, dtype: DTypeLike | None = None) -> Array:
    """The arrays' columns, then zeros up to a width that matrix units take."""
    whole = jnp.concatenate([part.astype(dtype or part.dtype) for part in columns], axis=-1)
    return jnp.pad(whole, [(0, 0)] * (whole.ndim - 1) + [(0, -whole.shape[-1] % ALIGNMENT)])


def _linear_and_expand_forward(
    x: Array, weight: Array, bias: Array, shrunk: Array, b: Array
) -> tuple[Array, tuple[Array, ...]]:
    return linear_and_expand(x, weight, bias, shrunk, b), (x, weight, bias, shrunk, b)


def _linear_and_expand_backward(kept: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    x, weight, bias, shrunk, b = kept
    of_inputs = jnp.einsum(
        "btn,nk->btk",
        gradient,
        side_by_side(weight, b, dtype=x.dtype),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=x.dtype,
    )
    to_x, to_shrunk, _ = jnp.split(of_inputs, (x.shape[-1], x.shape[-1] + shrunk.shape[-1]), axis=-1)
    to_weight, to_b = (einsum_in_float32("btn,btk->nk", gradient, inputs) for inputs in (x, shrunk))
    to_bias = gradient.astype(jnp.float32).sum(axis=(0, 1))
    return (
        to_x,
        to_weight.astype(weight.dtype),
        to_bias.astype(bias.dtype),
        to_shrunk,
        to_b.astype(b.dtype),
    )


linear_and_expand.defvjp(_linear_and_expand_forward, _linear_and_expand_backward)
