"""Sum, norm and narrow product on a GPU at gpt-oss-20b's sizes, beside XLA's operations in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops.decode.norm_linear import Narrow, norm_linear
from jmoe.ops.norm import rms_norm
from tests.gpu.decode.errors import relative_error
from tests.tolerances import BFLOAT16

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("columns", [32, 48, 128])
@pytest.mark.parametrize("rows", [1, 4, 7, 16, 33, 64])
def test_a_norm_and_its_narrow_product(rows: int, columns: int) -> None:
    """The router's, with a bias, and LoRA's first half of q, k and v, with a scale, of the first of two adapters."""
    keys = jax.random.split(jax.random.key(rows), 6)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)  # noqa: E731
    x, addend, norm = normal(keys[0], rows, 2880), normal(keys[1], rows, 2880), normal(keys[2], 3, 2880)
    weight, bias = normal(keys[3], 3, 2 * columns, 2880), normal(keys[4], 3, 2 * columns)
    scale = jax.random.normal(keys[5], bias.shape)

    @jax.jit
    def call(index: jax.Array) -> tuple:
        narrow = Narrow(weight, columns, scale=scale, bias=bias)
        return tuple(norm_linear(x, index, addend=addend, norm=norm, eps=1e-5, narrow=narrow))

    got = call(jnp.int32(1))
    assert all(map(jnp.array_equal, got, call(jnp.int32(1))))
    total, rounded, product = got
    assert jnp.array_equal(total, (x.astype(jnp.float32) + addend.astype(jnp.float32)).astype(jnp.bfloat16))
    assert relative_error(rounded, rms_norm(total.astype(jnp.float32), norm[1], 1e-5)) <= BFLOAT16.relative
    wide = jnp.dot(
        rounded.astype(jnp.float32), weight[1, :columns].astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST
    )
    want = wide * scale[1, :columns] + bias[1, :columns].astype(jnp.float32)
    assert relative_error(product, want) <= BFLOAT16.relative


@pytest.mark.parametrize("rows", [1, 7, 16, 64])
def test_a_narrow_product_without_norm(rows: int) -> None:
    """LoRA's first half of o."""
    keys = jax.random.split(jax.random.key(rows), 3)
    x = jax.random.normal(keys[0], (rows, 4096), jnp.bfloat16)
    weight = jax.random.normal(keys[1], (3, 16, 4096), jnp.bfloat16)
    scale = jax.random.normal(keys[2], (3, 16))
    call = jax.jit(lambda index: norm_linear(x, index, narrow=Narrow(weight, 16, scale=scale)).product)
    got = call(jnp.int32(2))
    assert jnp.array_equal(got, call(jnp.int32(2)))
    wide = jnp.dot(x.astype(jnp.float32), weight[2].astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    assert relative_error(got, wide * scale[2]) <= BFLOAT16.relative


@pytest.mark.parametrize(("adapters", "rank"), [(8, 48), (8, 16), (32, 48), (32, 192)])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_each_row_takes_its_own_adapters_weight(rows: int, adapters: int, rank: int) -> None:
    """LoRA's first half of q, k and v, beside float64 and one adapter for all; what nobody has holds NaN."""
    rng = np.random.default_rng()
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)  # noqa: E731
    x, addend, norm, a = normal(rows, 2880), normal(rows, 2880), normal(2, 2880), normal(2, adapters, rank, 2880)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (2, adapters, rank)), jnp.float32)
    ids = rng.integers(-1, adapters, rows, np.int32)
    absent = np.setdiff1d(np.arange(adapters), ids)
    a, scale = (stack.at[0].set(jnp.nan).at[1, absent].set(jnp.nan) for stack in (a, scale))

    @jax.jit
    def call(a: jax.Array, scale: jax.Array, ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        narrow = Narrow(a.reshape(2, -1, 2880), rank, scale=scale.reshape(2, -1), adapter_ids=ids)
        found = norm_linear(x, jnp.int32(1), addend=addend, norm=norm, eps=1e-5, narrow=narrow)
        return found.normal, found.product

    normal_rows, got = call(a, scale, jnp.asarray(ids))
    assert jnp.array_equal(got, call(a, scale, jnp.asarray(ids))[1])
    assert not got[ids < 0].any()
    for adapter in set(ids[ids >= 0].tolist()):
        alone = call(a[:, adapter], scale[:, adapter], None)[1]
        assert jnp.array_equal(got[ids == adapter], alone[ids == adapter])
    has = np.flatnonzero(ids >= 0)
    if has.size:
        own = [np.asarray(stack[1], np.float64)[ids[has]] for stack in (a, scale)]
        want = np.einsum("tk,trk->tr", np.asarray(normal_rows, np.float64)[has], own[0]) * own[1]
        assert np.linalg.norm(np.asarray(got, np.float64)[has] - want) <= BFLOAT16.relative * np.linalg.norm(want)
