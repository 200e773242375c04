"""The dense product of few rows: compiled for the architectures it declares, and by XLA where there is no GPU."""

import jax
import jax.numpy as jnp
import pytest

from jmoe.ops.decode.linear import MOST_ROWS, Expand, decode_linear
from jmoe.ops.target import Target
from tests.ops.decode.lowered import ARCHITECTURES, INDEX, bf16, launches


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rank", [None, 48])
@pytest.mark.parametrize("rows", [1, 16, MOST_ROWS])
def test_a_product_of_few_rows_compiles(architecture: str, rank: int | None, rows: int) -> None:
    lora = None if rank is None else Expand(bf16(rows, rank), bf16(24, 5120, rank))
    call = lambda *arrays: decode_linear(*arrays, target=Target(architecture))  # noqa: E731
    assert launches(call, bf16(rows, 2880), bf16(24, 5120, 2880), bf16(24, 5120), INDEX, lora) == 1


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("rows", "rank"), [(1, 48), (16, 48), (MOST_ROWS, 192)])
def test_rows_with_adapters_of_their_own_are_one_launch_too(architecture: str, rank: int, rows: int) -> None:
    lora = Expand(bf16(rows, rank), bf16(24, 8 * 5120, rank), jax.ShapeDtypeStruct((rows,), jnp.int32))
    call = lambda *arrays: decode_linear(*arrays, target=Target(architecture))  # noqa: E731
    assert launches(call, bf16(rows, 2880), bf16(24, 5120, 2880), bf16(24, 5120), INDEX, lora) == 1


def test_elsewhere_xla_takes_each_rows_adapter() -> None:
    """As it takes one for all, and base rows' bits are those without LoRA; one adapter holds NaN."""
    keys = jax.random.split(jax.random.key(0), 5)
    x, weight, bias, shrunk, b = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, [(6, 32), (2, 8, 32), (2, 8), (6, 4), (2, 3, 8, 4)], strict=True)
    )
    b = b.at[1, 1].set(jnp.nan)
    ids = jnp.array([2, -1, 1, 0, 3, 2])
    got = jax.jit(decode_linear)(x, weight, bias, jnp.int32(1), Expand(shrunk, b.reshape(2, 24, 4), ids))
    base = jax.jit(decode_linear)(x, weight, bias, jnp.int32(1))
    for row, adapter in enumerate(ids.tolist()):
        known = adapter in range(3)
        own = jax.jit(decode_linear)(x, weight, bias, jnp.int32(1), Expand(shrunk, b[:, adapter])) if known else base
        assert jnp.array_equal(got[row], own[row], equal_nan=True)
