"""Kernels are not handed addresses inside other arrays, which would not be multiples of what they are compiled for."""

import re

import jax
import jax.numpy as jnp
import pytest

import jmoe
from jmoe.ops.random_layer import Layer, LayerShape, random_layer


def program(layer: Layer, ids: jax.Array) -> jax.Array:
    """A layer whose adapter_ids begin at 4 bytes in another array."""
    return jmoe.moe(
        layer.x, layer.router_logits, layer.experts, top_k=4, lora=layer.lora, adapter_ids=ids,
        backend=jmoe.Target("sm_90"),
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [16, 300])
def test_a_small_operand_reaches_kernels_behind_a_barrier_alone(tokens: int) -> None:
    """XLA would make one launch of a slice and the kernel that reads it."""
    shape = LayerShape(tokens, hidden=96, intermediate=64, experts=6, adapters=2, rank=8, mixed=True)
    layer = jax.eval_shape(lambda: random_layer(shape))
    ids = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    text = jax.jit(program).trace(layer, ids).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@triton_kernel_call" in line]
    assert calls
    adapter_ids = set(re.findall(rf"(%\w+) = stablehlo\.optimization_barrier %\w+ : tensor<{tokens}xi32>", text))
    assert adapter_ids
    operands = [operand for line in calls for operand in re.findall(r"%\w+", line.split("custom_call")[1])]
    assert adapter_ids & set(operands)
    assert not [line for line in calls if re.search(rf"%arg\d+.*tensor<{tokens}xi32>", line)]
