"""Lowers a layer's forward pass, backward pass and decoding for GPUs, in whatever versions are installed."""

import dataclasses
import functools
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jmoe
from jmoe.nn import LoraConfig, MoE
from jmoe.ops.decode.cached_attention import cached_attention
from jmoe.ops.decode.linear import Expand, decode_linear
from jmoe.ops.decode.norm_linear import Narrow, norm_linear
from jmoe.ops.launch.layer import route_and_sort
from jmoe.ops.paged.decode_attention import paged_decode_attention
from jmoe.ops.paged.prefill_attention import paged_prefill_attention
from jmoe.ops.random_layer import Layer, LayerShape, random_layer

ROWS, HIDDEN, RANK, SLOTS = 16, 128, 16, 1088
INDEX = jax.ShapeDtypeStruct((), jnp.int32)


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def lower(name: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Lowers for CUDA, and fails unless kernels are launched there."""
    began = time.perf_counter()
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    launches = program.count("@triton_kernel_call_ffi")
    print(f"  {name}: {launches} launches, {time.perf_counter() - began:.1f} s", flush=True)
    assert launches > 0, f"{name}: no kernel is launched"


def lower_packed_layer(tokens: int, backward: bool = False) -> None:
    """Packed experts on Hopper, by jmoe.moe: forward with LoRA, or the gradient."""
    lora = {} if backward else {"adapters": 1, "rank": RANK}
    shape = LayerShape(tokens, hidden=HIDDEN, intermediate=HIDDEN, experts=4, top_k=2, **lora)
    layer = jax.eval_shape(functools.partial(random_layer, shape))
    layer = dataclasses.replace(layer, experts=jax.eval_shape(jmoe.pack, layer.experts))

    def forward(x: jax.Array, lora: Any, layer: Layer) -> jax.Array:
        backend = jmoe.Target("sm_90")
        return jmoe.moe(x, layer.router_logits, layer.experts, top_k=shape.top_k, lora=lora, backend=backend)

    def loss(x: jax.Array, lora: Any, layer: Layer) -> jax.Array:
        return forward(x, lora, layer).astype(jnp.float32).sum()

    call = jax.grad(loss) if backward else forward
    name = f"packed layer of {tokens} tokens{', backward' if backward else ''}, sm_90"
    lower(name, call, layer.x, layer.lora, layer)


def lower_flax_layer(architecture: str) -> None:
    """The Flax layer, with LoRA on experts in the files' layout."""

    def make() -> MoE:
        lora, backend = LoraConfig(RANK, alpha=RANK), jmoe.Target(architecture)
        return MoE(HIDDEN, HIDDEN, 4, top_k=2, rngs=nnx.Rngs(0), lora=lora, backend=backend)

    definition, state = nnx.split(nnx.eval_shape(make))
    forward = lambda state, x: nnx.merge(definition, state)(x)  # noqa: E731
    lower(f"Flax layer, {architecture}", forward, state, array(ROWS, HIDDEN))


def lower_decoding(architecture: str) -> None:
    """What a decoding step has beside the experts."""
    at = {"target": jmoe.Target(architecture)}
    weight, bias = array(2, 5 * HIDDEN, HIDDEN), array(2, 5 * HIDDEN)
    lora = Expand(array(ROWS, RANK), array(2, 5 * HIDDEN, RANK))
    lower("decoding's product", functools.partial(decode_linear, **at), array(ROWS, HIDDEN), weight, bias, INDEX, lora)

    def router(x: jax.Array, norm: jax.Array, weight: jax.Array, index: jax.Array) -> Any:
        return norm_linear(x, index, norm=norm, eps=1e-5, narrow=Narrow(weight, 4), **at)

    lower("decoding's norm and router", router, array(ROWS, HIDDEN), array(2, HIDDEN), array(2, 32, HIDDEN), INDEX)
    factors = array(ROWS, 32, dtype=jnp.float32)
    lower(
        "decoding's attention",
        functools.partial(cached_attention, **at),
        array(ROWS, 80, 64), factors, factors, array(2, ROWS, 8, SLOTS, 128), INDEX, array(ROWS, dtype=jnp.int32),
        array(2, 64), INDEX,
    )  # fmt: skip
    pages, rows = array(2, 9, 8, 64, 128), array(ROWS, dtype=jnp.int32)
    lower(
        "decoding's attention to pages",
        functools.partial(paged_decode_attention, window=None, **at),
        array(ROWS, 80, 64), factors, factors, pages, INDEX, rows, array(ROWS, 64, dtype=jnp.int32), array(2, 64),
        INDEX,
    )  # fmt: skip
    lower(
        "prompts' attention to pages",
        functools.partial(paged_prefill_attention, window=128, **at),
        array(ROWS, 80, 64), factors, factors, pages, INDEX, array(3, dtype=jnp.int32), array(2, dtype=jnp.int32),
        array(2, 4, dtype=jnp.int32), array(2, 64), INDEX,
    )  # fmt: skip


if __name__ == "__main__":
    packages = ("jax", "flax", "jax-triton", "triton")
    print(", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages), flush=True)
    # A call of jax-triton that no primitive of jmoe's encloses.
    bare = functools.partial(route_and_sort, top_k=4, target=jmoe.Target("sm_90"))
    lower("routing alone, sm_90", bare, array(ROWS, 32), array(1, dtype=jnp.int32))
    lower_packed_layer(ROWS)
    lower_packed_layer(1024, backward=True)
    lower_flax_layer("sm_100")
    lower_decoding("sm_90")
