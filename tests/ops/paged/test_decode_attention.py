"""Attention of one query a sequence to pages, by XLA where there is no GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.ops.decode.cached_attention import cached_attention
from jmoe.ops.paged.decode_attention import paged_decode_attention
from tests.ops.paged.sequences import exact, put, random_pages, rotated
from tests.tolerances import FLOAT32

HEADS, KEY_HEADS, DIM = 4, 2, 8
attend = jax.jit(paged_decode_attention, static_argnames="window")


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    positions=st.lists(st.integers(-1, 30), min_size=4, max_size=4),
    window=st.sampled_from([None, 1, 6]),
)
def test_a_sequence_sees_its_own_tokens_alone(seed: int, positions: list[int], window: int | None) -> None:
    """Everything else is NaN: other pages, tokens behind the window, tokens to come, the latest token's place."""
    generator = np.random.default_rng(seed)
    batch, page = len(positions), 4
    columns = -(-31 // page) if window is None else -(-window // page) + 1
    pages, count = random_pages(generator, batch, columns)
    heads = generator.normal(size=(batch, HEADS + 2 * KEY_HEADS, DIM)).astype(np.float32)
    angles = 6 * generator.random((batch, DIM // 2))
    cosine, sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    sinks = generator.normal(size=(3, HEADS)).astype(np.float32)
    cache = np.full((2, count, KEY_HEADS, page, 2 * DIM), np.nan, np.float32)
    wanted, written = np.zeros((batch, HEADS, DIM)), cache.copy()
    for b, position in enumerate(positions):
        if position < 0:
            pages[b] = 0
            continue
        before = generator.normal(size=(2, position, KEY_HEADS, DIM)).astype(np.float32)
        held = np.arange(max(0, position - (window or position + 1) + 1), position)
        put(cache, 1, pages[b], held, before[0, held], before[1, held])
        turned = rotated(heads[b : b + 1, : HEADS + KEY_HEADS], cosine[b : b + 1], sine[b : b + 1])
        value = heads[b : b + 1, HEADS + KEY_HEADS :]
        keys, values = np.concatenate([before[0], turned[:, HEADS:]]), np.concatenate([before[1], value])
        wanted[b] = exact(turned[:, :HEADS], keys, values, position, sinks[2], window)[0]
        put(written, 1, pages[b], np.array([position]), turned[:, HEADS:], value)
    written = np.where(np.isnan(written), cache, written)
    rest = jnp.array(positions, jnp.int32), jnp.asarray(pages), jnp.asarray(sinks), jnp.int32(2)
    got, kept = attend(
        jnp.asarray(heads),
        jnp.asarray(cosine),
        jnp.asarray(sine),
        jnp.asarray(cache),
        jnp.int32(1),
        *rest,
        window=window,
    )
    np.testing.assert_allclose(got, wanted, rtol=FLOAT32.relative, atol=FLOAT32.relative)
    np.testing.assert_allclose(kept[:, 1:], written[:, 1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [None, 8])
def test_pages_are_as_good_as_slots(window: int | None) -> None:
    """The same sums in float32 as of a cache that is a sequence's own."""
    generator = np.random.default_rng(3)
    batch, page, slots, last = 3, 4, window or 32, np.array([3, 17, 30], np.int32)
    heads = jnp.asarray(generator.normal(size=(batch, HEADS + 2 * KEY_HEADS, DIM)), jnp.float32)
    ring = jnp.asarray(generator.normal(size=(1, batch, KEY_HEADS, slots, 2 * DIM)), jnp.float32)
    angles = jnp.asarray(generator.random((batch, DIM // 2)), jnp.float32)
    sinks = jnp.asarray(generator.normal(size=(1, HEADS)), jnp.float32)
    zero = jnp.int32(0)
    pages, count = random_pages(generator, batch, slots // page + (window is not None))
    cache = np.zeros((1, count, KEY_HEADS, page, 2 * DIM), np.float32)
    for b in range(batch):
        held = np.arange(max(0, last[b] - slots + 1), last[b])
        both = np.asarray(ring)[0, b, :, held % slots]
        put(cache, 0, pages[b], held, both[..., :DIM], both[..., DIM:])
    first = heads, jnp.cos(angles), jnp.sin(angles)
    want, _ = cached_attention(*first, ring, zero, jnp.asarray(last), sinks, zero)
    rest = jnp.asarray(last), jnp.asarray(pages), sinks, zero
    got, _ = attend(*first, jnp.asarray(cache), zero, *rest, window=window)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_other_rows_change_no_bit_of_a_row() -> None:
    generator = np.random.default_rng(4)
    pages, count = random_pages(generator, 4, 4)
    heads = generator.normal(size=(4, HEADS + 2 * KEY_HEADS, DIM)).astype(np.float32)
    cache = generator.normal(size=(1, count, KEY_HEADS, 4, 2 * DIM)).astype(np.float32)
    ones = jnp.ones((4, DIM // 2))

    def second(position: list[int], other: float) -> jnp.ndarray:
        changed = np.where(np.arange(4)[:, None, None] == 1, heads, heads + other).astype(np.float32)
        rest = jnp.array(position, jnp.int32), jnp.asarray(pages), jnp.zeros((1, HEADS)), jnp.int32(0)
        return attend(jnp.asarray(changed), ones, ones, jnp.asarray(cache), jnp.int32(0), *rest, window=None)[0][1]

    assert jnp.array_equal(second([3, 9, 15, 0], 0), second([-1, 9, 2, -1], np.nan))
