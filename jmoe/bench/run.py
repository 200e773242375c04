"""Times jmoe's layer and each peer that is installed, in one process, on one GPU."""

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops.moe import moe
from jmoe.ops.packed import pack
from jmoe.ops.random_layer import LayerShape, random_layer
from jmoe.ops.reference import dense, swiglu
from jmoe.ops.routing import route

SAMPLES = 7


def shapes(tokens: list[int] | None, experts: int) -> list[LayerShape]:
    """gpt-oss's layer on a GPU; elsewhere one small enough for a CPU."""
    if jax.default_backend() == "gpu":
        return [LayerShape(count, experts=experts) for count in tokens or (1, 4, 16, 64, 256, 1024, 4096)]
    return [LayerShape(count, 256, 256, experts) for count in tokens or (1, 16, 64)]


def measure(shape: LayerShape) -> dict[str, float | str]:
    """Microseconds a call by implementation, or why there is no figure."""
    return {name: implementation(shape) for name, implementation in IMPLEMENTATIONS.items()}


def calls_for(shape: LayerShape) -> int:
    """Calls in one sample: enough that launching the sample does not show."""
    return 50 if shape.tokens < 1024 else 10


def scan_microseconds[W](
    shape: LayerShape, layer_call: Callable[[jax.Array, jax.Array, W], jax.Array], weights: W
) -> float:
    """Median time of layer_call(x, router_logits, weights) inside lax.scan, with other logits at each step.

    The weights are an argument: as constants XLA would copy and fold over a gigabyte while it compiles.
    """
    layer = random_layer(shape)
    steps = calls_for(shape)
    logits = jax.random.normal(jax.random.key(1), (steps, *layer.router_logits.shape), jnp.bfloat16)

    @jax.jit
    def sample(x: jax.Array, logits: jax.Array, weights: W) -> jax.Array:
        def step(x: jax.Array, step_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = layer_call(x, step_logits, weights)
            return x + 0 * y[:1, :1], y[0, 0]  # each step waits for the last

        return lax.scan(step, x, logits)[1]

    sample(layer.x, logits, weights).block_until_ready()
    times = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        sample(layer.x, logits, weights).block_until_ready()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / steps * 1e6


def jmoe(shape: LayerShape) -> float:
    """jmoe.moe, routing included."""
    call = lambda x, logits, experts: moe(x, logits, experts, top_k=shape.top_k)  # noqa: E731
    return scan_microseconds(shape, call, random_layer(shape).experts)


def jmoe_packed(shape: LayerShape) -> float:
    """jmoe.moe on packed experts, routing included."""
    call = lambda x, logits, experts: moe(x, logits, experts, top_k=shape.top_k)  # noqa: E731
    return scan_microseconds(shape, call, pack(random_layer(shape).experts))


def triton_kernels(shape: LayerShape) -> float | str:
    """OpenAI's fused block and its routing, the better of its two weight layouts."""
    if importlib.util.find_spec("torch") is None:
        return "no torch"
    from jmoe.interop import triton_kernels_peer as peer

    if (reason := peer.missing()) is not None:
        return reason
    from jmoe.bench.torch_timing import graph_microseconds
    from jmoe.interop.dlpack import to_torch

    layer = jax.tree.map(to_torch, random_layer(shape))
    best = float("inf")
    for num_warps in (4, 8):
        block = peer.prepare(layer.experts, num_warps=num_warps)
        call = lambda block=block: block(layer.x, peer.route(layer.router_logits, shape.top_k))  # noqa: E731
        best = min(best, graph_microseconds(call, calls_for(shape)))
    return best


def ragged_dot(shape: LayerShape) -> float | str:
    """What JAX itself offers: experts dequantised to bf16, sorted rows through lax.ragged_dot."""
    if jax.default_backend() != "gpu":
        return "GPU only"
    experts = random_layer(shape).experts
    as_bfloat16 = jax.vmap(functools.partial(dense, dtype=jnp.bfloat16))
    gate_up, down = (jnp.swapaxes(as_bfloat16(w), 1, 2) for w in (experts.gate_up, experts.down))
    weights = Dense(gate_up, experts.gate_up_bias, down, experts.down_bias)
    return scan_microseconds(shape, lambda x, logits, w: ragged_layer(x, logits, w, shape.top_k), weights)


class Dense(NamedTuple):
    """Dense experts as lax.ragged_dot takes them: gate_up [E, H, 2I], down [E, I, H]."""

    gate_up: jax.Array
    gate_up_bias: jax.Array | None
    down: jax.Array
    down_bias: jax.Array | None


def ragged_layer(x: jax.Array, logits: jax.Array, weights: Dense, top_k: int) -> jax.Array:
    """The layer by lax.ragged_dot."""
    routing = route(logits, top_k)
    flat = routing.experts.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=weights.down.shape[0])
    rows = flat[order]
    z = lax.ragged_dot(x[order // top_k], weights.gate_up, sizes)
    z = z if weights.gate_up_bias is None else z + weights.gate_up_bias[rows]
    out = lax.ragged_dot(swiglu(z, 1.702, 7.0).astype(x.dtype), weights.down, sizes)
    out = out if weights.down_bias is None else out + weights.down_bias[rows]
    weighted = out.astype(jnp.float32) * routing.weights.reshape(-1)[order][:, None]
    return jnp.zeros(x.shape, jnp.float32).at[order // top_k].add(weighted).astype(x.dtype)


IMPLEMENTATIONS: dict[str, Callable[[LayerShape], float | str]] = {
    "jmoe": jmoe,
    "jmoe, packed": jmoe_packed,
    "triton_kernels": triton_kernels,
    "lax.ragged_dot, bf16": ragged_dot,
}
