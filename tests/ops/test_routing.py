"""jmoe.route: which experts, in which order, with which weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe import route


@settings(max_examples=30)
@given(st.integers(0, 30), st.integers(1, 256), st.integers(1, 8), st.integers(0, 10**6))
def test_ties_go_to_the_lower_expert(tokens: int, experts: int, top_k: int, seed: int) -> None:
    top_k = min(top_k, experts)
    logits = np.random.default_rng(seed).integers(-2, 3, (tokens, experts)).astype(np.float32)
    routing = route(jnp.asarray(logits), top_k)
    np.testing.assert_array_equal(routing.experts, np.argsort(-logits, axis=1, kind="stable")[:, :top_k])
    assert routing.experts.dtype == jnp.int32
    assert routing.weights.dtype == jnp.float32


def test_weights_are_the_softmax_of_the_chosen_logits() -> None:
    routing = route(jnp.array([[0.0, 2.0, 1.0, 9.0]]), 2)
    assert routing.experts.tolist() == [[3, 1]]
    np.testing.assert_allclose(routing.weights[0], jax.nn.softmax(jnp.array([9.0, 2.0])), rtol=1e-6)


def test_zeros_of_either_sign_tie() -> None:
    assert route(jnp.array([[-0.0, 0.0, -0.0]]), 2).experts.tolist() == [[0, 1]]


def test_nan_is_chosen_and_shows() -> None:
    routing = route(jnp.array([[5.0, jnp.nan, 7.0]]), 2)
    assert routing.experts.tolist() == [[1, 2]]
    assert jnp.isnan(routing.weights).all()


def test_leading_axes_are_kept() -> None:
    assert route(jnp.zeros((2, 3, 8), jnp.bfloat16), 4).experts.shape == (2, 3, 4)


def test_weights_have_the_gradient_of_a_softmax() -> None:
    logits = jnp.array([0.3, 2.0, -1.0, 0.9])
    cotangent = jnp.array([0.7, -0.2])
    got = jax.grad(lambda z: route(z, 2).weights @ cotangent)(logits)
    want = jax.grad(lambda z: jax.nn.softmax(z) @ cotangent)(logits[jnp.array([1, 3])])
    np.testing.assert_allclose(got[jnp.array([1, 3])], want, rtol=1e-5)
    assert got[0] == got[2] == 0


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"top_k must be between 1 and the number of experts \(4\), got 5"):
        route(jnp.zeros((2, 4)), 5)
    with pytest.raises(ValueError, match=r"top_k must be between 1 and the number of experts \(4\), got 0"):
        route(jnp.zeros((2, 4)), 0)
    with pytest.raises(ValueError, match="router_logits must be bfloat16 or float32, got int32"):
        route(jnp.zeros((2, 4), jnp.int32), 1)
