"""Routers of other models than gpt-oss on a GPU: y and gradients from JAX and from torch, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import torch

import jmoe
from jmoe.ops.random_layer import LayerShape, random_layer
from tests import torch_layers
from tests.gpu.test_gradient import in_torch, jax_gradients
from tests.tolerances import BFLOAT16, GRADIENT
from tests.torch_layers import gradients

pytestmark = pytest.mark.gpu

SCORINGS = {
    "softmax over all": (jmoe.Scoring(renormalize=False), False),
    "DeepSeek-V3": (jmoe.Scoring("sigmoid", scale=2.5), True),
    "sigmoid": (jmoe.Scoring("sigmoid", renormalize=False), False),
}


@pytest.mark.parametrize("tokens", [5, 64, 1000])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("scoring", "biased"), SCORINGS.values(), ids=SCORINGS)
def test_y_and_gradients_agree_with_float64(scoring: jmoe.Scoring, biased: bool, packed: bool, tokens: int) -> None:
    from jmoe.interop import reference
    from jmoe.interop.dlpack import to_torch
    from jmoe.interop.moe import moe

    if packed and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("kernels for packed weights need compute capability 9.0")
    layer = random_layer(LayerShape(tokens, experts=8))
    run = dataclasses.replace(layer, experts=jmoe.pack(layer.experts)) if packed else layer
    # More than scores differ by: rounding changes no choice.
    bias = jnp.roll(jnp.arange(8, dtype=jnp.float32), 3) if biased else None
    dy = jax.random.normal(jax.random.key(7), layer.x.shape, jnp.bfloat16)
    of_torch = {"scoring": scoring, "choice_bias": None if bias is None else to_torch(bias)}
    plain, ours = (dataclasses.replace(in_torch(each), **of_torch) for each in (layer, run))

    exact = reference.moe(plain.x, plain.router_logits, plain.experts, **plain.options)
    y = moe(ours.x, ours.router_logits, ours.experts, **ours.options)
    assert torch_layers.relative_error(y, exact) <= BFLOAT16.relative
    options = {"scoring": scoring, "choice_bias": bias}
    from_jax = jmoe.moe(run.x, run.router_logits, run.experts, top_k=4, **options)
    assert torch.equal(to_torch(from_jax), y)

    wanted = gradients(plain, reference.moe, to_torch(dy))
    from_torch = gradients(ours, moe, to_torch(dy))
    of_jax = jax_gradients(run, dy, **options)
    for name, want in wanted.items():
        assert torch.equal(to_torch(of_jax[name]), from_torch[name]), name
        assert torch_layers.relative_error(from_torch[name], want) <= GRADIENT.relative, name
