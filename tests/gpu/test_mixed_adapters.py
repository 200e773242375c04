"""Steps of sequences with adapters of their own on a GPU: as each alone, and about as fast as with one adapter."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.bench.model.case import sizes
from jmoe.bench.model.generation import NO_STOP
from jmoe.gpt_oss import GptOss
from jmoe.gpt_oss.cache import empty_cache
from jmoe.gpt_oss.decode import DecodeState, decode, prefill
from jmoe.gpt_oss.generate import Progress, advance
from jmoe.gpt_oss.random_model import random_model
from jmoe.gpt_oss.sample import Sampling

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("sequences", [16, 128])
def test_base_sequences_keep_their_bits_beside_adapters(sequences: int) -> None:
    """In chunks of prompts and in steps; and adapters that nobody has are not read."""
    rng = np.random.default_rng()
    model = random_model(sizes()["tiny"], rank=16, adapters=8)
    assert model.lora is not None
    tokens = jnp.asarray(rng.integers(0, 512, (sequences, 40)), jnp.int32)
    ids = rng.integers(-1, 7, sequences, np.int32)

    @jax.jit
    def run(model: GptOss, ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        lengths = jnp.full(sequences, 40)
        first, state = prefill(model, tokens, lengths, capacity=64, adapter_ids=ids, prefill_chunk=16)
        return first, decode(model, tokens[:, 0], state)[0]

    broken = jax.tree.map(lambda leaf: leaf.at[:, 7].set(jnp.nan), model.lora)
    got = run(model.with_adapters(broken), jnp.asarray(ids))
    nobody = run(model, jnp.full(sequences, -1))
    for mixed, again, base in zip(got, run(model, jnp.asarray(ids)), nobody, strict=True):
        assert jnp.isfinite(mixed).all()
        assert jnp.array_equal(mixed, again)
        assert jnp.array_equal(mixed[ids < 0], base[ids < 0])


@pytest.mark.alone
@pytest.mark.large_memory
def test_a_step_with_eight_adapters_takes_at_most_1_12_times_one_adapters() -> None:
    """16 sequences at gpt-oss-20b's sizes, LoRA of rank 16 on experts and attention."""
    config, sequences, steps = sizes()["20b"], 16, 32
    model = random_model(config, rank=16, adapters=8)
    assert model.lora is not None
    one = model.with_adapters(jax.tree.map(lambda leaf: leaf[:, :1], model.lora))

    def step_ms(model: GptOss, ids: jax.Array | None) -> float:
        cache = empty_cache(config, model.period, sequences, 512, model.dtype)
        # Copies: `advance` takes its arguments' memory.
        own = jax.tree.map(jnp.copy, (ids, model.attention_lora()))
        state = DecodeState(cache, jnp.full(sequences, 256, jnp.int32), *own)
        logits = jax.random.normal(jax.random.key(0), (sequences, config.vocab_size))
        progress, times = Progress(logits, state, jnp.zeros(sequences, bool), jax.random.key(0)), []
        for _ in range(6):
            began = time.perf_counter()
            *_, progress = jax.block_until_ready(advance(model, progress, NO_STOP, Sampling(), steps))
            times.append(1e3 * (time.perf_counter() - began) / steps)
        return statistics.median(times[1:])

    mixed, alone = step_ms(model, jnp.arange(sequences) % 8), step_ms(one, None)
    print(f"8 adapters {mixed:.2f} ms a step, one {alone:.2f}, ratio {mixed / alone:.2f}")
    assert mixed <= 1.12 * alone
