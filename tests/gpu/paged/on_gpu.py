"""Cases of attention to pages at gpt-oss's sizes, on a GPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tests.paged_cases import Case, Sizes, as_bfloat16
from tests.tolerances import BFLOAT16

SIZES = Sizes(heads=64, key_heads=8, dim=64, page=64)


def check(attend: Callable[..., tuple[jax.Array, jax.Array]], case: Case, window: int | None) -> None:
    """The kernels' results are the case's, and the same bits again; XLA's are as near."""
    operands = {name: jnp.asarray(array) for name, array in case.operands.items()}
    narrow = operands | {name: operands[name].astype(jnp.bfloat16) for name in ("heads", "cache", "sinks")}
    call = jax.jit(attend, static_argnames="window")
    got, cache = call(**narrow, window=window)
    again, cache_again = call(**narrow, window=window)
    assert jnp.array_equal(got, again)
    assert jnp.array_equal(cache, cache_again, equal_nan=True)
    factors = {name: jnp.asarray(as_bfloat16(case.operands[name])) for name in ("cosine", "sine")}
    with jax.default_matmul_precision("highest"):
        by_xla, _ = call(**operands | factors, window=window)
    for values in (got, by_xla):
        error = np.linalg.norm(np.asarray(values, np.float64) - case.wanted)
        assert error <= BFLOAT16.relative * np.linalg.norm(case.wanted)
    np.testing.assert_allclose(np.asarray(cache, np.float32), case.written, rtol=2**-7, atol=1e-3)
