"""Kernels that read one layer of a stack in place, in Triton's interpreter: the same bits as from the layer alone."""

import dataclasses

import pytest
import torch

from jmoe.interop.gradient import Options, backward, run
from jmoe.triton_src.activation import SwiGLU
from tests.torch_layers import Layer, random_layer

pytestmark = pytest.mark.interpret

OPTIONS = Options(96, False, 2, SwiGLU(), False)
SIZES = {"tokens": 24, "adapters": 2, "gate_up_rank": 5, "down_rank": 16, "mixed": True}


def buffers_of(layer: Layer) -> dict[str, torch.Tensor]:
    """By the names of launch plans."""
    buffers = {"x": layer.x, "router_logits": layer.router_logits, "adapter_ids": layer.adapter_ids}
    for projection in ("gate_up", "down"):
        weight = getattr(layer.experts, projection)
        if isinstance(weight, torch.Tensor):
            buffers[projection] = weight
        else:
            buffers |= {projection: weight.blocks, f"{projection}_scales": weight.scales}
        buffers[f"{projection}_bias"] = getattr(layer.experts, f"{projection}_bias")
        buffers |= {f"{projection}_{part}": getattr(layer.lora, f"{projection}_{part}") for part in ("a", "b", "scale")}
    return buffers


@pytest.mark.parametrize("mxfp4", [True, False])
@pytest.mark.parametrize("lora_too", [True, False])
def test_a_layer_of_a_stack_is_the_layer(mxfp4: bool, lora_too: bool) -> None:
    layers = [random_layer(**SIZES, mxfp4=mxfp4, seed=seed) for seed in range(3)]
    one = buffers_of(dataclasses.replace(layers[0], experts=layers[1].experts, lora=layers[1].lora))
    everyone = [buffers_of(layer) for layer in layers]
    lora = {f"{projection}_{part}" for projection in ("gate_up", "down") for part in ("a", "b", "scale")}
    stacked = set(one) - {"x", "router_logits", "adapter_ids"} - (set() if lora_too else lora)
    stack = one | {name: torch.stack([buffers[name] for buffers in everyone]) for name in stacked}
    stack["layer"] = torch.tensor([1], dtype=torch.int32)
    want, got = run(OPTIONS, one, keep=True), run(OPTIONS, stack, keep=True)
    assert torch.equal(got["y"], want["y"])
    dy = torch.randn(one["x"].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    names = ["x", "router_logits", "gate_up_a", "gate_up_b", "down_a", "down_b", "gate_up_bias", "down_bias"]
    kept = ("experts", "weights", "pre_activations")
    exact = backward(OPTIONS, one | {name: want[name] for name in kept}, dy, {name: one[name] for name in names})
    ours = backward(OPTIONS, stack | {name: got[name] for name in kept}, dy, {name: one[name] for name in names})
    for name in names:
        assert torch.equal(ours[name], exact[name]), name
