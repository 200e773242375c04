"""jmoe.moe as a user calls it, and its routing alone."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jmoe.bench.case import Case, Size, steps_for
from jmoe.bench.implementation import Figures, Implementation, Measure, UnavailableError, without_lora
from jmoe.bench.jax_timing import scan_microseconds, unrolled
from jmoe.bench.weights import Weights, random_adapter_ids, random_input
from jmoe.ops.experts import Experts, Lora
from jmoe.ops.launch.layer import route_and_sort
from jmoe.ops.moe import moe

PACKED, CHECKPOINT, DENSE, ROUTING = "jmoe packed", "jmoe", "jmoe bf16", "jmoe routing"


def layer(name: str, experts_of: Callable[[Weights], Experts], weights: Weights) -> Measure:
    """jmoe.moe on these experts, routing included: each step's result is the next one's input, as in a model."""
    experts, top_k = experts_of(weights), weights.size.top_k

    def measure(case: Case) -> Figures:
        x, logits = random_input(case, weights.size, unrolled())
        ids = random_adapter_ids(case)

        def step(x: jax.Array, logits: jax.Array, arrays: tuple[Experts, Lora | None]) -> jax.Array:
            return moe(x, logits, arrays[0], top_k=top_k, lora=arrays[1], adapter_ids=ids)

        lora = weights.lora(case.rank, case.adapters)
        return {name: scan_microseconds(step, x, logits, (experts, lora), steps_for(case.tokens))}

    return measure


def one_call(case: Case, size: Size) -> Callable[[], jax.Array]:
    """jmoe.moe on packed experts, compiled without CUDA graphs, which a profiler would see as one launch."""
    weights = Weights(size, case.experts)
    x, logits = random_input(case, size, draws=1)
    arguments = (x, logits[0], weights.packed, weights.lora(case.rank, case.adapters), random_adapter_ids(case))

    @jax.jit
    def call(x: jax.Array, logits: jax.Array, experts: Experts, lora: Lora | None, ids: jax.Array | None) -> jax.Array:
        return moe(x, logits, experts, top_k=size.top_k, lora=lora, adapter_ids=ids)

    options = {"xla_gpu_enable_command_buffer": ""} if jax.default_backend() == "gpu" else {}
    compiled = call.lower(*arguments).compile(compiler_options=options)
    return lambda: compiled(*arguments)


def routing(weights: Weights) -> Measure:
    """The routing's launches alone, without the layer that would read them."""
    if jax.default_backend() != "gpu":
        raise UnavailableError("GPU only")

    def measure(case: Case) -> Figures:
        _, logits = random_input(case, weights.size, unrolled())
        route = functools.partial(route_and_sort, top_k=weights.size.top_k)
        written = jax.eval_shape(route, logits[0], jax.ShapeDtypeStruct((1,), jnp.int32))
        start = jax.tree.map(lambda aval: jnp.zeros(aval.shape, aval.dtype), written)

        def step(before: dict[str, jax.Array], logits: jax.Array, _: None) -> dict[str, jax.Array]:
            # Reads what the step before wrote, or steps would run side by side.
            return route(logits, before["finished"])

        # A routing takes a tenth of a layer's time, or less.
        return {ROUTING: scan_microseconds(step, start, logits, None, 10 * steps_for(case.tokens))}

    return measure


IMPLEMENTATIONS = (
    Implementation((PACKED,), lambda case: True, functools.partial(layer, PACKED, lambda weights: weights.packed)),
    Implementation(
        (CHECKPOINT,),
        lambda case: without_lora(case) and case.experts <= 32,
        functools.partial(layer, CHECKPOINT, lambda weights: weights.experts),
    ),
    Implementation(
        (DENSE,),
        lambda case: without_lora(case) and case.experts <= 32,
        functools.partial(layer, DENSE, lambda weights: weights.dense),
    ),
    Implementation((ROUTING,), lambda case: without_lora(case) and case.tokens <= 4096, routing),
)
