"""Packed weights on a Hopper GPU: the same numbers as the checkpoint's layout, from JAX and from torch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
import torch

import jmoe
from jmoe.ops.random_layer import Layer, LayerShape, random_layer
from tests import torch_layers
from tests.tolerances import BFLOAT16

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="kernels for packed weights need compute capability 9.0",
    ),
]


def run(layer: Layer, top_k: int = 4) -> jax.Array:
    """The layer through jmoe.moe."""
    return jmoe.moe(
        layer.x, layer.router_logits, layer.experts, top_k=top_k, lora=layer.lora, adapter_ids=layer.adapter_ids
    )


def exact(layer: Layer, top_k: int = 4) -> torch.Tensor:
    """The layer in float64 from the checkpoint's layout."""
    from jmoe.interop import reference, to_torch

    plain = jax.tree.map(to_torch, layer)
    return reference.moe(plain.x, plain.router_logits, plain.experts, top_k=top_k)


def packed(layer: Layer) -> Layer:
    """The same layer with packed experts."""
    return dataclasses.replace(layer, experts=jmoe.pack(layer.experts))


@pytest.mark.parametrize(
    "shape",
    [
        LayerShape(1),
        LayerShape(4),
        LayerShape(16),
        LayerShape(64),
        LayerShape(128),
        LayerShape(128, experts=128),
        LayerShape(500),
        LayerShape(4096),
        LayerShape(33, experts=128, bias=False),
        LayerShape(5, hidden=96, intermediate=160, experts=3, top_k=2),
        LayerShape(8, hidden=32, intermediate=32, experts=1, top_k=1),
    ],
    ids=str,
)
def test_parity(shape: LayerShape) -> None:
    from jmoe.interop import moe, to_torch

    layer = random_layer(shape)
    call = jax.jit(functools.partial(run, top_k=shape.top_k))
    y = call(packed(layer))
    assert torch_layers.relative_error(to_torch(y), exact(layer, shape.top_k)) <= BFLOAT16.relative
    tensors = jax.tree.map(to_torch, packed(layer))
    from_torch = moe(tensors.x, tensors.router_logits, tensors.experts, top_k=shape.top_k)
    assert torch.equal(from_torch, to_torch(y))
    assert jnp.array_equal(y, call(packed(layer)))


def test_what_no_packed_kernel_computes_is_unpacked_first() -> None:
    for shape in (
        LayerShape(1500, hidden=96, intermediate=64, experts=8),
        LayerShape(9, adapters=2, rank=5, mixed=True),
    ):
        layer = random_layer(shape)
        assert jnp.array_equal(jax.jit(run)(packed(layer)), jax.jit(run)(layer))


@pytest.mark.parametrize("scale", [0, 1, 128, 129, 200, 253, 254, 255])
def test_scale_bytes_at_the_ends(scale: int) -> None:
    from jmoe.interop import to_torch

    layer = random_layer(LayerShape(24, hidden=128, intermediate=96, experts=4, top_k=2, bias=False))
    for projection in ("gate_up", "down"):
        weight = getattr(layer.experts, projection)
        few = jnp.zeros(16, jnp.uint8).at[:3].set(jnp.array([0x80, 0x08, 0x01], jnp.uint8))
        changed = jmoe.Mxfp4(weight.blocks.at[1, 11, 1].set(few), weight.scales.at[1, 11, 1].set(scale))
        odd = dataclasses.replace(layer, experts=dataclasses.replace(layer.experts, **{projection: changed}))
        y = jax.jit(functools.partial(run, top_k=2))(packed(odd))
        assert torch_layers.relative_error(to_torch(y), exact(odd, 2)) <= BFLOAT16.relative


@pytest.mark.parametrize("tokens", [5, 25, 200])
def test_nothing_beside_the_buffers_is_read_or_written(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from jmoe.interop import launch, moe, to_torch

    layer = random_layer(LayerShape(tokens, hidden=160, intermediate=96, experts=6, top_k=3))
    tensors = jax.tree.map(lambda leaf: torch_layers.surround(to_torch(leaf)), packed(layer))
    allocator = torch_layers.PoisonedAllocator()
    monkeypatch.setattr(launch, "allocate", allocator)
    y = moe(tensors.x, tensors.router_logits, tensors.experts, top_k=3)
    assert allocator.guards_are_intact()
    assert torch_layers.relative_error(y, exact(layer, 3)) <= BFLOAT16.relative
