"""Attention to a cache by the kernels, in Triton's interpreter, beside plain operations in float64."""

import math

import pytest
import torch

from jmoe.interop.interpreter import bfloat16_arithmetic
from jmoe.interop.launch import launch
from jmoe.triton_src.cached_attention import plan_cached_attention

pytestmark = pytest.mark.interpret


def exact(
    q: torch.Tensor, cache: torch.Tensor, sinks: torch.Tensor, layer: int, position: torch.Tensor
) -> torch.Tensor:
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
    q = torch.randn(batch, heads, dim, generator=generator).bfloat16()
    cache = torch.randn(2, batch, key_heads, slots, 2 * dim, generator=generator).bfloat16()
    sinks = 3 * torch.randn(heads, generator=generator).bfloat16()
    position = torch.tensor([0, slots - 1, 2 * slots][-batch:], dtype=torch.int32)
    # What no sequence has yet is never read.
    missing = torch.arange(slots)[:, None] > position[:, None, None, None]
    cache = cache.masked_fill(missing, math.nan)
    layer = torch.tensor([1], dtype=torch.int32)
    buffers = {"q": q, "cache": cache, "sinks": sinks, "layer": layer, "position": position}
    plans = plan_cached_attention(batch=batch, heads=heads, key_heads=key_heads, slots=slots, head_dim=dim)
    for plan in plans:
        plan.check_names()
    with bfloat16_arithmetic():
        got = launch(plans, buffers)["attended"].double()
    want = exact(q, cache, sinks, 1, position)
    assert float((got - want).norm() / want.norm()) <= 6e-3
