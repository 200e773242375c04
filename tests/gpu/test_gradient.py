"""Gradients on a GPU at gpt-oss's sizes: from JAX and from torch, against autograd in float64."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch

import jmoe
from jmoe.ops.random_layer import Layer, LayerShape, random_layer
from tests import torch_layers
from tests.tolerances import GRADIENT, GRADIENT_OF_TORCH
from tests.torch_layers import gradients

pytestmark = pytest.mark.gpu

LORA = {
    "no LoRA": {},
    "r=16": {"adapters": 1, "rank": 16},
    "r=64": {"adapters": 1, "rank": 64},
    "eight mixed": {"adapters": 8, "rank": 8, "mixed": True},
}


def in_torch(layer: Layer) -> torch_layers.Layer:
    """The same layer, its arrays shared with torch."""
    from jmoe.interop.dlpack import to_torch

    return torch_layers.Layer(
        *(jax.tree.map(to_torch, part) for part in (layer.x, layer.router_logits, layer.experts)),
        jax.tree.map(to_torch, layer.lora),
        None if layer.adapter_ids is None else to_torch(layer.adapter_ids),
        4,
    )


def jax_gradients(layer: Layer, dy: jax.Array, **options: object) -> dict[str, jax.Array]:
    """Of <y, dy>, by the names of tests.torch_layers.leaves."""

    @jax.jit
    def all_gradients(layer: Layer, dy: jax.Array) -> dict[str, jax.Array]:
        def loss(x: jax.Array, logits: jax.Array, lora: jmoe.Lora | None, biases: dict) -> jax.Array:
            experts = dataclasses.replace(layer.experts, **biases)
            y = jmoe.moe(x, logits, experts, top_k=4, lora=lora, adapter_ids=layer.adapter_ids, **options)
            return jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32))

        biases = {name: getattr(layer.experts, name) for name in ("gate_up_bias", "down_bias")}
        x, logits, lora, of_biases = jax.grad(loss, argnums=(0, 1, 2, 3))(
            layer.x, layer.router_logits, layer.lora, biases
        )
        named = {"x": x, "router_logits": logits, **of_biases}
        parts = {f"{p}_{part}": getattr(lora, f"{p}_{part}", None) for p in ("gate_up", "down") for part in "ab"}
        return named | {name: part for name, part in parts.items() if part is not None}

    return all_gradients(layer, dy)


@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_gradients_at_real_sizes(tokens: int, packed: bool, lora: str) -> None:
    from jmoe.interop import reference
    from jmoe.interop.dlpack import to_torch
    from jmoe.interop.moe import moe

    layer = random_layer(LayerShape(tokens, experts=8, **LORA[lora]))
    run = dataclasses.replace(layer, experts=jmoe.pack(layer.experts)) if packed else layer
    dy = jax.random.normal(jax.random.key(7), layer.x.shape, jnp.bfloat16)
    ours = jax_gradients(run, dy)
    again = jax_gradients(run, dy, recompute=True)
    plain = in_torch(layer)
    exact = gradients(plain, reference.moe, to_torch(dy))
    theirs = gradients(plain, reference.moe, to_torch(dy), dtype=torch.bfloat16)
    from_torch = gradients(in_torch(run), moe, to_torch(dy))
    assert set(ours) == set(exact)
    for name, want in exact.items():
        assert torch.equal(to_torch(ours[name]), from_torch[name]), name
        assert jnp.array_equal(ours[name], again[name]), name
        error = torch_layers.relative_error(from_torch[name], want)
        assert error <= GRADIENT.relative, name
        assert error <= GRADIENT_OF_TORCH * torch_layers.relative_error(theirs[name], want), name


@pytest.mark.parametrize("packed", [True, False])
def test_gradients_repeat_bit_for_bit(packed: bool) -> None:
    layer = random_layer(LayerShape(3000, adapters=2, rank=16, mixed=True))
    layer = dataclasses.replace(layer, experts=jmoe.pack(layer.experts)) if packed else layer
    dy = jax.random.normal(jax.random.key(7), layer.x.shape, jnp.bfloat16)
    first = jax_gradients(layer, dy)
    for _ in range(2):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, first, jax_gradients(layer, dy)))


@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("packed", [True, False])
def test_nothing_beside_the_buffers_is_read_or_written(
    tokens: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jmoe.interop import launch, reference
    from jmoe.interop.moe import moe

    shape = LayerShape(tokens, hidden=160, intermediate=96, experts=6, adapters=2, rank=5, mixed=True)
    layer = random_layer(shape)
    run = in_torch(dataclasses.replace(layer, experts=jmoe.pack(layer.experts)) if packed else layer)
    dy = torch.randn(tokens, 160, device="cuda").bfloat16()
    exact = gradients(in_torch(layer), reference.moe, dy)
    allocator = torch_layers.PoisonedAllocator()
    monkeypatch.setattr(launch, "allocate", allocator)
    for name, got in gradients(run, moe, dy).items():
        assert torch_layers.relative_error(got, exact[name]) <= 2 * GRADIENT.relative, name
    assert allocator.guards_are_intact()


@pytest.mark.parametrize("scale", [0, 128, 129, 200, 253, 254, 255])
def test_scale_bytes_at_the_ends(scale: int) -> None:
    from jmoe.interop import reference
    from jmoe.interop.moe import moe

    layer = random_layer(LayerShape(40, hidden=160, intermediate=96, experts=6))
    scales = layer.experts.gate_up.scales.at[1, 10, 1].set(scale)
    blocks = layer.experts.gate_up.blocks.at[1, 10, 1].set(jnp.array([0x80, 0x08, 0x01, *[0] * 13], jnp.uint8))
    layer = dataclasses.replace(layer, experts=dataclasses.replace(layer.experts, gate_up=jmoe.Mxfp4(blocks, scales)))
    dy = torch.randn(40, 160, device="cuda").bfloat16()
    exact = gradients(in_torch(layer), reference.moe, dy)
    for run in (layer, dataclasses.replace(layer, experts=jmoe.pack(layer.experts))):
        got = gradients(in_torch(run), moe, dy)
        assert torch_layers.relative_error(got["x"], exact["x"]) <= GRADIENT.relative


@pytest.mark.large_memory
def test_65536_tokens() -> None:
    """Tokens do not see each other in x's gradient, so some at either end stand for all."""
    layer = random_layer(LayerShape(65536, adapters=1, rank=8))
    run = dataclasses.replace(layer, experts=jmoe.pack(layer.experts))
    dy = jax.random.normal(jax.random.key(7), layer.x.shape, jnp.bfloat16)
    ours = jax_gradients(run, dy, recompute=True)
    assert all(bool(jnp.isfinite(grad).all()) for grad in ours.values())
    for part in (slice(0, 64), slice(32768, 32832), slice(65472, 65536)):
        few = dataclasses.replace(layer, x=layer.x[part], router_logits=layer.router_logits[part])
        want = jax_gradients(few, dy[part], backend="xla")
        for name in ("x", "router_logits"):
            exact = want[name].astype(jnp.float32)
            error = jnp.linalg.norm(ours[name][part].astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
            assert float(error) <= GRADIENT.relative, name


SANITIZED = """
import dataclasses, jax, torch, jmoe
from jmoe.interop.moe import moe
from jmoe.ops.random_layer import LayerShape, random_layer
from tests.gpu.test_gradient import in_torch
from tests.torch_layers import gradients, transform
for tokens, rank, packed in ((5, 0, True), (12, 5, True), (400, 20, True), (150, 5, False)):
    adapters = {"adapters": 2, "rank": rank, "mixed": True} if rank else {}
    layer = random_layer(LayerShape(tokens, 160, 96, 6, 4, **adapters))
    layer = dataclasses.replace(layer, experts=jmoe.pack(layer.experts)) if packed else layer
    layer = transform(in_torch(layer), lambda tensor: tensor.cuda())
    for grad in gradients(layer, moe, torch.randn(tokens, 160, device="cuda").bfloat16()).values():
        assert torch.isfinite(grad).all()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1", JAX_PLATFORMS="cpu")
    command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    command += [sys.executable, "-c", SANITIZED]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(f"{tool}: {done.stdout.strip().splitlines()[-1]}")
