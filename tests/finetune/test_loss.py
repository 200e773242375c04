"""Cross-entropy in chunks against optax's on all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from jmoe.finetune.loss import cross_entropy


def whole(hidden: Array, head: Array, targets: Array, weights: Array) -> Array:
    """The same with the logits of all positions."""
    logits = jnp.einsum("ph,vh->pv", hidden, head, precision="highest")
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def arguments(positions: int = 13) -> tuple[Array, Array, Array, Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (positions, 8)), jax.random.normal(keys[1], (30, 8))
    weights = (jax.random.uniform(keys[3], (positions,)) < 0.7).astype(jnp.float32)
    return hidden, head, jax.random.randint(keys[2], (positions,), 0, 30), weights


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_loss_and_gradient_are_those_of_all_logits(chunk: int) -> None:
    hidden, *rest = arguments()
    loss, gradient = jax.value_and_grad(lambda x: 3 * cross_entropy(x, *rest, chunk))(hidden)
    wanted, wanted_gradient = jax.value_and_grad(lambda x: 3 * whole(x, *rest))(hidden)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted_gradient, atol=1e-5)
    np.testing.assert_allclose(3 * cross_entropy(hidden, *rest, chunk), wanted, rtol=1e-5)


def test_positions_left_out_may_hold_anything() -> None:
    hidden, head, targets, weights = arguments()
    out = int(jnp.argmin(weights))
    loss, gradient = jax.value_and_grad(cross_entropy)(hidden.at[out].set(jnp.nan), head, targets, weights, 4)
    assert jnp.isfinite(loss)
    assert not gradient[out].any()


def test_logits_of_all_positions_are_never_held() -> None:
    positions, vocabulary, chunk = 1024, 2048, 64
    shapes = [(positions, 8), (vocabulary, 8), (positions,), (positions,)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    given = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, dtypes, strict=True)]
    step = jax.jit(jax.value_and_grad(lambda *arrays: cross_entropy(*arrays, chunk)))
    memory = step.lower(*given).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * positions * vocabulary / 2
