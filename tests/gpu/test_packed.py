"""Packed weights on a Hopper GPU: the same numbers as the checkpoint's layout, from JAX and from torch."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jmoe
from jmoe.bench.case import FULL
from jmoe.interop.parity import compare_random, real_shapes
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
    return reference.moe(
        plain.x, plain.router_logits, plain.experts, top_k=top_k, lora=plain.lora, adapter_ids=plain.adapter_ids
    )


def packed(layer: Layer) -> Layer:
    """The same layer with packed experts."""
    return dataclasses.replace(layer, experts=jmoe.pack(layer.experts))


def sizes() -> list[LayerShape]:
    """Those of README's tables, of parity and of time without LoRA, and what may go wrong beside them."""
    timed = [LayerShape(tokens, experts=experts) for experts in FULL.experts for tokens in FULL.tokens]
    odd = [
        LayerShape(200, experts=128),
        LayerShape(33, experts=128, bias=False),
        LayerShape(1000, hidden=96, intermediate=160, experts=3, top_k=2),
        LayerShape(700, hidden=32, intermediate=32, experts=1, top_k=1, bias=False),
        LayerShape(5, hidden=96, intermediate=160, experts=3, top_k=2),
        LayerShape(8, hidden=32, intermediate=32, experts=1, top_k=1),
        LayerShape(3, adapters=1, rank=16),
        LayerShape(40, adapters=1, rank=5),
        LayerShape(300, adapters=1, rank=64),
        LayerShape(1000, adapters=1, rank=16),
        LayerShape(12, adapters=8, rank=16, mixed=True),
        *(
            LayerShape(tokens, adapters=adapters, rank=rank, mixed=True)
            for tokens in (16, 64)
            for adapters in (8, 32)
            for rank in (16, 64)
        ),
        LayerShape(2000, adapters=3, rank=100, mixed=True),
        LayerShape(9, hidden=96, intermediate=160, experts=3, top_k=2, adapters=2, rank=40, mixed=True),
        LayerShape(500, hidden=96, intermediate=160, experts=3, top_k=2, adapters=2, rank=3, mixed=True),
        LayerShape(2, hidden=96, intermediate=160, experts=17, top_k=2, adapters=2, rank=3, mixed=True),
        LayerShape(6, hidden=96, intermediate=160, experts=20, top_k=2, adapters=1, rank=100),
    ]
    of_parity = [shape for shape in real_shapes() if shape.mxfp4]
    return list(
        dict.fromkeys([*of_parity, *(shape for shape in timed if shape != LayerShape(16384, experts=128)), *odd])
    )


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, marks=[pytest.mark.large_memory] if shape.experts >= 128 or shape.tokens > 4096 else [])
        for shape in sizes()
    ],
    ids=str,
)
def test_parity(shape: LayerShape) -> None:
    """JAX and torch run the same launches, so that the same bits also say that runs repeat."""
    (row,) = compare_random(shape, ["packed"])
    assert row.failures == ()
    assert row.same_bits is True


@pytest.mark.parametrize("rank", [0, 7])
@pytest.mark.parametrize("tokens", [9, 16, 60, 300])
def test_experts_that_all_tokens_choose(tokens: int, rank: int) -> None:
    from jmoe.interop import to_torch

    adapters = {"adapters": 2, "rank": rank, "mixed": True} if rank else {}
    layer = random_layer(LayerShape(tokens, 160, 96, 32, 2, **adapters))
    layer = dataclasses.replace(layer, router_logits=layer.router_logits.at[:, jnp.array([3, 20])].add(100))
    y = jax.jit(functools.partial(run, top_k=2))(packed(layer))
    assert torch_layers.relative_error(to_torch(y), exact(layer, 2)) <= BFLOAT16.relative


