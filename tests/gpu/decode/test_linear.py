"""The dense product of few rows on a GPU at gpt-oss-20b's sizes, beside XLA's operations in float32."""

import jax
import jax.numpy as jnp
import numpy as np
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
    wide, wide_lora = jax.tree.map(lambda array: array.astype(jnp.float32), ((x, weight, bias), lora))
    with jax.default_matmul_precision("highest"):
        want = linear_by_xla(*wide, jnp.ones(1, jnp.int32), *jax.tree.leaves(wide_lora))
    assert relative_error(got, want) <= BFLOAT16.relative


@pytest.mark.parametrize(("adapters", "rank"), [(8, 48), (8, 16), (32, 48), (32, 192)])
@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize(("n", "k"), [(5120, 2880), (2880, 4096)])
def test_each_row_has_lora_of_its_own_adapter(rows: int, n: int, k: int, adapters: int, rank: int) -> None:
    """Beside float64, as with one adapter for all bit for bit, and base rows as without; what nobody has holds NaN."""
    rng = np.random.default_rng()
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)  # noqa: E731
    x, weight, bias = normal(rows, k), normal(2, n, k), normal(2, n)
    shrunk, b = normal(rows, rank), normal(2, adapters, n, rank)
    ids = rng.integers(-1, adapters, rows, np.int32)
    broken = adapters - 1
    b = b.at[0].set(jnp.nan).at[1, np.setdiff1d(np.arange(adapters), ids)].set(jnp.nan).at[1, broken].set(jnp.inf)
    call = jax.jit(decode_linear)
    given = Expand(shrunk, b.reshape(2, -1, rank), jnp.asarray(ids))
    got = call(x, weight, bias, jnp.int32(1), given)
    assert jnp.array_equal(got, call(x, weight, bias, jnp.int32(1), given), equal_nan=True)
    assert not np.isfinite(np.asarray(got[ids == broken], np.float32)).any()
    assert jnp.array_equal(got[ids < 0], call(x, weight, bias, jnp.int32(1))[ids < 0])
    for adapter in set(ids[ids >= 0].tolist()) - {broken}:
        alone = call(x, weight, bias, jnp.int32(1), Expand(shrunk, b[:, adapter]))
        assert jnp.array_equal(got[ids == adapter], alone[ids == adapter])
    good = ids != broken
    wide = [np.asarray(array, np.float64) for array in (x, weight[1], bias[1], shrunk)]
    want = wide[0] @ wide[1].T + wide[2]
    for row in np.flatnonzero((ids >= 0) & good):
        want[row] += np.asarray(b[1, ids[row]], np.float64) @ wide[3][row]
    error = np.linalg.norm(np.asarray(got, np.float64)[good] - want[good]) / np.linalg.norm(want[good])
    assert error <= BFLOAT16.relative or not good.any()
