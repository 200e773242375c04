"""What JAX itself offers: experts dequantised to bfloat16, sorted rows through lax.ragged_dot."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.bench.case import Case, calls_for
from jmoe.bench.implementation import Figures, Implementation, Measure, UnavailableError, without_lora
from jmoe.bench.jax_timing import scan_microseconds, unrolled
from jmoe.bench.weights import Weights, random_input
from jmoe.ops.routing import route
from jmoe.ops.xla.swiglu import swiglu
from jmoe.triton_src.activation import SwiGLU

NAME = "lax.ragged_dot"


class Dense(NamedTuple):
    """Dense experts as lax.ragged_dot takes them: gate_up [E, H, 2I], down [E, I, H]."""

    gate_up: jax.Array
    gate_up_bias: jax.Array | None
    down: jax.Array
    down_bias: jax.Array | None


def prepare(weights: Weights) -> Measure:
    """The layer by lax.ragged_dot, routing included."""
    if jax.default_backend() != "gpu":
        raise UnavailableError("GPU only")
    experts = weights.dense
    assert isinstance(experts.gate_up, jax.Array)
    assert isinstance(experts.down, jax.Array)
    gate_up, down = (jnp.swapaxes(w, 1, 2) for w in (experts.gate_up, experts.down))
    arrays = Dense(gate_up, experts.gate_up_bias, down, experts.down_bias)

    def measure(case: Case) -> Figures:
        x, logits = random_input(case, weights.size, unrolled())
        step = functools.partial(ragged_layer, top_k=weights.size.top_k)
        return {NAME: scan_microseconds(step, x, logits, arrays, calls_for(case.tokens))}

    return measure


def ragged_layer(x: jax.Array, logits: jax.Array, weights: Dense, top_k: int) -> jax.Array:
    """y like x."""
    routing = route(logits, top_k)
    flat = routing.experts.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=weights.down.shape[0])
    rows = flat[order]
    z = lax.ragged_dot(x[order // top_k], weights.gate_up, sizes)
    z = z if weights.gate_up_bias is None else z + weights.gate_up_bias[rows]
    out = lax.ragged_dot(swiglu(z, SwiGLU()).astype(x.dtype), weights.down, sizes)
    out = out if weights.down_bias is None else out + weights.down_bias[rows]
    weighted = out.astype(jnp.float32) * routing.weights.reshape(-1)[order][:, None]
    return jnp.zeros(x.shape, jnp.float32).at[order // top_k].add(weighted).astype(x.dtype)


IMPLEMENTATIONS = (
    # It takes ten times as long as the others, and a second figure would say no more.
    Implementation((NAME,), lambda case: without_lora(case) and case.experts == 32 and case.tokens <= 4096, prepare),
)
