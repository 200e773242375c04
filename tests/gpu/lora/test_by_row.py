"""LoRA of many rows by their own adapters on a GPU at gpt-oss-20b's sizes, beside float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops.lora.by_row import StackedFactors, lora_by_row
from tests.tolerances import BFLOAT16

pytestmark = pytest.mark.gpu


def rows_of(rng: np.random.Generator, rows: int, adapters: int, length: int) -> np.ndarray:
    """Adapters of sequences of so many tokens, one after another."""
    return np.repeat(rng.integers(-1, adapters, -(-rows // length), np.int32), length)[:rows]


@pytest.mark.parametrize(("adapters", "rank"), [(8, 48), (32, 16), (32, 192)])
@pytest.mark.parametrize(("rows", "length"), [(65, 1), (128, 1), (1000, 90), (4096, 215)])
def test_each_row_has_lora_of_its_own_adapter(rows: int, length: int, adapters: int, rank: int) -> None:
    """Base rows have the bits they have without, and what nobody has, and the layer before, hold NaN."""
    rng = np.random.default_rng()
    n, k = 5120, 2880
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)  # noqa: E731
    ids = rows_of(rng, rows, adapters, length)
    ids[-1] = -1
    broken = int(ids[0]) if ids[0] >= 0 and (ids != ids[0]).sum() > 1 else -2
    x, bias, a, b = normal(rows, k) / k**0.5, normal(n), normal(2, adapters, rank, k), normal(2, adapters, n, rank)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (2, adapters, rank)), jnp.float32)
    absent = np.setdiff1d(np.arange(adapters), ids)
    a, scale, b = (stack.at[0].set(jnp.nan).at[1, absent].set(jnp.nan) for stack in (a, scale, b))
    if broken >= 0:
        b = b.at[1, broken].set(jnp.inf)
    product = jnp.asarray(rng.standard_normal((rows, n), np.float32))
    call = jax.jit(lora_by_row)
    arguments = (x, product, bias, jnp.asarray(ids), jnp.int32(1), StackedFactors(a, scale, b))
    got = call(*arguments)
    assert jnp.array_equal(got, call(*arguments), equal_nan=True)
    base = product + bias.astype(jnp.float32)
    assert jnp.array_equal(got[ids < 0], base.astype(jnp.bfloat16)[ids < 0])
    if broken >= 0:
        assert not np.isfinite(np.asarray(got[ids == broken], np.float32)).any()
    want, wide = np.asarray(base, np.float64), np.asarray(x, np.float64)
    for adapter in set(ids[ids >= 0].tolist()) - {broken}:
        own = [np.asarray(stack[1, adapter], np.float64) for stack in (a, scale, b)]
        mine = ids == adapter
        want[mine] += wide[mine] @ own[0].T * own[1] @ own[2].T
    good = ids != broken
    assert np.linalg.norm(np.asarray(got, np.float64)[good] - want[good]) <= BFLOAT16.relative * np.linalg.norm(
        want[good]
    )
