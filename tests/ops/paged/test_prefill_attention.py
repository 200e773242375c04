"""Attention of a chunk of prompts to pages, by XLA where there is no GPU."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.ops.paged.prefill_attention import paged_prefill_attention
from tests.ops.paged.sequences import exact, put, random_pages, rotated
from tests.tolerances import FLOAT32

HEADS, KEY_HEADS, DIM, TOKENS = 4, 2, 8, 240
attend = jax.jit(paged_prefill_attention, static_argnames="window")


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(0, 80), min_size=3, max_size=3),
    window=st.sampled_from([None, 1, 20]),
)
def test_a_token_sees_its_own_sequence_up_to_itself(seed: int, lengths: list[int], window: int | None) -> None:
    """Everything else is NaN, padding rows and what lies behind the window among it."""
    generator = np.random.default_rng(seed)
    sequences, tokens, page = len(lengths), TOKENS, 16
    first = generator.integers(0, 40, sequences).astype(np.int32)
    columns = -(-120 // page) if window is None else -(-(window + 80) // page) + 1
    pages, count = random_pages(generator, sequences, columns)
    heads = np.full((tokens, HEADS + 2 * KEY_HEADS, DIM), np.nan, np.float32)
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    heads[: offsets[-1]] = generator.normal(size=(offsets[-1], *heads.shape[1:]))
    angles = 6 * generator.random((tokens, DIM // 2))
    cosine, sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    sinks = generator.normal(size=(3, HEADS)).astype(np.float32)
    cache = np.full((2, count, KEY_HEADS, page, 2 * DIM), np.nan, np.float32)
    wanted, written = np.zeros((tokens, HEADS, DIM)), cache.copy()
    for s, length in enumerate(lengths):
        rows = slice(offsets[s], offsets[s + 1])
        before = generator.normal(size=(2, first[s], KEY_HEADS, DIM)).astype(np.float32)
        held = np.arange(0 if window is None else max(0, first[s] - window + 1), first[s])
        put(cache, 1, pages[s], held, before[0, held], before[1, held])
        turned = rotated(heads[rows, : HEADS + KEY_HEADS], cosine[rows], sine[rows])
        value = heads[rows, HEADS + KEY_HEADS :]
        keys, values = np.concatenate([before[0], turned[:, HEADS:]]), np.concatenate([before[1], value])
        wanted[rows] = exact(turned[:, :HEADS], keys, values, first[s], sinks[2], window)
        put(written, 1, pages[s], first[s] + np.arange(length), turned[:, HEADS:], value)
    written = np.where(np.isnan(written), cache, written)
    rest = jnp.asarray(offsets), jnp.asarray(first), jnp.asarray(pages), jnp.asarray(sinks), jnp.int32(2)
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
