"""Kernels that read one layer of a stack in place: the same bits as from the layer alone."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jmoe
from jmoe.ops.random_layer import Layer, LayerShape, random_layer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tokens", [1, 16, 64, 300, 2000])
@pytest.mark.parametrize("packed", [True, False])
def test_a_layer_of_a_stack_is_the_layer(tokens: int, packed: bool) -> None:
    shape = LayerShape(tokens, 320, 352, 8, adapters=2, rank=16, mixed=True)
    layers = [random_layer(shape, seed) for seed in range(3)]
    if packed:
        layers = [dataclasses.replace(layer, experts=jmoe.pack(layer.experts)) for layer in layers]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    dy = jax.random.normal(jax.random.key(7), layers[0].x.shape, jnp.bfloat16)

    @jax.jit
    def run(layer: Layer, index: jax.Array | None) -> tuple[jax.Array, dict]:
        def function(x: jax.Array, lora: jmoe.Lora) -> jax.Array:
            return jmoe.moe(
                x,
                layers[0].router_logits,
                layer.experts,
                top_k=4,
                lora=lora,
                adapter_ids=layers[0].adapter_ids,
                layer=index,
            )

        y, pullback = jax.vjp(function, layers[0].x, layer.lora)
        return y, pullback(dy)

    for index, layer in enumerate(layers):
        y, (x_grad, lora_grad) = run(layer, None)
        for lora in (stack.lora, layer.lora):
            got, (x_got, lora_got) = run(dataclasses.replace(stack, lora=lora), jnp.int32(index))
            assert jnp.array_equal(got, y)
            assert jnp.array_equal(x_got, x_grad)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, lora_got, lora_grad))
