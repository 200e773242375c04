"""Decoding's products and attention: compiled for the architectures they declare, and by XLA where there is no GPU."""

import jax
import jax.numpy as jnp
import pytest

from jmoe.ops.decode.cached_attention import cached_attention
from jmoe.ops.decode.linear import MOST_ROWS, Expand, decode_linear
from jmoe.ops.decode.norm_linear import Narrow, norm_linear
from jmoe.ops.target import Target

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def lowered(function: object, *arguments: object) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def launches(function: object, *arguments: object) -> int:
    return lowered(function, *arguments).count("@triton_kernel_call_ffi")


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


INDEX = jax.ShapeDtypeStruct((), jnp.int32)


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rank", [None, 48])
@pytest.mark.parametrize("rows", [1, 16, MOST_ROWS])
def test_a_product_of_few_rows_compiles(architecture: str, rank: int | None, rows: int) -> None:
    lora = None if rank is None else Expand(bf16(rows, rank), bf16(24, 5120, rank))
    call = lambda *arrays: decode_linear(*arrays, target=Target(architecture))  # noqa: E731
    assert launches(call, bf16(rows, 2880), bf16(24, 5120, 2880), bf16(24, 5120), INDEX, lora) == 1


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


def test_elsewhere_xla_takes_the_layer_out_of_the_stack() -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    x, weight, bias, shrunk, b = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, [(3, 32), (2, 8, 32), (2, 8), (3, 4), (2, 16, 4)], strict=True)
    )
    got = jax.jit(decode_linear)(x, weight, bias, jnp.int32(1), Expand(shrunk, b)).astype(jnp.float32)
    wide = [array.astype(jnp.float32) for array in (x, weight, bias, shrunk, b)]
    want = wide[0] @ wide[1][1].T + wide[2][1] + wide[3] @ wide[4][1, :8].T
    assert jnp.allclose(got, want, rtol=1e-2, atol=1e-2)
