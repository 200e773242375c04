"""What the layer does on every backend: XLA, kernels in Triton's interpreter, and on a GPU from torch and JAX."""

import dataclasses

import pytest
import torch

import jmoe
from jmoe.interop import reference
from tests.backends import Backend, Jax, Kernels
from tests.torch_layers import Layer, Routing, gradients, random_layer, relative_error, transform


@pytest.fixture(
    params=[
        "xla",
        pytest.param("interpreter", marks=pytest.mark.interpret),
        pytest.param("gpu from torch", marks=pytest.mark.gpu),
        pytest.param("gpu from jax", marks=pytest.mark.gpu),
    ]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    return {
        "xla": Jax("xla", wide=True),
        "interpreter": Kernels("cpu"),
        "gpu from torch": Kernels("cuda"),
        "gpu from jax": Jax("triton", wide=False),
    }[request.param]


MIXED = {"adapters": 2, "gate_up_rank": 5, "down_rank": 3, "mixed": True}


def exact_y(layer: Layer) -> torch.Tensor:
    return reference.moe(layer.x, layer.router_logits, layer.experts, **layer.options)


def gradient_of_y(layer: Layer) -> torch.Tensor:
    """bf16, as the kernels take it."""
    return torch.randn(layer.x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()


ACTIVATIONS = {
    "of gpt-oss": jmoe.SwiGLU(),
    "silu(gate) * up": jmoe.SiluAndMul(),
    "halves": jmoe.SiluAndMul(interleaved=False),
    # Few results are near the limit: what LoRA's rounding puts on its other side has no gradient, in torch's bf16 too.
    "clamped": jmoe.SwiGLU(alpha=0.7, limit=2.0, offset=-0.5),
}


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_y_and_gradients_agree_with_float64(backend: Backend, activation: jmoe.SwiGLU) -> None:
    check_y_and_gradients(backend, random_layer(tokens=12, **MIXED, activation=activation))


def test_a_limit_that_half_the_results_pass(backend: Backend) -> None:
    check_y_and_gradients(backend, random_layer(tokens=12, activation=jmoe.SwiGLU(alpha=0.7, limit=0.75, offset=-0.5)))


SCORINGS = {
    "softmax over all": (jmoe.Scoring(renormalize=False, scale=1.5), False),
    "softmax with a bias for the choice": (jmoe.Scoring(scale=0.5), True),
    "sigmoid": (jmoe.Scoring("sigmoid", renormalize=False), False),
    "DeepSeek-V3": (jmoe.Scoring("sigmoid", scale=2.5), True),
}


@pytest.mark.parametrize(("scoring", "biased"), SCORINGS.values(), ids=SCORINGS)
def test_routers_of_other_models(backend: Backend, scoring: jmoe.Scoring, biased: bool) -> None:
    layer = random_layer(tokens=12, experts=6, top_k=3)
    plain = reference.route(layer.router_logits.double(), 3)[0]
    # More than the scores differ by: it decides every choice, and no weight.
    layer = dataclasses.replace(layer, scoring=scoring, choice_bias=torch.arange(6.0) if biased else None)
    chosen, weights = reference.route(layer.router_logits.double(), 3, scoring, layer.choice_bias)
    assert torch.equal(chosen, torch.tensor([5, 4, 3]).expand(12, 3) if biased else plain)
    assert float((weights.sum(1) - scoring.scale).abs().max()) < 1e-9 or not scoring.renormalize
    check_y_and_gradients(backend, layer)


def check_y_and_gradients(backend: Backend, layer: Layer) -> None:
    dy = gradient_of_y(layer)
    assert relative_error(backend.moe(layer), exact_y(layer)) <= backend.of_y.relative
    ours = backend.gradients(layer, dy)
    wide = transform(layer, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    wanted = gradients(wide, reference.moe, dy)  # a gradient has its tensor's dtype
    assert ours.keys() == wanted.keys()
    for name, want in wanted.items():
        assert relative_error(ours[name], want) <= 2 * backend.of_gradients.relative, name  # some have few elements


def test_no_tokens_have_no_results_and_gradients_of_zero(backend: Backend) -> None:
    layer = random_layer(tokens=0, adapters=1, gate_up_rank=5, down_rank=3)
    assert backend.moe(layer).shape == (0, 64)
    found = backend.gradients(layer, torch.zeros(0, 64).bfloat16())
    assert found["x"].shape == (0, 64)
    assert not any(gradient.any() for gradient in found.values())


def test_shards_of_the_experts_sum_to_the_whole(backend: Backend) -> None:
    layer = random_layer(tokens=12, experts=6, top_k=3)
    total = torch.zeros(layer.x.shape, dtype=torch.float64)
    for first in (0, 2, 4):
        experts = transform(layer.experts, lambda tensor, first=first: tensor[first : first + 2].contiguous())
        total += backend.moe(dataclasses.replace(layer, experts=experts), expert_offset=first).double()
    assert relative_error(total, exact_y(layer)) <= backend.of_y.relative


def test_a_given_routing_is_replayed(backend: Backend) -> None:
    layer = random_layer(tokens=9, experts=5, top_k=2)
    generator = torch.Generator().manual_seed(1)
    routing = Routing(
        torch.randint(0, 5, (9, 2), generator=generator, dtype=torch.int32), torch.rand(9, 2, generator=generator)
    )
    exact = reference.moe(layer.x, None, layer.experts, routing=routing, **layer.options)
    assert relative_error(backend.moe(layer, routing=routing), exact) <= backend.of_y.relative


def test_a_token_whose_adapter_does_not_exist_is_nan_and_has_no_gradient(backend: Backend) -> None:
    layer = random_layer(tokens=6, **MIXED)
    layer.adapter_ids[:] = torch.tensor([0, 2, -1, -2, 1, 1000])
    y = backend.moe(layer)
    assert torch.isnan(y).all(dim=1).tolist() == [False, True, False, True, False, True]
    assert torch.isfinite(y[[0, 2, 4]]).all()
    dy = gradient_of_y(layer)
    of_others = torch.where(torch.isnan(y), 0, dy)
    got, want = backend.gradients(layer, dy), backend.gradients(layer, of_others)
    assert all(torch.isfinite(gradient).all() for gradient in got.values())
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not got["x"][[1, 3, 5]].any()
    assert not got["router_logits"][[1, 3, 5]].any()


@pytest.mark.parametrize("scale", [0, 1, 253, 254, 255])
def test_scale_bytes_at_the_ends(backend: Backend, scale: int) -> None:
    layer = random_layer(tokens=9, bias=False)
    layer.experts.gate_up.scales[1, 10, 1] = scale
    # One value of 0.5, the rest zeros of either sign: 2^126 times an activation stays below float32's infinity.
    layer.experts.gate_up.blocks[1, 10, 1] = torch.tensor([0x80, 0x08, 0x01, *[0] * 13], dtype=torch.uint8)
    assert relative_error(backend.moe(layer), exact_y(layer)) <= backend.of_y.relative


def test_nan_and_infinity_end_where_the_reference_has_them(backend: Backend) -> None:
    layer = random_layer(tokens=20, **MIXED)
    layer.x[3, 5], layer.x[7, 2] = torch.nan, torch.inf
    layer.lora.down_b[1, :, 0] = torch.nan
    y = backend.moe(layer)
    assert torch.isnan(y[3]).any()
    assert 0 < int(torch.isnan(y).all(dim=1).sum()) < 20
    assert relative_error(y, exact_y(layer)) <= backend.of_y.relative
