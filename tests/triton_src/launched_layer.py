"""One layer's launches, forward and backward, in Triton's interpreter, and what each wrote.

A test of one launch compares what it wrote with what it should have made, in float64, of what it was given.
"""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from jmoe.interop import launch as launches
from jmoe.interop import moe
from jmoe.interop.reference import dequantize
from tests.torch_layers import Layer, random_layer, transform

EXPERTS, TOP_K, ADAPTERS, RANK = 4, 2, 2, 5


@dataclasses.dataclass(frozen=True)
class LaunchedLayer:
    """A layer with biases and mixed adapters, and its buffers by name; of each position P its pair, token and so on."""

    layer: Layer
    buffers: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        """What a launch wrote, in float64."""
        return self.buffers[name].detach().double()

    @property
    def pair(self) -> Tensor:
        return self.buffers["order"].long()

    @property
    def token(self) -> Tensor:
        return self.pair // TOP_K

    @property
    def expert(self) -> Tensor:
        return self.buffers["experts"].flatten()[self.pair].long()

    @property
    def adapter(self) -> Tensor:
        """[P], -1 for none."""
        assert self.layer.adapter_ids is not None
        return self.layer.adapter_ids[self.token].long()

    @property
    def gate(self) -> Tensor:
        """The routing's weights [P, 1]."""
        return self["weights"].flatten()[self.pair, None]

    def weight(self, projection: str) -> Tensor:
        """[P, N, K], of each position's expert."""
        weight = getattr(self.layer.experts, projection)
        return torch.stack([dequantize(weight, expert, torch.float64) for expert in range(EXPERTS)])[self.expert]

    def bias(self, projection: str) -> Tensor:
        """[P, N], of each position's expert."""
        return getattr(self.layer.experts, f"{projection}_bias").detach().double()[self.expert]

    def lora(self, name: str) -> Tensor:
        """A or B of each position's adapter and expert, or its scale: zeros without an adapter."""
        given = getattr(self.layer.lora, name).detach().double()
        rows = given[self.adapter] if name.endswith("_scale") else given[self.adapter, self.expert]
        return torch.where((self.adapter >= 0).view(-1, *[1] * (rows.ndim - 1)), rows, 0)

    def shrunk(self, name: str) -> Tensor:
        """What a shrink wrote: [P, R], its parts summed and its padding left out."""
        return self[name].sum(0)[:, :RANK]


@functools.cache
def launched_layer() -> LaunchedLayer:
    """The layer that tests of single launches share: it takes seconds in the interpreter."""
    layer: Any = random_layer(
        tokens=9, experts=EXPERTS, top_k=TOP_K, adapters=ADAPTERS, gate_up_rank=RANK, down_rank=RANK, mixed=True
    )
    layer = transform(layer, lambda tensor: tensor.requires_grad_() if tensor.is_floating_point() else tensor)
    assert {-1, 0, 1} == {*layer.adapter_ids.tolist()}
    buffers: dict[str, Tensor] = {}
    allocate = launches.allocate

    def recorded(buffer: Any, device: torch.device) -> Tensor:
        buffers[buffer.name] = allocate(buffer, device)
        return buffers[buffer.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "allocate", recorded)
        y = moe(layer.x, layer.router_logits, layer.experts, **layer.options)
        buffers["dy"] = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        y.backward(buffers["dy"])
    return LaunchedLayer(layer, buffers)
