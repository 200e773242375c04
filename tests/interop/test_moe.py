"""The kernels' numbers on a CPU: the whole layer through Triton's interpreter, against float64."""

import dataclasses
import re

import jax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jmoe
from jmoe.interop import reference
from jmoe.interop.dlpack import to_torch
from jmoe.interop.moe import moe
from jmoe.ops.random_layer import LayerShape
from jmoe.ops.random_layer import random_layer as jax_random_layer
from jmoe.triton_src.activation import SwiGLU
from tests.tolerances import BFLOAT16, OF_TORCH
from tests.torch_layers import (
    Layer,
    Routing,
    Weight,
    poisoned_results,
    random_layer,
    relative_error,
    surround,
    transform,
)

pytestmark = pytest.mark.interpret

ENOUGH = 256
"""Results over which rounding errors average out; with fewer, a cancellation in one shows, and 1e-2 is allowed."""


def check(layer: Layer) -> torch.Tensor:
    """The layer in poison agrees with float64, at most 1.1 times as far off as torch's bf16, and writes no more."""
    poisoned = transform(layer, surround)
    with poisoned_results():
        y = moe(poisoned.x, poisoned.router_logits, poisoned.experts, **poisoned.options)
    assert y.shape == layer.x.shape
    assert y.dtype == torch.bfloat16
    exact = reference.moe(layer.x, layer.router_logits, layer.experts, **layer.options)
    theirs = reference.moe(layer.x, layer.router_logits, layer.experts, dtype=torch.bfloat16, **layer.options)
    error = relative_error(y, exact)
    if y.numel() < ENOUGH:
        assert error <= 2 * BFLOAT16.relative
    else:
        assert error <= BFLOAT16.relative
        assert error <= OF_TORCH * relative_error(theirs, exact)
    return y


