"""Attention to a cache on a GPU at gpt-oss-20b's sizes, beside XLA's operations in float32."""

import jax
import jax.numpy as jnp
import pytest

from jmoe.ops.decode.cached_attention import cached_attention, keep_and_attend_by_xla
from tests.gpu.decode.errors import relative_error
from tests.tolerances import BFLOAT16

pytestmark = pytest.mark.gpu


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
