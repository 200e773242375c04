"""Times a step of JAX inside lax.scan, as a step of decoding or a layer of a model runs."""

import statistics
import time
from collections.abc import Callable

import jax
from jax import lax

SAMPLES = 7


def scan_microseconds[C, W](
    step: Callable[[C, jax.Array, W], C], start: C, router_logits: jax.Array, weights: W
) -> float:
    """Median time of one step(carry, router_logits[i], weights), which returns the next step's carry.

    Since a step reads what the last one wrote, or replaces it, nothing is added to the step but the choice of its
    logits. The weights are an argument: as constants XLA would copy and fold over a gigabyte while it compiles.
    """

    @jax.jit
    def sample(start: C, router_logits: jax.Array, weights: W) -> C:
        return lax.scan(lambda carry, logits: (step(carry, logits, weights), None), start, router_logits)[0]

    jax.block_until_ready(sample(start, router_logits, weights))
    times = []
    for _ in range(SAMPLES):
        begin = time.perf_counter()
        jax.block_until_ready(sample(start, router_logits, weights))
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / router_logits.shape[0] * 1e6