@pytest.mark.parametrize("rank", [0, 7])
@pytest.mark.parametrize(("tokens", "experts"), [(64, 32), (30, 16), (250, 32)])
def test_more_tiles_than_experts(tokens: int, experts: int, rank: int) -> None:
    from jmoe.interop import to_torch

    adapters = {"adapters": 2, "rank": rank, "mixed": True} if rank else {}
    layer = random_layer(LayerShape(tokens, 160, 96, experts, 4, **adapters))
    # Three experts have every token, in several tiles each, and most of the others have one of what is left.
    layer = dataclasses.replace(layer, router_logits=layer.router_logits.at[:, jnp.array([3, 7, 12])].add(100))
    y = jax.jit(run)(packed(layer))
    assert torch_layers.relative_error(to_torch(y), exact(layer)) <= BFLOAT16.relative


@pytest.mark.parametrize("projection", ["gate_up", "down"])
@pytest.mark.parametrize("tokens", [1, 30, 500])
def test_lora_on_one_projection(tokens: int, projection: str) -> None:
    from jmoe.interop import to_torch

    layer = random_layer(LayerShape(tokens, 160, 96, 4, 2, adapters=2, rank=20, mixed=True))
    other = {"gate_up": "down", "down": "gate_up"}[projection]
    nothing = {f"{other}_a": None, f"{other}_b": None, f"{other}_scale": None}
    layer = dataclasses.replace(layer, lora=dataclasses.replace(layer.lora, **nothing))
    y = jax.jit(functools.partial(run, top_k=2))(packed(layer))
    assert torch_layers.relative_error(to_torch(y), exact(layer, 2)) <= BFLOAT16.relative


@pytest.mark.parametrize("tokens", [24, 400])
@pytest.mark.parametrize("scale", [0, 1, 128, 129, 200, 253, 254, 255])
def test_scale_bytes_at_the_ends(scale: int, tokens: int) -> None:
    from jmoe.interop import to_torch

    layer = random_layer(LayerShape(tokens, hidden=128, intermediate=96, experts=4, top_k=2, bias=False))
    for projection in ("gate_up", "down"):
        weight = getattr(layer.experts, projection)
        few = jnp.zeros(16, jnp.uint8).at[:3].set(jnp.array([0x80, 0x08, 0x01], jnp.uint8))
        changed = jmoe.Mxfp4(weight.blocks.at[1, 11, 1].set(few), weight.scales.at[1, 11, 1].set(scale))
        experts = dataclasses.replace(layer.experts, **{projection: changed})
        odd = dataclasses.replace(layer, x=layer.x / 64, experts=experts)  # products with 2**127 stay finite
        y = jax.jit(functools.partial(run, top_k=2))(packed(odd))
        assert torch_layers.relative_error(to_torch(y), exact(odd, 2)) <= BFLOAT16.relative


@pytest.mark.parametrize("rank", [0, 7])
@pytest.mark.parametrize("tokens", [3, 24, 400])
@pytest.mark.parametrize("scale", [128, 140, 255])
def test_columns_have_the_same_bits_beside_one_with_a_large_scale(scale: int, tokens: int, rank: int) -> None:
    """A large scale has all columns of its program decoded by other instructions."""
    adapters = {"adapters": 2, "rank": rank, "mixed": True} if rank else {}
    layer = random_layer(LayerShape(tokens, hidden=640, intermediate=1440, experts=4, top_k=2, **adapters))
    down = layer.experts.down
    large = jmoe.Mxfp4(down.blocks, down.scales.at[:, 11, 3].set(scale))
    changed = dataclasses.replace(layer, experts=dataclasses.replace(layer.experts, down=large))
    call = jax.jit(functools.partial(run, top_k=2))
    y, z = call(packed(layer)), call(packed(changed))
    others = jnp.arange(640) != 11
    assert jnp.array_equal(y[:, others], z[:, others])
    assert not jnp.array_equal(y[:, 11], z[:, 11])


