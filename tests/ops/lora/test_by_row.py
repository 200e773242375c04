"""LoRA of many rows by their own adapters: compiled for the architectures it declares, and by XLA elsewhere."""

import jax
import jax.numpy as jnp
import pytest

from jmoe.ops.lora.by_row import StackedFactors, lora_by_row
from jmoe.ops.target import Target
from tests.ops.decode.lowered import ARCHITECTURES, INDEX, bf16, launches


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("rows", "adapters", "rank"), [(128, 32, 48), (4096, 8, 192)])
def test_it_compiles(architecture: str, rows: int, adapters: int, rank: int) -> None:
    n, k = 5120, 2880
    factors = StackedFactors(
        bf16(24, adapters, rank, k),
        jax.ShapeDtypeStruct((24, adapters, rank), jnp.float32),
        bf16(24, adapters, n, rank),
    )
    product, ids = jax.ShapeDtypeStruct((rows, n), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    call = lambda *arrays: lora_by_row(*arrays, target=Target(architecture))  # noqa: E731
    assert launches(call, bf16(rows, k), product, bf16(n), ids, INDEX, factors) == 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_elsewhere_xla_takes_each_rows_adapter(dtype: jnp.dtype) -> None:
    """Rows of others keep their bits beside one that holds NaN."""
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = [(5, 32), (5, 8), (8,), (2, 3, 4, 32), (2, 3, 4), (2, 3, 8, 4)]
    x, product, bias, a, scale, b = (jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True))
    x, bias, a, b = (array.astype(dtype) for array in (x, bias, a, b))
    a = a.at[1, 1].set(jnp.nan)
    ids = jnp.array([2, -1, 1, 0, 3])
    got = jax.jit(lora_by_row)(x, product, bias, ids, jnp.int32(1), StackedFactors(a, scale, b))
    assert got.dtype == dtype
    base = product + bias.astype(jnp.float32)
    assert jnp.array_equal(got[jnp.array([1, 4])], base[jnp.array([1, 4])].astype(dtype))
    assert jnp.isnan(got[2]).all()
    for row, adapter in ((0, 2), (3, 0)):
        shrunk = (x[row].astype(jnp.float32) @ a[1, adapter].astype(jnp.float32).T * scale[1, adapter]).astype(dtype)
        want = base[row] + shrunk.astype(jnp.float32) @ b[1, adapter].astype(jnp.float32).T
        tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
        assert jnp.allclose(got[row].astype(jnp.float32), want, rtol=tolerance, atol=tolerance)
