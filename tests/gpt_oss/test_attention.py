"""Attention in blocks, against the whole softmax."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.gpt_oss import attend
from jmoe.gpt_oss.attention import BLOCK
from jmoe.gpt_oss.model import positions_in_segments

HEADS, KEY_HEADS, DIM = 4, 2, 8


def whole(
    q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array, window: int | None, segment_ids: jax.Array
) -> jax.Array:
    """The definition, all scores at once."""
    length = q.shape[1]
    k, v = (jnp.repeat(array, HEADS // KEY_HEADS, axis=2) for array in (k, v))
    scores = jnp.einsum("bqnd,bsnd->bnqs", q, k) / math.sqrt(DIM)
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    seen = (distance >= 0) & (distance < (length if window is None else window))
    seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    sink = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bnqs,bsnd->bqnd", weights, v)


def inputs(length: int, seed: int = 0) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 4)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    q, k, v = (jax.random.normal(key, (2, length, n, DIM)) for key, n in zip(keys, heads, strict=False))
    return q, k, v, 4 * jax.random.normal(keys[3], (HEADS,))


@pytest.mark.parametrize("window", [None, 1, 16, 128, 1000])
@pytest.mark.parametrize("length", [1, 40, 256, 700])
def test_blocks_are_the_whole(length: int, window: int | None) -> None:
    arrays = inputs(length)
    segments = jnp.cumsum(jax.random.uniform(jax.random.key(9), (2, length)) < 0.02, axis=1, dtype=jnp.int32)
    for ids in (None, segments):
        want = whole(*arrays, window, jnp.zeros((2, length), jnp.int32) if ids is None else ids)
        got = jax.jit(functools.partial(attend, window=window))(*arrays, segment_ids=ids)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [None, 100])
def test_gradients_are_those_of_the_whole(window: int | None) -> None:
    arrays = inputs(600)
    cotangent = jax.random.normal(jax.random.key(5), arrays[0].shape)
    zeros = jnp.zeros((2, 600), jnp.int32)
    every = (0, 1, 2, 3)
    got = jax.jit(jax.grad(lambda *a: jnp.sum(attend(*a, window=window) * cotangent), every))(*arrays)
    want = jax.jit(jax.grad(lambda *a: jnp.sum(whole(*a, window, zeros) * cotangent), every))(*arrays)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 128])
def test_memory_grows_with_the_sequence_and_not_with_its_square(window: int | None) -> None:
    def held(length: int) -> int:
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in jax.eval_shape(lambda: inputs(length))]
        gradient = jax.grad(lambda *a: jnp.sum(attend(*a, window=window)), (0, 1, 2, 3))
        return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = held(2048), held(8192)
    assert long <= 5 * short


@pytest.mark.parametrize("length", [2048, 4096])
def test_few_blocks_of_scores_are_held_at_once(length: int) -> None:
    """Also where the sequence has no more blocks than there are groups of them."""
    shapes = [jax.ShapeDtypeStruct((1, length, n, DIM), jnp.float32) for n in (16, 2, 2)]
    shapes.append(jax.ShapeDtypeStruct((16,), jnp.float32))
    compiled = jax.jit(functools.partial(attend, window=None)).lower(*shapes).compile()
    scores = 4 * 16 * BLOCK * length
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * scores


def test_positions_begin_anew_in_each_segment() -> None:
    segments = jnp.array([[3, 3, 3, 7, 7, 1], [0, 0, 1, 1, 1, 1]])
    assert positions_in_segments((2, 6), segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    assert positions_in_segments((1, 3), None).tolist() == [[0, 1, 2]]
