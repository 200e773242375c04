"""Prompts chunk by chunk, beside the whole prompt at once."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe import gpt_oss
from jmoe.gpt_oss.decode import DecodeState, decode, prefill

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
TOKENS = np.random.default_rng(0).integers(0, 512, (4, 90)).astype(np.int32)
LENGTHS = np.array([3, 37, 64, 90], np.int32)
IDS = jnp.array([0, -1, 0, -1], jnp.int32)


@pytest.fixture(scope="module")
def model() -> gpt_oss.GptOss:
    return gpt_oss.load(TINY, adapter=TINY / "adapter", dtype=jnp.float32, progress=False)


def run(model: gpt_oss.GptOss, chunk: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Logits after the prompts, and after one more token of each."""

    def both(model: gpt_oss.GptOss) -> tuple[jnp.ndarray, jnp.ndarray, DecodeState]:
        first, state = prefill(model, TOKENS, LENGTHS, capacity=96, adapter_ids=IDS, prefill_chunk=chunk)
        second, state = decode(model, jnp.array([1, 2, 3, 4], jnp.int32), state)
        return first, second, state

    first, second, _ = nnx.jit(both)(model)
    return np.asarray(first), np.asarray(second)


@pytest.fixture(scope="module")
def at_once(model: gpt_oss.GptOss) -> tuple[np.ndarray, np.ndarray]:
    return run(model, None)


@pytest.mark.parametrize("chunk", [7, 40, 64])
def test_chunks_are_the_whole(model: gpt_oss.GptOss, at_once: tuple[np.ndarray, np.ndarray], chunk: int) -> None:
    """Chunks shorter and longer than the window of 32, prompts that end in different ones."""
    for got, want in zip(run(model, chunk), at_once, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_is_nan_stays_alone(model: gpt_oss.GptOss) -> None:
    """The padding of the last chunk has no adapter."""
    broken = jax.tree.map(lambda leaf: jnp.nan * leaf, model.lora)
    isolated = model.with_adapters(gpt_oss.stack_adapters([broken, model.lora]))
    ids = jnp.array([1, -1, 1, -1], jnp.int32)
    logits, _ = prefill(isolated, TOKENS, LENGTHS, capacity=96, adapter_ids=ids, prefill_chunk=7)
    assert jnp.isfinite(logits).all()


@pytest.mark.slow
def test_generated_text_is_the_same(model: gpt_oss.GptOss) -> None:
    prompts = [row[:length].tolist() for row, length in zip(TOKENS, LENGTHS, strict=True)]
    options = {"max_new_tokens": 4, "stop_tokens": [], "adapter_ids": IDS.tolist()}
    whole = gpt_oss.generate(model, prompts, **options)
    chunked = gpt_oss.generate(model, prompts, prefill_chunk=48, **options)
    assert np.array_equal(chunked.tokens, whole.tokens)


def test_a_chunk_has_tokens(model: gpt_oss.GptOss) -> None:
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1, got 0"):
        prefill(model, TOKENS, LENGTHS, capacity=96, adapter_ids=IDS, prefill_chunk=0)
