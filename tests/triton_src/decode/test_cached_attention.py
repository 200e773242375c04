"""Attention to a cache by the kernels, in Triton's interpreter, beside plain operations in float64."""

import math

import pytest
import torch

from jmoe.interop.interpreter import bfloat16_arithmetic
from jmoe.interop.launch import launch
from jmoe.triton_src.decode.plans import plan_decode
from jmoe.triton_src.tile_tables import own_table

pytestmark = pytest.mark.interpret


def exact(
    q: torch.Tensor, cache: torch.Tensor, sinks: torch.Tensor, layer: int, position: torch.Tensor
) -> torch.Tensor:
    """Of rotated queries to a cache that holds the latest token."""
    batch, heads, dim = q.shape
    keys, values = cache[layer].double().split(dim, dim=-1)
    group = heads // keys.shape[1]
    keys, values = (array.repeat_interleave(group, dim=1) for array in (keys, values))
    scores = torch.einsum("bnd,bnsd->bns", q.double(), keys) / math.sqrt(dim)
    scores = scores.masked_fill(torch.arange(keys.shape[2]) > position[:, None, None], -math.inf)
    both = torch.cat([scores, sinks.double()[None, :, None].expand(batch, heads, 1)], dim=-1)
    weights = both.softmax(-1)[..., :-1]
    return torch.einsum("bns,bnsd->bnd", weights, values.nan_to_num())


@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "slots", "dim"), [(3, 8, 2, 40, 16), (1, 64, 8, 300, 64), (2, 4, 4, 128, 32)]
)
def test_each_sequence_sees_what_it_has(batch: int, heads: int, key_heads: int, slots: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(batch, heads + 2 * key_heads, dim, generator=generator).bfloat16()
    angles = 6 * torch.rand(batch, dim // 2, generator=generator)
    cosine, sine = 1.3 * angles.cos(), 1.3 * angles.sin()
    cache = torch.randn(2, batch, key_heads, slots, 2 * dim, generator=generator).bfloat16()
    sinks = 3 * torch.randn(3, heads, generator=generator).bfloat16()
    sinks[:2] = math.nan
    position = torch.tensor([0, slots - 1, 2 * slots + 13][-batch:], dtype=torch.int32)
    # What no sequence has yet is never read, nor what stands where the latest token will.
    slot = torch.arange(slots)[:, None]
    latest, missing = (position % slots)[:, None, None, None], slot > position[:, None, None, None]
    cache = cache.masked_fill(missing | (slot == latest), math.nan)
    before, layer = cache.clone(), torch.tensor([1], dtype=torch.int32)
    buffers = {"heads": given, "cosine": cosine, "sine": sine, "cache": cache, "sinks": sinks}
    buffers |= {"sinks_layer": layer + 1, "layer": layer, "position": position}
    sizes = {"rows": batch, "heads": heads, "key_heads": key_heads, "slots": slots, "head_dim": dim}
    plans = plan_decode("cached_attention", own_table(90), **sizes)
    for plan in plans:
        plan.check_names()
    with bfloat16_arithmetic():
        got = launch(plans, buffers)["attended"].double()
    q, k, v = given.split([heads, key_heads, key_heads], dim=1)
    q, k = (rotated(part, cosine, sine) for part in (q, k))
    rows = torch.arange(batch)
    entries = torch.cat([k, v], dim=-1)
    assert torch.equal(cache[1, rows, :, position.long() % slots], entries)
    want = exact(q, cache, sinks[2], 1, position)
    assert float((got - want).norm() / want.norm()) <= 6e-3
    # Nothing else is written.
    cache[1, rows, :, position.long() % slots] = math.nan
    assert torch.equal(cache.nan_to_num(7), before.nan_to_num(7))


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """In float32 by factors of bfloat16, rounded once."""
    first, second = x.float().chunk(2, dim=-1)
    cosine, sine = (factor.bfloat16().float()[:, None] for factor in (cosine, sine))
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).bfloat16()