activations = st.builds(
    SwiGLU,
    alpha=st.floats(0.25, 3),
    limit=st.one_of(st.none(), st.floats(0.5, 8)),
    offset=st.sampled_from([0.0, 1.0, -0.5]),
    interleaved=st.booleans(),
)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Layers of at most some two hundred tiles."""
    experts = draw(st.integers(1, 16))
    adapters = draw(st.integers(0, 3))
    ranks = st.one_of(st.none(), st.integers(1, 40))
    mxfp4 = draw(st.booleans())
    width = st.sampled_from([32, 64, 96, 160]) if mxfp4 else st.integers(17, 100)
    gate_up_rank = draw(ranks)
    return random_layer(
        tokens=draw(st.integers(1, 20)),
        hidden=draw(width),
        intermediate=draw(width),
        experts=experts,
        top_k=draw(st.integers(1, min(8, experts))),
        adapters=adapters,
        gate_up_rank=gate_up_rank,
        down_rank=draw(ranks) if gate_up_rank is not None else draw(st.integers(1, 40)),
        mixed=adapters > 1 or (adapters == 1 and draw(st.booleans())),
        mxfp4=mxfp4,
        bias=draw(st.booleans()),
        activation=draw(activations),
        seed=draw(st.integers(0, 10**6)),
    )


@pytest.mark.slow
@settings(max_examples=25)
@given(layers())
def test_any_layer_agrees_with_float64(layer: Layer) -> None:
    check(layer)


@pytest.mark.parametrize("top_k", range(1, 9))
def test_every_top_k(top_k: int) -> None:
    check(random_layer(tokens=5, experts=9, top_k=top_k))


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 3, "experts": 256, "top_k": 4, "hidden": 32, "intermediate": 32},
        {"tokens": 3, "experts": 128, "top_k": 8, "hidden": 32, "intermediate": 32},
        {"tokens": 4, "experts": 1, "top_k": 1},
        {"tokens": 70, "experts": 2, "top_k": 1},
        {"tokens": 300, "experts": 2, "top_k": 1, "hidden": 32, "intermediate": 32},
        {"tokens": 4, "adapters": 1, "gate_up_rank": 256, "down_rank": 200},
        {"tokens": 40, "adapters": 8, "gate_up_rank": 8, "down_rank": 4, "mixed": True},
    ],
    ids=str,
)
def test_sizes_at_the_ends(options: dict) -> None:
    check(random_layer(**options))


def test_one_expert_takes_every_token() -> None:
    layer = random_layer(tokens=40, experts=5, top_k=1)
    layer.router_logits[:, 3] = 100
    check(layer)


def test_two_runs_give_the_same_bits() -> None:
    layer = random_layer(tokens=33, experts=6, top_k=3, adapters=2, gate_up_rank=4, down_rank=4, mixed=True)
    first, second = (moe(layer.x, layer.router_logits, layer.experts, **layer.options) for _ in range(2))
    assert torch.equal(first, second)


def test_nan_tokens_stay_alone() -> None:
    layer = random_layer(tokens=20, adapters=2, gate_up_rank=4, down_rank=4, mixed=True)
    layer.x[3, 5] = torch.nan
    y = check(layer)
    assert torch.isnan(y).any(dim=1).nonzero().flatten().tolist() == [3]


def test_infinite_tokens_end_where_the_reference_has_them() -> None:
    layer = random_layer(tokens=20, adapters=1, gate_up_rank=5, down_rank=3)
    layer.x[7, 2] = torch.inf
    check(layer)


def test_a_nan_router_logit_makes_its_token_nan() -> None:
    layer = random_layer(tokens=5)
    layer.router_logits[2, 1] = torch.nan
    y = moe(layer.x, layer.router_logits, layer.experts, **layer.options)
    assert torch.isnan(y).all(dim=1).tolist() == [False, False, True, False, False]


def test_nan_in_an_adapter_reaches_only_its_tokens() -> None:
    layer = random_layer(tokens=30, adapters=2, gate_up_rank=4, down_rank=4, mixed=True)
    layer.lora.gate_up_b[1] = torch.nan
    layer.lora.down_a[1] = torch.inf
    y = check(layer)
    assert torch.equal(torch.isnan(y).all(dim=1), layer.adapter_ids == 1)


def test_scale_255_shows_through_the_clamp() -> None:
    layer = random_layer(tokens=9, experts=1, top_k=1)
    layer.experts.gate_up.scales[0, 11, 0] = 255  # an up row, whose infinity would be clamped to 7
    assert torch.isnan(check(layer)).all()


def test_float32_adapters_and_biases_are_taken() -> None:
    layer = random_layer(tokens=9, adapters=1, gate_up_rank=4, down_rank=4)
    layer.lora = transform(layer.lora, lambda t: t.float())
    layer.experts.gate_up_bias = layer.experts.gate_up_bias.float()
    check(layer)


def test_a_weight_may_be_dense_beside_an_mxfp4_one() -> None:
    dense, packed = random_layer(tokens=9, mxfp4=False), random_layer(tokens=9)
    check(dataclasses.replace(packed, experts=dataclasses.replace(packed.experts, down=dense.experts.down)))


ADAPTED = random_layer(tokens=4, adapters=2, gate_up_rank=4, down_rank=3, mixed=True)
PLAIN = random_layer(tokens=4)


def experts(**changes: object) -> Layer:
    """The layer with some of its weights replaced."""
    return dataclasses.replace(ADAPTED, experts=dataclasses.replace(ADAPTED.experts, **changes))


def lora(**changes: object) -> Layer:
    """The layer with some of its adapters' tensors replaced."""
    return dataclasses.replace(ADAPTED, lora=dataclasses.replace(ADAPTED.lora, **changes))


def layer(**changes: object) -> Layer:
    """The layer with some of its arguments replaced."""
    return dataclasses.replace(ADAPTED, **changes)


