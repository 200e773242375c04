"""Gradients by the kernels on a CPU, through Triton's interpreter, against autograd in float64."""

import pytest
import torch
from hypothesis import given, settings

from jmoe.interop import launch, reference
from jmoe.interop.moe import moe
from tests.interop.test_moe import layers
from tests.torch_layers import Layer, PoisonedAllocator, random_layer, relative_error, surround, transform

pytestmark = pytest.mark.interpret

RELATIVE = 1e-2
OF_TORCH = 1.2
ENOUGH = 512
"""Elements over which rounding errors average out."""


def leaves(layer: Layer) -> dict[str, torch.Tensor]:
    """What is differentiated, by name."""
    named = {"x": layer.x, "router_logits": layer.router_logits}
    for projection in ("gate_up", "down"):
        named[f"{projection}_bias"] = getattr(layer.experts, f"{projection}_bias")
        if layer.lora is not None:
            named |= {f"{projection}_{part}": getattr(layer.lora, f"{projection}_{part}") for part in "ab"}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def gradients(layer: Layer, function: object, dy: torch.Tensor, **options: object) -> dict[str, torch.Tensor]:
    """Of <y, dy> in every leaf."""
    found = leaves(layer)
    for tensor in found.values():
        tensor.requires_grad_()
    y = function(layer.x, layer.router_logits, layer.experts, **{**layer.options, **options})
    grads = torch.autograd.grad(y, list(found.values()), dy.to(y.dtype), allow_unused=True)
    for tensor in found.values():
        tensor.requires_grad_(False)
    return {name: grad for name, grad in zip(found, grads, strict=True) if grad is not None}


def check(layer: Layer, **options: object) -> dict[str, torch.Tensor]:
    """Gradients in poison agree with float64, at most 1.2 times as far off as torch's bf16, and write no more."""
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(layer.x.shape, generator=generator).bfloat16()
    exact = gradients(layer, reference.moe, dy)
    theirs = gradients(layer, reference.moe, dy, dtype=torch.bfloat16)
    poisoned = transform(layer, surround)
    allocate, launch.allocate = launch.allocate, PoisonedAllocator()
    try:
        ours = gradients(poisoned, moe, surround(dy), **options)
        assert launch.allocate.guards_are_intact()
    finally:
        launch.allocate = allocate
    for name, want in exact.items():
        got = ours[name]
        assert got.shape == want.shape
        assert got.dtype == leaves(layer)[name].dtype
        error = relative_error(got, want)
        few = want.numel() < ENOUGH
        assert error <= RELATIVE * (2 if few else 1), name
        if not few:
            assert error <= OF_TORCH * relative_error(theirs[name], want), name
    return ours


@settings(max_examples=12)
@given(layers())
def test_any_layers_gradients_agree_with_float64(layer: Layer) -> None:
    check(layer)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 40, "experts": 4, "top_k": 2},
        {"tokens": 40, "experts": 4, "top_k": 2, "adapters": 1, "gate_up_rank": 5, "down_rank": 20},
        {"tokens": 50, "experts": 3, "top_k": 3, "adapters": 3, "gate_up_rank": 8, "down_rank": 4, "mixed": True},
        {"tokens": 20, "experts": 5, "top_k": 1, "adapters": 1, "gate_up_rank": 256, "down_rank": 1, "mxfp4": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", [False, True])
def test_kept_and_recomputed(options: dict, recompute: bool) -> None:
    check(random_layer(**options), recompute=recompute)
