"""The model over pages, beside the same model over a cache that is each sequence's own."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import gpt_oss
from jmoe.gpt_oss.paged import (
    PAGE_SIZE,
    PagedCache,
    PagedDecodeAttention,
    PagedPrefillAttention,
    empty_paged_cache,
    page_bytes,
)
from jmoe.gpt_oss.run import Inputs

CASE = Path(__file__).parents[1] / "data" / "tiny_case"
CAPACITY = 192


@pytest.fixture(scope="module")
def model() -> gpt_oss.GptOss:
    return gpt_oss.load(CASE / "model", adapter=CASE / "adapter", dtype=jnp.float32, progress=False)


def tables(model: gpt_oss.GptOss, sequences: int, chunk: int) -> tuple[tuple[jax.Array, ...], tuple[int, ...]]:
    """(for each layer of a group each sequence's pages, backwards; how many pages there are)."""
    windows = model.config.windows[: model.period]
    columns = [-(-((window or 0) + (CAPACITY if window is None else chunk)) // PAGE_SIZE) + 1 for window in windows]
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
    sinks = model.stack.sinks
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
    attention = PagedDecodeAttention(model.config.windows, model.stack.sinks, position, pages)
    inputs = Inputs(tokens[:, None], jnp.maximum(position, 0)[:, None], ids[:, None])
    hidden, cache = model.run_layers_in_place(inputs, attention, cache, model.attention_lora())
    return model.logits(hidden)[:, 0], cache


def greedy(model: gpt_oss.GptOss, prompts: list[list[int]], adapters: list[int], chunk: int, count: int) -> np.ndarray:
    """So many likeliest tokens after each prompt, which come in chunks; then steps with a row without a sequence."""
    ids, rows = jnp.array(adapters, jnp.int32), len(prompts)
    pages, counts = tables(model, rows, chunk)
    cache = empty_paged_cache(model.config, counts, model.dtype)
    done, latest = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    while any(left := [len(prompt) - n for prompt, n in zip(prompts, done, strict=True)]):
        lengths, room = [], chunk
        for wanted in left:
            lengths.append(min(wanted, room))
            room -= lengths[-1]
        parts = [prompt[n : n + length] for prompt, n, length in zip(prompts, done, lengths, strict=True)]
        tokens = jnp.array([*itertools.chain(*parts), *[0] * room], jnp.int32)
        offsets = np.cumsum([0, *lengths]).astype(np.int32)
        logits, cache = run_chunk(model, cache, tokens, ids, jnp.asarray(offsets), jnp.asarray(done), pages)
        assert jnp.isfinite(logits).all()
        latest = np.where(lengths, np.asarray(logits.argmax(axis=-1))[offsets[1:] - 1], latest).astype(np.int32)
        done = done + np.array(lengths, np.int32)
    found = [latest]
    padded = tuple(jnp.pad(own, [(0, 1), (0, 0)]) for own in pages)
    for step in range(count - 1):
        position = jnp.array([*(done + step), -1], jnp.int32)
        tokens = jnp.array([*found[-1], 0], jnp.int32)
        logits, cache = run_step(model, cache, tokens, jnp.array([*adapters, -1], jnp.int32), position, padded)
        assert jnp.isfinite(logits).all()
        found.append(np.asarray(logits.argmax(axis=-1)[:-1], np.int32))
    return np.stack(found, axis=1)


@pytest.mark.slow
def test_greedy_text_is_that_of_transformers(model: gpt_oss.GptOss) -> None:
    """With an adapter and without, prompts cut by a chunk's end, beyond the window of 8."""
    with np.load(CASE / "expected.npz") as arrays:
        prompt, *want = (arrays[name] for name in ("gen_prompt", "gen_tokens", "gen_tokens_adapter"))
    prompts = [prompt.reshape(-1).tolist()] * 2
    got = greedy(model, prompts, [-1, 0], chunk=8, count=len(want[0]))
    assert got.tolist() == [tokens.tolist() for tokens in want]


@pytest.mark.slow
def test_greedy_text_is_generates(model: gpt_oss.GptOss) -> None:
    """Over several pages, prompts of different lengths, several in a chunk."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 128, length).tolist() for length in (100, 5, 31)]
    adapters = [0, -1, 0]
    want = gpt_oss.generate(model, prompts, max_new_tokens=6, stop_tokens=[], adapter_ids=adapters)
    assert np.array_equal(greedy(model, prompts, adapters, chunk=48, count=6), want.tokens)


def test_a_page_has_the_bytes_that_it_says(model: gpt_oss.GptOss) -> None:
    cache = empty_paged_cache(model.config, (3,) * model.period, jnp.bfloat16)
    assert sum(entries.nbytes for entries in cache) == 3 * model.period * page_bytes(
        model.config, model.period, jnp.bfloat16
    )
