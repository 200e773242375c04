"""Attention to a cache: compiled for the architectures it declares, and by XLA where there is no GPU."""

import jax
import jax.numpy as jnp
import pytest

from jmoe.ops.decode.cached_attention import cached_attention
from jmoe.ops.target import Target
from tests.ops.decode.lowered import ARCHITECTURES, INDEX, bf16, lowered


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("batch", "slots"), [(1, 128), (16, 1088), (3, 100)])
def test_attention_to_a_cache_compiles_and_writes_it_in_place(architecture: str, batch: int, slots: int) -> None:
    positions, factors = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((batch, 32), jnp.float32)
    call = lambda *arrays: cached_attention(*arrays, target=Target(architecture))  # noqa: E731
    cache = bf16(12, batch, 8, slots, 128)
    program = lowered(call, bf16(batch, 80, 64), factors, factors, cache, INDEX, positions, bf16(24, 64), INDEX)
    calls = [line for line in program.splitlines() if "@triton_kernel_call_ffi" in line]
    # One for a window's slots. The cache is the fourth operand, and the last result, after what is written anew.
    split = slots > 128
    assert len(calls) == 1 + split
    alias = f"output_operand_alias<output_tuple_indices = [{3 if split else 1}], operand_index = 3, "
    assert [alias in line for line in calls] == [True, *[False] * split]


def test_elsewhere_xla_puts_the_token_in_the_cache_and_attends_to_it() -> None:
    batch, heads, key_heads, slots, dim = 2, 4, 2, 5, 8
    keys = jax.random.split(jax.random.key(2), 3)
    given = jax.random.normal(keys[0], (batch, heads + 2 * key_heads, dim))
    cache = jax.random.normal(keys[1], (3, batch, key_heads, slots, 2 * dim))
    angles = jax.random.uniform(keys[2], (batch, dim // 2))
    position, sinks = jnp.array([0, 7]), jnp.zeros((4, heads)).at[2].set(-jnp.inf)
    attended, entries = cached_attention(
        given, jnp.cos(angles), jnp.sin(angles), cache, jnp.int32(1), position, sinks, jnp.int32(2)
    )
    # The first token sees its own value alone.
    values = given[:, heads + key_heads :]
    assert jnp.allclose(attended[0], jnp.repeat(values[0], heads // key_heads, axis=0), atol=1e-6)
    assert jnp.array_equal(entries[1, 0, :, 0, dim:], values[0])
    assert jnp.array_equal(entries[1, 1, :, 2, dim:], values[1])
    first, second = jnp.split(given[1, heads], 2)
    turned = jnp.concatenate(
        [
            first * jnp.cos(angles[1]) - second * jnp.sin(angles[1]),
            second * jnp.cos(angles[1]) + first * jnp.sin(angles[1]),
        ]
    )
    assert jnp.allclose(entries[1, 1, 0, 2, :dim], turned, atol=1e-6)
    changed = jnp.any(entries != cache, axis=(2, 4))
    assert jnp.argwhere(changed).tolist() == [[1, 0, 0], [1, 1, 2]]