@pytest.mark.parametrize("tokens", [24, 400])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_shows_in_its_own_tokens_alone(value: float, tokens: int) -> None:
    layer = packed(random_layer(LayerShape(tokens, 160, 96, 4, 2, adapters=2, rank=5, mixed=True)))
    good = jax.jit(functools.partial(run, top_k=2))(layer)
    broken = dataclasses.replace(layer.lora, down_b=layer.lora.down_b.at[1].set(value))
    y = jax.jit(functools.partial(run, top_k=2))(dataclasses.replace(layer, lora=broken))
    of_it = layer.adapter_ids == 1
    assert jnp.array_equal(y[~of_it], good[~of_it])
    assert not jnp.isfinite(y[of_it]).any()


@pytest.mark.parametrize(("adapters", "rank"), [(8, 16), (32, 16), (8, 64), (32, 64)])
@pytest.mark.parametrize("tokens", [16, 64])
def test_rows_have_the_bits_that_they_have_where_all_rows_have_their_adapter(
    tokens: int, adapters: int, rank: int
) -> None:
    """Base rows those where nobody has one. Adapters that nobody has hold NaN, and so does one that is used."""
    seed = int(np.random.default_rng().integers(2**31))
    layer = packed(random_layer(LayerShape(tokens, adapters=adapters, rank=rank, mixed=True), seed))
    ids = np.asarray(layer.adapter_ids)
    broken = int(ids.max())
    bad = np.append(np.setdiff1d(np.arange(adapters), ids), broken)
    lora = dataclasses.replace(
        layer.lora, gate_up_a=layer.lora.gate_up_a.at[bad].set(jnp.nan), down_b=layer.lora.down_b.at[bad].set(jnp.inf)
    )
    call = jax.jit(run)
    y = call(dataclasses.replace(layer, lora=lora))
    assert jnp.array_equal(y, call(dataclasses.replace(layer, lora=lora)), equal_nan=True)
    assert not jnp.isfinite(y[ids == broken]).any()
    for adapter in set(ids.tolist()) - {broken}:
        alone = call(dataclasses.replace(layer, adapter_ids=jnp.full_like(layer.adapter_ids, adapter)))
        assert jnp.array_equal(y[ids == adapter], alone[ids == adapter]), f"adapter {adapter}, seed {seed}"


@pytest.mark.parametrize("rank", [0, 7])
@pytest.mark.parametrize("tokens", [5, 25, 200, 900])
def test_nothing_beside_the_buffers_is_read_or_written(tokens: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from jmoe.interop import launch, moe, to_torch

    adapters = {"adapters": 2, "rank": rank, "mixed": True} if rank else {}
    layer = random_layer(LayerShape(tokens, hidden=160, intermediate=96, experts=6, top_k=3, **adapters))
    tensors = jax.tree.map(lambda leaf: torch_layers.surround(to_torch(leaf)), packed(layer))
    allocator = torch_layers.PoisonedAllocator()
    monkeypatch.setattr(launch, "allocate", allocator)
    y = moe(
        tensors.x,
        tensors.router_logits,
        tensors.experts,
        top_k=3,
        lora=tensors.lora,
        adapter_ids=tensors.adapter_ids,
    )
    assert allocator.guards_are_intact()
    assert torch_layers.relative_error(y, exact(layer, 3)) <= BFLOAT16.relative


SANITIZED = """
import jax, torch
from jmoe.interop import moe, to_torch
from jmoe.ops.random_layer import LayerShape, random_layer
from tests.gpu.test_packed import packed
small = (160, 96, 6, 3)
deep = (1088, 2080, 8, 2)  # so that each stage of tokens in shared memory is used again
cases = [(5, 0, small), (150, 0, small), (12, 5, small), (400, 20, small), (1, 0, deep), (12, 0, deep), (28, 0, deep)]
for tokens, rank, sizes in cases:
    adapters = {"adapters": 2, "rank": rank, "mixed": True} if rank else {}
    layer = packed(random_layer(LayerShape(tokens, *sizes, **adapters)))
    layer = jax.tree.map(lambda leaf: to_torch(leaf).cuda(), layer)
    top_k = sizes[-1]
    y = moe(layer.x, layer.router_logits, layer.experts, top_k=top_k, lora=layer.lora, adapter_ids=layer.adapter_ids)
    assert torch.isfinite(y).all()
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
