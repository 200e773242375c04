"""FlashAttention on a Hopper GPU, against attention by XLA in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.gpt_oss import attend
from jmoe.gpt_oss.flash_attention import SEGMENTS, available

pytestmark = pytest.mark.gpu

HEADS, KEY_HEADS, DIM = 16, 2, 64


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("length", [40, 1000])
def test_values_and_gradients_are_those_of_xla(length: int, window: int | None, packed: bool) -> None:
    if (reason := available()) is not None:
        pytest.skip(f"FlashAttention: {reason}")
    keys = jax.random.split(jax.random.key(0), 6)
    heads = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    q, k, v, cotangent = (
        jax.random.normal(key, (2, length, n, DIM), jnp.bfloat16) for key, n in zip(keys, heads, strict=False)
    )
    sinks = jax.random.normal(keys[4], (HEADS,), jnp.bfloat16)
    begins = jax.random.uniform(keys[5], (2, length)) < 0.01
    ids = jnp.cumsum(begins, axis=1, dtype=jnp.int32) if packed else None

    def both(arrays: tuple[jax.Array, ...], implementation: str | None) -> list[np.ndarray]:
        call = functools.partial(attend, window=window, segment_ids=ids, implementation=implementation)
        out, pullback = jax.vjp(call, *arrays)
        return [np.asarray(array, np.float64) for array in (out, *pullback(cotangent.astype(out.dtype)))]

    arrays = (q, k, v, sinks)
    exact = both(tuple(array.astype(jnp.float32) for array in arrays), "xla")
    for implementation in ("flash", None):
        for got, wanted in zip(both(arrays, implementation), exact, strict=True):
            assert np.linalg.norm(got - wanted) <= 1e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize("most", [SEGMENTS, 128])
def test_more_segments_than_fit_are_nan(most: int) -> None:
    if (reason := available()) is not None:
        pytest.skip(f"FlashAttention: {reason}")
    q, k, v = (jnp.ones((2, 400, n, DIM), jnp.bfloat16) for n in (HEADS, KEY_HEADS, KEY_HEADS))
    sinks = jnp.zeros(HEADS, jnp.bfloat16)
    call = functools.partial(attend, q, k, v, sinks, window=None, implementation="flash", most_segments=most)
    index = jnp.arange(400)
    fit = jnp.stack([jnp.minimum(index // 2, most - 2), jnp.minimum(index, most)])
    assert not jnp.isnan(call(segment_ids=fit)).any()
    assert jnp.isnan(call(segment_ids=fit.at[1, -1].add(1))).all()
