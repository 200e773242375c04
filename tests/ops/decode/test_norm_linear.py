"""Sum, norm and narrow product: compiled for the architectures they declare, and by XLA where there is no GPU."""

import jax
import jax.numpy as jnp
import pytest

from jmoe.ops.decode.linear import MOST_ROWS
from jmoe.ops.decode.norm_linear import Narrow, norm_linear
from jmoe.ops.target import Target
from tests.ops.decode.lowered import ARCHITECTURES, INDEX, bf16, launches


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 16, MOST_ROWS])
def test_a_norm_and_what_is_made_of_it_compile(architecture: str, rows: int) -> None:
    x, norm, weight, bias = bf16(rows, 2880), bf16(24, 2880), bf16(24, 2 * 48, 2880), bf16(24, 2 * 48)
    scale = jax.ShapeDtypeStruct(bias.shape, jnp.float32)

    def route(x: jax.Array, addend: jax.Array, *stacks: jax.Array) -> tuple:
        norm, weight, bias, index = stacks
        narrow = Narrow(weight, 96, bias=bias)
        return norm_linear(x, index, addend=addend, norm=norm, eps=1e-5, narrow=narrow, target=Target(architecture))

    def shrink(x: jax.Array, weight: jax.Array, scale: jax.Array, index: jax.Array) -> tuple:
        return norm_linear(x, index, narrow=Narrow(weight, 48, scale=scale), target=Target(architecture))

    def alone(x: jax.Array, norm: jax.Array, index: jax.Array) -> tuple:
        return norm_linear(x, index, norm=norm, eps=1e-5, target=Target(architecture))

    assert launches(route, x, x, norm, weight, bias, INDEX) == 1
    assert launches(shrink, x, weight, scale, INDEX) == 1
    assert launches(alone, x, norm, INDEX) == 1


def test_elsewhere_xla_makes_the_norm_and_its_product() -> None:
    keys = jax.random.split(jax.random.key(1), 6)
    shapes = [(3, 32), (3, 32), (2, 32), (2, 10, 32), (2, 10), (2, 10)]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    x, addend, norm, weight, scale, bias = arrays
    got = norm_linear(x, jnp.int32(1), addend=addend, norm=norm, eps=1e-5, narrow=Narrow(weight, 4, scale, bias))
    want = x + addend
    assert jnp.allclose(got.sum, want)
    want = norm[1] * want / jnp.sqrt(jnp.mean(want**2, axis=1, keepdims=True) + 1e-5)
    assert jnp.allclose(got.normal, want, atol=1e-5)
    assert jnp.allclose(got.product, want @ weight[1, :4].T * scale[1, :4] + bias[1, :4], atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 16, MOST_ROWS])
def test_a_product_by_each_rows_adapter_compiles(architecture: str, rows: int) -> None:
    weight, scale = bf16(24, 8 * 48, 2880), jax.ShapeDtypeStruct((24, 8 * 48), jnp.float32)

    def shrink(x: jax.Array, norm: jax.Array, index: jax.Array, ids: jax.Array, *factors: jax.Array) -> tuple:
        narrow = Narrow(factors[0], 48, scale=factors[1], adapter_ids=ids)
        return norm_linear(x, index, addend=x, norm=norm, eps=1e-5, narrow=narrow, target=Target(architecture))

    ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
    assert launches(shrink, bf16(rows, 2880), bf16(24, 2880), INDEX, ids, weight, scale) == 1


def test_elsewhere_xla_takes_each_rows_adapter() -> None:
    keys = jax.random.split(jax.random.key(1), 3)
    x, weight, scale = (jax.random.normal(*pair) for pair in zip(keys, [(5, 32), (2, 12, 32), (2, 12)], strict=True))
    x = x.at[1].set(jnp.inf)
    ids = jnp.array([2, -1, 0, 3, 1])
    got = norm_linear(x, jnp.int32(1), narrow=Narrow(weight, 4, scale, adapter_ids=ids)).product
    assert not got[jnp.array([1, 3])].any()
    for row, adapter in ((0, 2), (2, 0), (4, 1)):
        own = slice(4 * adapter, 4 * adapter + 4)
        assert jnp.allclose(got[row], x[row] @ weight[1, own].T * scale[1, own], atol=1e-4)
