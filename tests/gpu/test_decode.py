"""Decoding's kernels on a GPU at gpt-oss-20b's sizes, beside XLA's operations in float32."""

import jax
import jax.numpy as jnp
import pytest

from jmoe.ops.decode.cached_attention import cached_attention, keep_and_attend_by_xla
from jmoe.ops.decode.linear import Expand, decode_linear, linear_by_xla
from jmoe.ops.decode.norm_linear import Narrow, norm_linear
from jmoe.ops.norm import rms_norm
from tests.tolerances import BFLOAT16

pytestmark = pytest.mark.gpu


def relative_error(got: jax.Array, want: jax.Array) -> float:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.parametrize(("batch", "slots"), [(1, 128), (16, 128), (1, 4096), (16, 1100)])
def test_attention_to_a_cache_that_takes_the_token_in(batch: int, slots: int) -> None:
    keys = jax.random.split(jax.random.key(batch + slots), 5)
    heads = jax.random.normal(keys[0], (batch, 80, 64), jnp.bfloat16)
    cache = jax.random.normal(keys[1], (3, batch, 8, slots, 128), jnp.bfloat16)
    sinks = 3 * jax.random.normal(keys[2], (5, 64), jnp.bfloat16)
    position = jax.random.randint(keys[3], (batch,), 0, 2 * slots, jnp.int32)
    angles = 6 * jax.random.uniform(keys[4], (batch, 32))
    # What no sequence has yet is never read, nor what stands where the latest token will.
    slot, last = jnp.arange(slots)[:, None], position[:, None, None, None]
    unread = (slot > last) | (slot == last % slots)
    rest = jnp.int32(1), position, sinks, jnp.int32(4)
    call = jax.jit(cached_attention)
    got, kept = call(heads, jnp.cos(angles), jnp.sin(angles), jnp.where(unread, jnp.nan, cache), *rest)
    again, whole = call(heads, jnp.cos(angles), jnp.sin(angles), cache, *rest)
    assert jnp.array_equal(got, again)
    with jax.default_matmul_precision("highest"):
        layer, position, sinks, sinks_layer = rest
        factors = [factor.astype(jnp.bfloat16) for factor in (jnp.cos(angles), jnp.sin(angles))]
        wide = [array.astype(jnp.float32) for array in (heads, *factors, cache)]
        want, entries = keep_and_attend_by_xla(*wide, layer.reshape(1), position, sinks, sinks_layer.reshape(1))
    assert relative_error(got, want) <= BFLOAT16.relative
    rows = jnp.arange(batch)
    written = (1, rows, slice(None), position % slots)
    assert relative_error(whole[written], entries[written]) <= BFLOAT16.relative
    assert jnp.array_equal(kept[written], whole[written])
    assert jnp.array_equal(whole.at[written].set(0), cache.at[written].set(0))


@pytest.mark.parametrize("rank", [None, 16, 48, 192])
@pytest.mark.parametrize("rows", [1, 7, 16, 64])
@pytest.mark.parametrize(("n", "k"), [(5120, 2880), (2880, 4096)])
def test_a_product_of_few_rows(rows: int, n: int, k: int, rank: int | None) -> None:
    keys = jax.random.split(jax.random.key(rows), 5)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)  # noqa: E731
    x, weight, bias = normal(keys[0], rows, k), normal(keys[1], 3, n, k), normal(keys[2], 3, n)
    lora = None if rank is None else Expand(normal(keys[3], rows, rank), normal(keys[4], 3, n, rank))
    call = jax.jit(decode_linear)
    got = call(x, weight, bias, jnp.int32(1), lora)
    assert jnp.array_equal(got, call(x, weight, bias, jnp.int32(1), lora))
    wide = [array.astype(jnp.float32) for array in (x, weight, bias)]
    with jax.default_matmul_precision("highest"):
        want = linear_by_xla(*wide, jnp.ones(1, jnp.int32), *(part.astype(jnp.float32) for part in lora or ()))
    assert relative_error(got, want) <= BFLOAT16.relative


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
