"""The model over pages, beside the same model over a cache that is each sequence's own."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import gpt_oss
from jmoe.gpt_oss.model import Inputs
from jmoe.gpt_oss.paged import (
    PAGE_SIZE,
    PagedCache,
    PagedDecodeAttention,
    PagedPrefillAttention,
    empty_paged_cache,
    page_bytes,
)

CASE = Path(__file__).parents[1] / "data" / "tiny_case"
CAPACITY, CHUNK = 192, 48


@pytest.fixture(scope="module")
def model() -> gpt_oss.GptOss:
    return gpt_oss.load(CASE / "model", adapter=CASE / "adapter", dtype=jnp.float32, progress=False)


def tables(model: gpt_oss.GptOss, sequences: int) -> tuple[tuple[jax.Array, ...], tuple[int, ...]]:
    """(for each layer of a group each sequence's pages, backwards; how many pages there are)."""
    windows = model.config.windows[: model.period]
    columns = [-(-((window or 0) + (CAPACITY if window is None else CHUNK)) // PAGE_SIZE) + 1 for window in windows]
    pages = tuple(jnp.arange(sequences * c, 0, -1, dtype=jnp.int32).reshape(sequences, c) for c in columns)
    return pages, tuple(sequences * c + 1 for c in columns)


@functools.partial(jax.jit, donate_argnums=1)
def run_chunk(
    model: gpt_oss.GptOss,
    cache: PagedCache,
    tokens: jax.Array,
    ids: jax.Array,
    offsets: jax.Array,
    first: jax.Array,
    pages: tuple[jax.Array, ...],
) -> tuple[jax.Array, PagedCache]:
    """(logits of a chunk's tokens, the cache with them)."""
    owner = jnp.minimum(jnp.searchsorted(offsets[1:], jnp.arange(len(tokens)), side="right"), len(first) - 1)
    positions = first[owner] + jnp.arange(len(tokens)) - offsets[owner]
    sinks = model.layers.get_value().sinks
    attention = PagedPrefillAttention(model.config.windows, sinks, offsets, first, pages)
    inputs = Inputs(tokens[None], positions[None], ids[owner][None])
    hidden, cache = model.run_layers_in_place(inputs, attention, cache, model.attention_lora())
    return model.logits(hidden)[0], cache


@functools.partial(jax.jit, donate_argnums=1)
def run_step(
    model: gpt_oss.GptOss,
    cache: PagedCache,
    tokens: jax.Array,
    ids: jax.Array,
    position: jax.Array,
    pages: tuple[jax.Array, ...],
) -> tuple[jax.Array, PagedCache]:
    """(logits after each sequence's token, the cache with it)."""
    attention = PagedDecodeAttention(model.config.windows, model.layers.get_value().sinks, position, pages)
    inputs = Inputs(tokens[:, None], jnp.maximum(position, 0)[:, None], ids[:, None])
    hidden, cache = model.run_layers_in_place(inputs, attention, cache, model.attention_lora())
    return model.logits(hidden)[:, 0], cache


def test_greedy_text_is_generates(model: gpt_oss.GptOss) -> None:
    """Prompts that are cut by chunks, several in one, and then steps with a row that has no sequence."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 128, length).tolist() for length in (100, 5, 31)]
    adapters = [0, -1, 0]
    ids = jnp.array(adapters, jnp.int32)
    want = gpt_oss.generate(model, prompts, max_new_tokens=6, stop_tokens=[], adapter_ids=adapters).tokens
    pages, counts = tables(model, 3)
    cache = empty_paged_cache(model.config, counts, model.dtype)
    done, latest = np.zeros(3, np.int32), np.zeros(3, np.int32)
    while any(left := [len(prompt) - n for prompt, n in zip(prompts, done, strict=True)]):
        lengths, room = [], CHUNK
        for count in left:
            lengths.append(min(count, room))
            room -= lengths[-1]
        parts = [prompt[n : n + length] for prompt, n, length in zip(prompts, done, lengths, strict=True)]
        tokens = np.array([*itertools.chain(*parts), *[0] * room], np.int32)
        offsets = np.cumsum([0, *lengths]).astype(np.int32)
        logits, cache = run_chunk(
            model, cache, jnp.asarray(tokens), ids, jnp.asarray(offsets), jnp.asarray(done), pages
        )
        assert jnp.isfinite(logits).all()
        latest = np.where(lengths, np.asarray(logits.argmax(axis=-1))[offsets[1:] - 1], latest).astype(np.int32)
        done = done + np.array(lengths, np.int32)
    got = [latest]
    padded = tuple(jnp.pad(own, [(0, 1), (0, 0)]) for own in pages)
    for step in range(5):
        position = jnp.array([*(done + step), -1], jnp.int32)
        tokens = jnp.array([*got[-1], 0], jnp.int32)
        logits, cache = run_step(model, cache, tokens, jnp.array([*adapters, -1], jnp.int32), position, padded)
        assert jnp.isfinite(logits).all()
        got.append(np.asarray(logits.argmax(axis=-1)[:3], np.int32))
    assert np.array_equal(np.stack(got, axis=1), want)


def test_a_page_has_the_bytes_that_it_says(model: gpt_oss.GptOss) -> None:
    cache = empty_paged_cache(model.config, (3,) * model.period, jnp.bfloat16)
    assert sum(entries.nbytes for entries in cache) == 3 * model.period * page_bytes(
        model.config, model.period, jnp.bfloat16
    )
