"""The dense product of few rows on a GPU at gpt-oss-20b's sizes, beside XLA's operations in float32."""

import jax
import jax.numpy as jnp
import pytest

from jmoe.ops.decode.linear import Expand, decode_linear, linear_by_xla
from tests.gpu.decode.errors import relative_error
from tests.tolerances import BFLOAT16

pytestmark = pytest.mark.gpu


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
