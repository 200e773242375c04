"""The layer on a GPU at gpt-oss's sizes: from JAX and from torch, against float64, the peers and the sanitizer."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jmoe
from jmoe.ops.random_layer import Layer, LayerShape, random_layer
from tests import torch_layers
from tests.tolerances import BFLOAT16

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]

LORA = {
    "no LoRA": {},
    "r=8": {"adapters": 1, "rank": 8},
    "r=64": {"adapters": 1, "rank": 64},
    "eight mixed": {"adapters": 8, "rank": 8, "mixed": True},
}


def run(layer: Layer, top_k: int = 4, **options: object) -> jax.Array:
    """The layer through jmoe.moe."""
    given = {"lora": layer.lora, "adapter_ids": layer.adapter_ids} | options
    return jmoe.moe(layer.x, layer.router_logits, layer.experts, top_k=top_k, **given)


@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("experts", [32, pytest.param(128, marks=pytest.mark.large_memory)])
@pytest.mark.parametrize("tokens", [1, 7, 64, 1000, 4096])
def test_parity_at_real_sizes(tokens: int, experts: int, lora: str) -> None:
    from jmoe.interop.parity import compare_random

    (row,) = compare_random(LayerShape(tokens, experts=experts, **LORA[lora]), ["checkpoint"])
    assert row.failures == ()
    assert row.same_bits is True
    assert isinstance(row.triton_jax, float)
    if not LORA[lora] and isinstance(row.triton_kernels, float):
        assert row.triton_kernels <= BFLOAT16.relative


@pytest.mark.parametrize(
    "shape",
    [
        LayerShape(300, experts=8, mxfp4=False, adapters=2, rank=5, mixed=True),
        LayerShape(33, hidden=512, intermediate=320, experts=256, top_k=8, adapters=1, rank=256),
        LayerShape(50, hidden=96, intermediate=160, experts=3, top_k=3, adapters=3, rank=17, mixed=True),
        LayerShape(50, hidden=41, intermediate=37, experts=3, top_k=1, mxfp4=False, bias=False),
        LayerShape(65, experts=1, top_k=1),
    ],
    ids=str,
)
def test_parity_at_odd_sizes(shape: LayerShape) -> None:
    from jmoe.interop.parity import compare_random

    (row,) = compare_random(shape, ["checkpoint"])
    assert row.failures == ()
    assert row.same_bits is True


@pytest.mark.parametrize("tokens", [16, 4096])
def test_runs_repeat_bit_for_bit(tokens: int) -> None:
    layer = random_layer(LayerShape(tokens, adapters=8, rank=16, mixed=True))
    call = jax.jit(run)
    first = call(layer)
    for _ in range(3):
        assert jnp.array_equal(first, call(layer))


@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("mxfp4", [True, False])
def test_nothing_beside_the_buffers_is_read_or_written(
    tokens: int, mxfp4: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jmoe.interop import launch, reference
    from jmoe.interop.moe import moe

    layer = torch_layers.random_layer(
        tokens=tokens, hidden=2880, intermediate=160, adapters=2, gate_up_rank=5, down_rank=20, mixed=True, mxfp4=mxfp4
    )
    layer = torch_layers.transform(layer, lambda tensor: torch_layers.surround(tensor.cuda()))
    allocator = torch_layers.PoisonedAllocator()
    monkeypatch.setattr(launch, "allocate", allocator)
    y = moe(layer.x, layer.router_logits, layer.experts, **layer.options)
    assert allocator.guards_are_intact()
    exact = reference.moe(layer.x, layer.router_logits, layer.experts, **layer.options)
    assert torch_layers.relative_error(y, exact) <= BFLOAT16.relative


@pytest.mark.large_memory
def test_131072_tokens() -> None:
    """Offsets pass 2^31 here; tokens do not see each other, so some at either end stand for all."""
    shape = LayerShape(131072, adapters=1, rank=8)
    layer = random_layer(shape)
    y = jax.jit(run)(layer)
    assert bool(jnp.isfinite(y).all())
    for part in (slice(0, 64), slice(65536, 65600), slice(131008, 131072)):
        few = dataclasses.replace(layer, x=layer.x[part], router_logits=layer.router_logits[part])
        want = jax.jit(run, static_argnames="backend")(few, backend="xla").astype(jnp.float32)
        error = jnp.linalg.norm(y[part].astype(jnp.float32) - want) / jnp.linalg.norm(want)
        assert float(error) <= BFLOAT16.relative


def test_scan_is_a_loop_and_vmap_a_batch() -> None:
    layer = random_layer(LayerShape(12, hidden=128, intermediate=96, experts=4, top_k=2, adapters=1, rank=4))

    def once(x: jax.Array) -> jax.Array:
        return run(dataclasses.replace(layer, x=x), 2)

    looped = once(once(once(layer.x)))
    scanned = jax.jit(lambda x: jax.lax.scan(lambda x, _: (jax.checkpoint(once)(x), None), x, None, length=3)[0])
    assert jnp.array_equal(scanned(layer.x), looped)

    def batch(x: jax.Array, logits: jax.Array) -> jax.Array:
        return run(dataclasses.replace(layer, x=x, router_logits=logits), 2)

    mapped = jax.vmap(batch)(layer.x.reshape(3, 4, -1), layer.router_logits.reshape(3, 4, -1))
    assert jnp.array_equal(mapped.reshape(12, -1), once(layer.x))


EXPORT = """
import sys, jax, jmoe
from jmoe.ops.random_layer import LayerShape, random_layer
assert jax.default_backend() == "cpu"
layer = random_layer(LayerShape(12, hidden=128, intermediate=96, experts=4, top_k=2))
call = lambda x, logits, experts: jmoe.moe(x, logits, experts, top_k=2, backend=jmoe.Target("sm_90"))
exported = jax.export.export(jax.jit(call), platforms=["cuda"], disabled_checks=jmoe.allow_triton_call())
open(sys.argv[1], "wb").write(exported(layer.x, layer.router_logits, layer.experts).serialize())
"""


def test_a_layer_exported_without_a_gpu_runs_on_one(tmp_path: Path) -> None:
    file = tmp_path / "layer.bin"
    hidden = dict(os.environ, CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu")
    subprocess.run([sys.executable, "-c", EXPORT, file], check=True, env=hidden)
    layer = random_layer(LayerShape(12, hidden=128, intermediate=96, experts=4, top_k=2))
    y = jax.export.deserialize(file.read_bytes()).call(layer.x, layer.router_logits, layer.experts)
    assert jnp.array_equal(y, run(layer, 2))


SANITIZED = """
import torch
from jmoe.interop.moe import moe
from tests import torch_layers
for tokens, mxfp4 in ((5, True), (150, True), (300, True), (40, False)):
    layer = torch_layers.random_layer(
        tokens=tokens, hidden=160, intermediate=96, experts=6, top_k=3, adapters=2, gate_up_rank=5, down_rank=20,
        mixed=True, mxfp4=mxfp4)
    layer = torch_layers.transform(layer, lambda tensor: tensor.cuda())
    y = moe(layer.x, layer.router_logits, layer.experts, **layer.options)
    assert torch.isfinite(y).all()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    # Without torch's cache every tensor is an allocation of its own, whose end the sanitizer knows.
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    # cuFuncSetAttribute refuses a call of Triton's loader under the tool; only what kernels do to memory counts here.
    command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    command += [sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(f"{tool}: {done.stdout.strip().splitlines()[-1]}")


@pytest.mark.alone
@pytest.mark.parametrize("tokens", [16, 4096])
def test_at_most_twice_the_time_of_triton_kernels(tokens: int) -> None:
    from jmoe.bench.case import Matrix, Size
    from jmoe.bench.peers import triton_kernels
    from jmoe.bench.run import implementations, run, select

    if (reason := triton_kernels.missing()) is not None:
        pytest.skip(f"triton_kernels: {reason}")
    chosen = select(implementations(), ["jmoe", "triton_kernels"], [])
    (measured,) = run(Matrix(Size(), (tokens,), (32,), (0,)), chosen)
    ours, theirs = (measured.microseconds[name] for name in ("jmoe", "triton_kernels"))
    print(f"{tokens} tokens: {ours:.0f} us, triton_kernels {theirs:.0f} us, ratio {ours / theirs:.2f}")
    assert ours <= 2 * theirs