BLOCKS, SCALES = ADAPTED.experts.gate_up.blocks, ADAPTED.experts.gate_up.scales
REFUSED = {
    "x must be bfloat16 [T, H], got torch.float32 with shape (4, 64)": layer(x=torch.zeros(4, 64)),
    "gate_up must have shape (4, 192, 3, 16), got (4, 192, 2, 16)": layer(x=torch.zeros(4, 96).bfloat16()),
    "gate_up must have an inner size that is a multiple of 32 for MXFP4, x or I gives 65": layer(
        x=torch.zeros(4, 65).bfloat16()
    ),
    "gate_up must have rank 4, got shape (4, 192, 32)": experts(gate_up=Weight(BLOCKS.flatten(-2), SCALES)),
    "gate_up_scales must have shape (4, 192, 2), got (4, 192, 1)": experts(
        gate_up=Weight(BLOCKS, SCALES[..., :1].contiguous())
    ),
    "down must be bfloat16, got torch.float32": experts(down=torch.zeros(4, 64, 96)),
    "down_bias must have shape (4, 64), got (4, 65)": experts(down_bias=torch.zeros(4, 65)),
    "router_logits must have shape (4, 4), got (4, 3)": layer(router_logits=torch.zeros(4, 3)),
    "router_logits must have shape (4, 4), got (5, 4)": layer(router_logits=torch.zeros(5, 4)),
    "top_k must be between 1 and the number of experts (4), got 5": layer(top_k=5),
    "gate_up_a must have rank 4, got shape (4, 4, 64)": lora(gate_up_a=torch.zeros(4, 4, 64)),
    "gate_up_b must have shape (2, 4, 192, 4), got (2, 4, 192, 8)": lora(gate_up_b=torch.zeros(2, 4, 192, 8)),
    "down_a must have shape (2, 4, 3, 96), got (1, 4, 3, 96)": lora(down_a=torch.zeros(1, 4, 3, 96)),
    "down_scale must be float32, got torch.bfloat16": lora(down_scale=torch.zeros(2).bfloat16()),
    "down_a, _b and _scale must be given together or not at all, got ['down_b', 'down_scale']": lora(down_a=None),
    "gate_up_a, _b and _scale must be given together or not at all, got ['gate_up_a']": lora(
        gate_up_b=None, gate_up_scale=None
    ),
    "down_a must hold at least one adapter of rank 1 or more, got shape (2, 4, 0, 96)": lora(
        down_a=torch.zeros(2, 4, 0, 96), down_b=torch.zeros(2, 4, 64, 0)
    ),
    "top_k must be an int, got 2.0": layer(top_k=2.0),
    "adapter_ids must be int32, got torch.int64": layer(adapter_ids=torch.zeros(4, dtype=torch.int64)),
    "adapter_ids must have shape (4,), got (3,)": layer(adapter_ids=torch.zeros(3, dtype=torch.int32)),
    "adapter_ids must be given with 2 adapters, got None": layer(adapter_ids=None),
    "adapter_ids were given without lora: there is no adapter they could name": layer(lora=None),
    "router_logits may be None only when routing is given": layer(router_logits=None),
}


@pytest.mark.parametrize(("message", "bad"), REFUSED.items(), ids=range(len(REFUSED)))
def test_tensors_that_do_not_fit_are_named(message: str, bad: Layer) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        moe(bad.x, bad.router_logits, bad.experts, **bad.options)


def test_packed_weights_are_not_interpreted() -> None:
    shape = LayerShape(4, hidden=64, intermediate=96, experts=4, top_k=2)
    packed = jmoe.pack(jax_random_layer(shape).experts)
    with pytest.raises(NotImplementedError, match="packed weights are read on a GPU alone"):
        moe(PLAIN.x, PLAIN.router_logits, jax.tree.map(to_torch, packed), **PLAIN.options)


def test_a_routing_that_does_not_fit_is_named() -> None:
    chosen = torch.zeros(4, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^weights must have shape \(4, 2\), got \(4, 3\)$"):
        moe(PLAIN.x, None, PLAIN.experts, routing=Routing(chosen, torch.zeros(4, 3)), **PLAIN.options)
    with pytest.raises(ValueError, match=r"^experts must be int32, got torch.int64$"):
        moe(PLAIN.x, None, PLAIN.experts, routing=Routing(chosen.long(), torch.zeros(4, 2)), **PLAIN.options)


def test_tensors_that_lie_wrong_are_named() -> None:
    strided = dataclasses.replace(PLAIN.experts, gate_up=Weight(BLOCKS, SCALES.mT.contiguous().mT))
    shifted = torch.zeros(17, dtype=torch.bfloat16)[1:].view(4, 4)
    with pytest.raises(ValueError, match=r"gate_up_scales must be contiguous, got shape \(4, 192, 2\) with strides"):
        moe(PLAIN.x, PLAIN.router_logits, strided, top_k=2)
    with pytest.raises(ValueError, match=r"expert_offset must be a torch.Tensor, got int"):
        moe(PLAIN.x, PLAIN.router_logits, PLAIN.experts, top_k=2, expert_offset=0)
    with pytest.raises(ValueError, match=r"x must be a torch.Tensor, got ndarray"):
        moe(PLAIN.x.float().numpy(), PLAIN.router_logits, PLAIN.experts, top_k=2)
    with pytest.raises(ValueError, match="router_logits must be aligned to 16 bytes, got address 0x"):
        moe(PLAIN.x, shifted, PLAIN.experts, top_k=2)


def test_jax_does_not_launch_interpreted_kernels() -> None:
    jax_layer = jax_random_layer(LayerShape(4, hidden=64, intermediate=64, experts=4, top_k=2))
    call = jax.jit(
        lambda x: jmoe.moe(x, jax_layer.router_logits, jax_layer.experts, top_k=2, backend=jmoe.Target("sm_90"))
    )
    with pytest.raises(
        NotImplementedError, match=r"^JAX cannot launch kernels that were decorated for Triton's interpreter"
    ):
        call.trace(jax_layer.x).lower(lowering_platforms=("cuda",))
