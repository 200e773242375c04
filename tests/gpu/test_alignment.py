"""Operands that are slices of other arrays on a GPU, at addresses that are no multiples of 16 bytes there."""

import jax
import jax.numpy as jnp
import pytest

import jmoe
from jmoe.ops.random_layer import Layer, LayerShape, random_layer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("packed", [False, True])
def test_slices_give_the_bits_of_whole_arrays(packed: bool) -> None:
    """Of more than 256 bytes, which XLA would not copy."""
    layer = random_layer(LayerShape(300, experts=6, adapters=2, rank=8, mixed=True))
    experts = jmoe.pack(layer.experts) if packed else layer.experts

    def call(x: jax.Array, logits: jax.Array, ids: jax.Array, scales: jax.Array) -> jax.Array:
        assert layer.lora is not None
        lora = jmoe.Lora(
            layer.lora.gate_up_a, layer.lora.gate_up_b, scales[1:3], layer.lora.down_a, layer.lora.down_b, scales[3:5]
        )
        return jmoe.moe(x[1:301], logits[1:301], experts, top_k=4, lora=lora, adapter_ids=ids[1:301])

    def within(whole: jax.Array) -> jax.Array:
        return jnp.pad(whole, [(1, 2), *[(0, 0)] * (whole.ndim - 1)])

    def of(layer: Layer) -> tuple[jax.Array, ...]:
        assert layer.lora is not None
        scales = jnp.concatenate([layer.lora.gate_up_scale, layer.lora.down_scale])
        return within(layer.x), within(layer.router_logits), within(layer.adapter_ids), within(scales)

    want = jmoe.moe(layer.x, layer.router_logits, experts, top_k=4, lora=layer.lora, adapter_ids=layer.adapter_ids)
    assert jnp.array_equal(jax.jit(call)(*of(layer)), want)
