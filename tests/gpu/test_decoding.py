"""Decoding's kernels on a GPU at gpt-oss-20b's sizes, beside XLA's operations in float32."""

import jax
import jax.numpy as jnp
import pytest

from jmoe.ops.cached_attention import attend_by_xla, cached_attention
from jmoe.ops.stacked_linear import Expand, linear_by_xla, stacked_linear
from tests.tolerances import BFLOAT16

pytestmark = pytest.mark.gpu


def relative_error(got: jax.Array, want: jax.Array) -> float:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.parametrize(("batch", "slots"), [(1, 128), (16, 128), (1, 4096), (16, 1100)])
def test_attention_to_a_cache(batch: int, slots: int) -> None:
    keys = jax.random.split(jax.random.key(batch + slots), 4)
    q = jax.random.normal(keys[0], (batch, 64, 64), jnp.bfloat16)
    cache = jax.random.normal(keys[1], (3, batch, 8, slots, 128), jnp.bfloat16)
    sinks = 3 * jax.random.normal(keys[2], (64,), jnp.bfloat16)
    position = jax.random.randint(keys[3], (batch,), 0, 2 * slots, jnp.int32)
    # What no sequence has yet is never read.
    missing = jnp.arange(slots)[:, None] > position[:, None, None, None]
    call = jax.jit(cached_attention)
    got = call(q, jnp.where(missing, jnp.nan, cache), sinks, jnp.int32(1), position)
    wide = (q.astype(jnp.float32), cache.astype(jnp.float32))
    want = attend_by_xla(*wide, sinks, jnp.ones(1, jnp.int32), position)
    assert relative_error(got, want) <= BFLOAT16.relative
    assert jnp.array_equal(got, call(q, cache, sinks, jnp.int32(1), position))


@pytest.mark.parametrize("rank", [None, 16, 48, 192])
@pytest.mark.parametrize("rows", [1, 7, 16, 64])
@pytest.mark.parametrize(("n", "k"), [(5120, 2880), (2880, 4096)])
def test_a_product_of_few_rows(rows: int, n: int, k: int, rank: int | None) -> None:
    keys = jax.random.split(jax.random.key(rows), 5)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)  # noqa: E731
    x, weight, bias = normal(keys[0], rows, k), normal(keys[1], 3, n, k), normal(keys[2], 3, n)
    lora = None if rank is None else Expand(normal(keys[3], rows, rank), normal(keys[4], n, rank))
    call = jax.jit(stacked_linear)
    got = call(x, weight, bias, jnp.int32(1), lora)
    assert jnp.array_equal(got, call(x, weight, bias, jnp.int32(1), lora))
    wide = [array.astype(jnp.float32) for array in (x, weight, bias)]
    with jax.default_matmul_precision("highest"):
        want = linear_by_xla(*wide, jnp.ones(1, jnp.int32), *(part.astype(jnp.float32) for part in lora or ()))
    assert relative_error(got, want) <= BFLOAT16.relative
