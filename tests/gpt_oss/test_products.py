"""Dense products and their gradients."""

import jax
import jax.numpy as jnp
import pytest

from jmoe.gpt_oss.products import linear_and_expand, product


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def plain_product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("btk,nk->btn", x, w, precision="highest")


def plain_linear(x: jax.Array, weight: jax.Array, bias: jax.Array, shrunk: jax.Array, b: jax.Array) -> jax.Array:
    return plain_product(x, weight) + bias + plain_product(shrunk, b)


CASES = {
    "product": (lambda x, w: product("btk,nk->btn", x, w), plain_product, ((2, 9, 20), (12, 20))),
    "linear": (linear_and_expand, plain_linear, ((2, 9, 20), (12, 20), (12,), (2, 9, 3), (12, 3))),
}


@pytest.mark.parametrize("name", CASES)
def test_float32_results_and_gradients_are_those_of_plain_sums(name: str) -> None:
    call, plain, shapes = CASES[name]
    arrays = [normal(i, *shape) for i, shape in enumerate(shapes)]
    pull = normal(99, 2, 9, 12)
    got, got_gradients = jax.vjp(call, *arrays)
    want, want_gradients = jax.vjp(plain, *arrays)
    pairs = [(got, want), *zip(got_gradients(pull), want_gradients(pull), strict=True)]
    for one, other in pairs:
        assert jnp.abs(one - other).max() <= 1e-5 * jnp.abs(other).max()


@pytest.mark.parametrize("name", CASES)
def test_no_product_of_the_backward_pass_reads_float32(name: str) -> None:
    call, _, shapes = CASES[name]
    arrays = [normal(i, *shape).astype(jnp.bfloat16) for i, shape in enumerate(shapes)]
    gradient = jax.grad(lambda *arrays: jnp.sin(call(*arrays).astype(jnp.float32)).sum(), argnums=range(len(arrays)))
    program = jax.jit(gradient).lower(*arrays).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) >= len(CASES[name][2]) - 1
    assert not [line for line in products if "xf32>" in line.split(" : ")[1].split("->")[0]]


def test_a_bfloat16_linear_with_lora_rounds_once() -> None:
    _, plain, shapes = CASES["linear"]
    arrays = [normal(i, *shape).astype(jnp.bfloat16) for i, shape in enumerate(shapes)]
    got = linear_and_expand(*arrays)
    exact = plain(*(array.astype(jnp.float32) for array in arrays))
    assert got.dtype == jnp.bfloat16
    assert (jnp.abs(got.astype(jnp.float32) - exact) <= jnp.abs(exact) * 2**-8 + 1e-6).all()
