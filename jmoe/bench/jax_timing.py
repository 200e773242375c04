"""Times a step of JAX repeated in one program, as the layers of a model are."""

import statistics
import time
from collections.abc import Callable

import jax
from jax import lax

SAMPLES = 7


def unrolled() -> int:
    """Steps in the body of the loop. Its own few launches (the counter, the test) are spread over them on a GPU."""
    return 8 if jax.default_backend() == "gpu" else 2


def scan_microseconds[C, W](
    step: Callable[[C, jax.Array, W], C], start: C, router_logits: jax.Array, weights: W, steps: int
) -> float:
    """Median time of one step(carry, router_logits[i], weights), which returns the next step's carry.

    The logits are of unrolled() steps and serve in turn, in as many rounds as make `steps`.

    Since a step reads what the last one wrote, or replaces it, nothing is added to the step. The weights are an
    argument: as constants XLA would copy and fold over a gigabyte while it compiles.
    """
    return scan_timer(step, start, router_logits, weights, steps)()


def scan_timer[C, W](
    step: Callable[[C, jax.Array, W], C], start: C, router_logits: jax.Array, weights: W, steps: int
) -> Callable[[], float]:
    """scan_microseconds, compiled now and run when called."""
    different = tuple(router_logits)
    rounds = max(1, steps // len(different))

    def sample(start: C, different: tuple[jax.Array, ...], weights: W) -> C:
        def body(carry: C, _: None) -> tuple[C, None]:
            for logits in different:
                carry = step(carry, logits, weights)
            return carry, None

        return lax.scan(body, start, length=rounds)[0]

    compiled = jax.jit(sample).lower(start, different, weights).compile()

    def microseconds() -> float:
        jax.block_until_ready(compiled(start, different, weights))
        times = []
        for _ in range(SAMPLES):
            begin = time.perf_counter()
            jax.block_until_ready(compiled(start, different, weights))
            times.append(time.perf_counter() - begin)
        return statistics.median(times) / (rounds * len(different)) * 1e6

    return microseconds
