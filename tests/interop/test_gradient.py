"""Gradients by the kernels on a CPU, through Triton's interpreter, against autograd in float64."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from jmoe.interop import reference
from jmoe.interop.moe import moe
from jmoe.triton_src.activation import SwiGLU
from tests.interop.test_moe import layers
from tests.tolerances import GRADIENT, GRADIENT_OF_TORCH
from tests.torch_layers import (
    Layer,
    Routing,
    gradients,
    leaves,
    poisoned_results,
    random_layer,
    relative_error,
    surround,
    transform,
)

pytestmark = pytest.mark.interpret

ENOUGH = 512
"""Elements over which rounding errors average out."""


def check(layer: Layer, **options: object) -> dict[str, torch.Tensor]:
    """Gradients in poison agree with float64, at most 1.2 times as far off as torch's bf16, and write no more."""
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(layer.x.shape, generator=generator).bfloat16()
    exact = gradients(layer, reference.moe, dy)
    theirs = gradients(layer, reference.moe, dy, dtype=torch.bfloat16)
    poisoned = transform(layer, surround)
    with poisoned_results():
        ours = gradients(poisoned, moe, surround(dy), **options)
    for name, want in exact.items():
        got = ours[name]
        assert got.shape == want.shape
        assert got.dtype == leaves(layer)[name].dtype
        error = relative_error(got, want)
        few = want.numel() < ENOUGH
        assert error <= GRADIENT.relative * (2 if few else 1), name
        if not few:
            assert error <= GRADIENT_OF_TORCH * relative_error(theirs[name], want), name
    return ours


@pytest.mark.slow
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


@pytest.mark.parametrize("experts", [1, 3, 256])
def test_every_number_of_experts(experts: int) -> None:
    check(random_layer(tokens=6, hidden=32, intermediate=32, experts=experts, top_k=min(4, experts)))


def test_one_expert_takes_every_token_and_others_have_zero_gradients() -> None:
    layer = random_layer(tokens=70, experts=3, top_k=1, adapters=1, gate_up_rank=4, down_rank=4)
    layer.router_logits[:, 1] = 100
    ours = check(layer)
    for name in ("gate_up_a", "gate_up_b", "down_a", "down_b"):
        assert ours[name][:, 1].any()
        assert not ours[name][:, [0, 2]].any()


def test_a_replayed_routing_has_a_gradient_in_its_weights() -> None:
    layer = random_layer(tokens=9, experts=5, top_k=3)
    chosen, weights = reference.route(layer.router_logits.double(), 3)
    dy = torch.randn(layer.x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = {}
    for function, dtype in ((moe, torch.float32), (reference.moe, torch.float64)):
        routing = Routing(chosen.int(), weights.to(dtype, copy=True).requires_grad_())
        y = function(layer.x, None, layer.experts, top_k=3, routing=routing)
        (found[function],) = torch.autograd.grad(y, routing.weights, dy.to(y.dtype))
    assert relative_error(found[moe], found[reference.moe]) <= GRADIENT.relative


def test_an_offset_leaves_out_pairs_that_are_not_held() -> None:
    layer = random_layer(tokens=12, experts=6, top_k=2)
    dy = torch.randn(layer.x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()

    def of_shard(first: int, last: int) -> dict[str, torch.Tensor]:
        part = lambda tree: transform(tree, lambda tensor: tensor[first:last].contiguous())  # noqa: E731
        held = dataclasses.replace(layer, experts=part(layer.experts))
        return gradients(held, moe, dy, expert_offset=torch.tensor([first], dtype=torch.int32))

    whole, low, high = gradients(layer, moe, dy), of_shard(0, 2), of_shard(2, 6)
    for name in ("x", "router_logits"):
        assert relative_error(low[name].double() + high[name].double(), whole[name].double()) <= GRADIENT.relative


def test_nan_ends_where_autograd_has_it() -> None:
    layer = random_layer(tokens=40, adapters=2, gate_up_rank=5, down_rank=3, mixed=True)
    layer.x[3, 5] = torch.nan
    layer.lora.down_b[1, :, 0] = torch.nan
    dy = torch.randn(layer.x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact, ours = gradients(layer, reference.moe, dy), gradients(layer, moe, dy)
    for name in ("x", "router_logits", "down_a", "gate_up_a"):
        assert relative_error(ours[name], exact[name]) <= 2 * GRADIENT.relative, name


@pytest.mark.parametrize("limit", [7.0, 7.02, 5.03])
def test_what_is_just_within_the_limit_has_a_gradient_and_what_is_beyond_none(limit: float) -> None:
    layer = random_layer(tokens=1, hidden=32, intermediate=32, experts=1, top_k=1, mxfp4=False)
    within = torch.tensor([True, False]).repeat(16)
    gate = torch.where(within, limit - 0.003, limit + 0.003)
    bias = torch.stack([gate, gate], dim=1).reshape(1, 64)
    weight = torch.zeros(1, 64, 32).bfloat16()
    layer = dataclasses.replace(layer, experts=dataclasses.replace(layer.experts, gate_up=weight, gate_up_bias=bias))
    options = {"activation": SwiGLU(limit=limit), "recompute": False}
    grad = gradients(layer, moe, torch.ones_like(layer.x), **options)["gate_up_bias"]
    assert torch.equal((grad != 0).reshape(32, 2), within[:, None].expand(32, 2))


def test_differences_of_the_float64_layer_are_the_gradient_in_x() -> None:
    layer = random_layer(tokens=6, adapters=1, gate_up_rank=5, down_rank=3)
    dy = torch.randn(layer.x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = gradients(layer, moe, dy)["x"].double()

    def moved(row: int, column: int, step: float) -> torch.Tensor:
        x = layer.x.double()
        x[row, column] += step
        y = reference.moe(x, layer.router_logits, layer.experts, **layer.options)
        return (y * dy.double()).sum()

    usual = ours.square().mean().sqrt()
    for row, column in ((0, 0), (1, 40), (3, 17), (5, 63)):
        difference = (moved(row, column, 1e-4) - moved(row, column, -1e-4)) / 2e-4
        assert abs(ours[row, column] - difference) <= 3e-2 * usual


@pytest.mark.slow
def test_twice_the_same_bits() -> None:
    layer = random_layer(tokens=50, adapters=2, gate_up_rank=5, down_rank=3, mixed=True)
    dy = torch.randn(layer.x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    first, again = gradients(layer, moe, dy), gradients(layer, moe, dy)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_second_derivatives_are_refused() -> None:
    layer = random_layer(tokens=3)
    x = layer.x.requires_grad_()
    y = moe(x, layer.router_logits, layer.experts, **layer.options)
    (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative; interop.reference.moe has"):
        torch.autograd.grad(dx.float().square().sum(), x)


def test_experts_weights_are_constants() -> None:
    layer = random_layer(tokens=3, mxfp4=False)
    layer.experts.down.requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient in the experts' weights, but down requires one"):
        moe(layer.x, layer.router_logits, layer.experts, **layer.options)
