"""Other activations than gpt-oss's on a GPU: y and gradients from JAX and from torch, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import torch

import jmoe
from jmoe.ops.random_layer import Layer, LayerShape, random_layer
from tests import torch_layers
from tests.gpu.test_gradient import in_torch, jax_gradients
from tests.tolerances import BFLOAT16, GRADIENT, GRADIENT_OF_TORCH
from tests.torch_layers import gradients

pytestmark = pytest.mark.gpu

ACTIVATIONS = {
    "silu(gate) * up": jmoe.SiluAndMul(),
    "halves": jmoe.SiluAndMul(interleaved=False),
    "clamped": jmoe.SwiGLU(alpha=0.7, limit=16.0, offset=-0.5),
}


def far_from_the_limit(layer: Layer) -> Layer:
    """With some columns of gate and up past the clamp's limit by their bias, on either side, and none near it.

    The gradient jumps at the limit: a result that roundings put on its other side would count as an error.
    """
    column = jnp.arange(layer.experts.gate_up_bias.shape[1])
    bias = jnp.where(column % 5 == 0, 32, jnp.where(column % 7 == 0, -32, layer.experts.gate_up_bias))
    return dataclasses.replace(
        layer, experts=dataclasses.replace(layer.experts, gate_up_bias=bias.astype(jnp.bfloat16))
    )


@pytest.mark.parametrize("tokens", [5, 64, 1000])
@pytest.mark.parametrize("weights", ["packed", "mxfp4", "bf16"])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_y_and_gradients_agree_with_float64(activation: jmoe.SwiGLU, weights: str, tokens: int) -> None:
    from jmoe.interop import reference
    from jmoe.interop.dlpack import to_torch
    from jmoe.interop.moe import moe

    packed = weights == "packed"
    if packed and not activation.interleaved:
        pytest.skip("packed weights are interleaved")
    if packed and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("kernels for packed weights need compute capability 9.0")
    layer = random_layer(LayerShape(tokens, experts=8, adapters=2, rank=16, mixed=True, mxfp4=weights != "bf16"))
    if activation.limit is not None:
        layer = far_from_the_limit(layer)
    run = dataclasses.replace(layer, experts=jmoe.pack(layer.experts)) if packed else layer
    dy = jax.random.normal(jax.random.key(7), layer.x.shape, jnp.bfloat16)
    plain = dataclasses.replace(in_torch(layer), activation=activation)
    ours = dataclasses.replace(in_torch(run), activation=activation)

    exact = reference.moe(plain.x, plain.router_logits, plain.experts, **plain.options)
    y = moe(ours.x, ours.router_logits, ours.experts, **ours.options)
    assert torch_layers.relative_error(y, exact) <= BFLOAT16.relative
    from_jax = jmoe.moe(
        run.x, run.router_logits, run.experts, top_k=4, lora=run.lora, adapter_ids=run.adapter_ids,
        activation=activation,
    )  # fmt: skip
    assert torch.equal(to_torch(from_jax), y)

    wanted = gradients(plain, reference.moe, to_torch(dy))
    theirs = gradients(plain, reference.moe, to_torch(dy), dtype=torch.bfloat16)
    from_torch = gradients(ours, moe, to_torch(dy))
    of_jax = jax_gradients(run, dy, activation=activation)
    for name, want in wanted.items():
        assert torch.equal(to_torch(of_jax[name]), from_torch[name]), name
        error = torch_layers.relative_error(from_torch[name], want)
        assert error <= GRADIENT.relative, name
        assert error <= GRADIENT_OF_TORCH * torch_layers.relative_error(theirs[name], want), name
