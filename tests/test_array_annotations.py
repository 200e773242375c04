"""Annotations of arrays are checked while tests run, but for public functions', which raise ValueErrors."""

import jax.numpy as jnp
import jaxtyping
import pytest

import jmoe
from jmoe.ops.norm import rms_norm


def test_a_shape_that_does_not_fit_inside_jmoe_is_an_error() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="weight"):
        rms_norm(jnp.ones((3, 4)), jnp.ones(5), 1e-5)


def test_a_public_function_says_it_itself() -> None:
    with pytest.raises(ValueError, match="must"):
        jmoe.quantize(jnp.ones((3, 4), jnp.int32))


def test_dtypes_are_not_promoted() -> None:
    with pytest.raises(jnp.TypePromotionError if hasattr(jnp, "TypePromotionError") else Exception, match="promotion"):
        jnp.ones(3, jnp.bfloat16) + jnp.ones(3, jnp.float32)
