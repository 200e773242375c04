"""Prefill and decode of a model with random weights."""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.bench.model.case import Figures, ModelCase
from jmoe.bench.model.memory import peak_gib
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.decode import DecodeState
from jmoe.gpt_oss.generate import Progress, advance, start
from jmoe.gpt_oss.layout import mesh_and_layout
from jmoe.gpt_oss.model import GptOss
from jmoe.gpt_oss.random_model import random_model
from jmoe.gpt_oss.sample import Sampling

STEPS = 32
"""Decode steps in one call, as in a chunk of jmoe.gpt_oss.generate."""

ROUNDS = 5
NO_STOP = np.array([-1], np.int32)


def measure(case: ModelCase) -> Figures:
    """Medians; a step's is that of STEPS steps in one call, from the end of the prompt on."""
    mesh, layout = mesh_and_layout(case.mesh or None, case.config)
    model = random_model(case.config, rank=case.rank, mesh=mesh, layout=layout)
    call, state = prefill(model, case)
    prefill_seconds = statistics.median(seconds(call) for _ in range(3))
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        *_, state = jax.block_until_ready(advance(model, state, NO_STOP, Sampling(), STEPS))
        times.append((time.perf_counter() - began) / STEPS)
    if not bool(jnp.isfinite(state.logits).all()):
        raise FloatingPointError(f"{case}: logits are not finite")
    return {
        "prefill_tokens_per_second": case.sequences * case.length / prefill_seconds,
        "decode_step_ms": 1e3 * statistics.median(times[1:]),
        "peak_gib": peak_gib(),
    }


def prefill(model: GptOss, case: ModelCase) -> tuple[Callable[[], tuple[jax.Array, DecodeState]], Progress]:
    """(a call that reads the prompts, the state after them), compiled."""
    tokens = random_tokens(case.config, (case.sequences, case.length))
    lengths = jnp.full(case.sequences, case.length, jnp.int32)
    capacity = case.length + 64 * -(-(ROUNDS + 1) * STEPS // 64)

    def call() -> tuple[jax.Array, DecodeState]:
        return start(model, tokens, lengths, None, capacity, None)

    logits, state = jax.block_until_ready(call())
    return call, Progress(logits, state, jnp.zeros(case.sequences, bool), jax.random.key(0))


def random_tokens(config: Config, shape: tuple[int, ...]) -> jax.Array:
    """Token ids."""
    return jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size, jnp.int32)


def seconds(call: Callable[[], object]) -> float:
    """How long it took."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began
