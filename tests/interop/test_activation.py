"""Other activations than gpt-oss's by the kernels on a CPU, through Triton's interpreter.

Any activation's numbers and gradients are tested in test_moe.py and test_gradient.py, whose layers draw one.
"""

import dataclasses

import pytest
import torch

from jmoe.interop import reference
from jmoe.interop.moe import moe
from jmoe.triton_src.activation import SiluAndMul, SwiGLU
from tests.interop import test_gradient as gradient_tests
from tests.torch_layers import Layer, random_layer, transform

pytestmark = pytest.mark.interpret


def test_the_reference_is_torchs_silu() -> None:
    z = torch.randn(5, 14, dtype=torch.float64)
    want = torch.nn.functional.silu(z[:, :7]) * z[:, 7:]
    assert torch.allclose(reference.swiglu(z, SiluAndMul(interleaved=False)), want, rtol=1e-14)
    alternating = torch.stack([z[:, :7], z[:, 7:]], dim=-1).flatten(-2)
    assert torch.allclose(reference.swiglu(alternating, SiluAndMul()), want, rtol=1e-14)


def halves(layer: Layer) -> Layer:
    """The same layer with all of gate before all of up."""

    def split(tensor: torch.Tensor, axis: int = 1) -> torch.Tensor:
        rows = torch.arange(tensor.shape[axis])
        return tensor.index_select(axis, torch.cat([rows[0::2], rows[1::2]]))

    experts = dataclasses.replace(
        layer.experts,
        gate_up=transform(layer.experts.gate_up, split),
        gate_up_bias=split(layer.experts.gate_up_bias),
    )
    lora = dataclasses.replace(layer.lora, gate_up_b=split(layer.lora.gate_up_b, 2))
    activation = dataclasses.replace(layer.activation, interleaved=False)
    return dataclasses.replace(layer, experts=experts, lora=lora, activation=activation)


def test_halves_are_the_same_bits_in_another_order() -> None:
    layer = random_layer(tokens=9, adapters=1, gate_up_rank=5, down_rank=3, activation=SwiGLU(limit=1.5))
    dy = torch.randn(layer.x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    apart = halves(layer)
    y, again = (moe(each.x, each.router_logits, each.experts, **each.options) for each in (layer, apart))
    assert torch.equal(again, y)
    want, got = (gradient_tests.gradients(each, moe, dy) for each in (layer, apart))
    for name in ("router_logits", "down_a", "down_b", "down_bias"):
        assert torch.equal(got[name], want[name]), name
    for name, axis in (("gate_up_bias", 1), ("gate_up_b", 2)):
        gate, up = got[name].chunk(2, dim=axis)
        assert torch.equal(torch.stack([gate, up], dim=axis + 1).flatten(axis, axis + 1), want[name]), name


@dataclasses.dataclass
class Packed:
    """One packed expert of 64 by 64 zeros, or twice as many rows."""

    shape: tuple[int, int, int]

    @property
    def words(self) -> torch.Tensor:
        return torch.zeros(1, self.shape[1] // 64, 1, 512, dtype=torch.int32)

    @property
    def scales(self) -> torch.Tensor:
        return torch.zeros(1, self.shape[1] // 64, 1, 32, dtype=torch.int32)


def test_packed_halves_are_refused() -> None:
    layer = random_layer(tokens=2, hidden=64, intermediate=64, experts=1, top_k=1, bias=False)
    experts = dataclasses.replace(layer.experts, gate_up=Packed((1, 128, 64)), down=Packed((1, 64, 64)))
    with pytest.raises(ValueError, match="activation must have interleaved=True with packed experts"):
        moe(layer.x, layer.router_logits, experts, top_k=1, activation=SiluAndMul(interleaved=False))
