"""Routing's three kernels through Triton's interpreter, against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.interop.interpreter import bfloat16_arithmetic
from jmoe.interop.launch import launch
from jmoe.interop.reference import route
from jmoe.triton_src.routing import plan_choose, plan_sort

pytestmark = pytest.mark.interpret


def choose(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(experts, weights) of the kernel."""
    with bfloat16_arithmetic():
        done = launch([plan_choose(*logits.shape, top_k)], {"router_logits": logits})
    return done["experts"], done["weights"]


def sort(experts: torch.Tensor, count: int, block_m: int, offset: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(order, tiles) of the kernels."""
    plans = plan_sort(pairs=experts.numel(), experts=count, block_m=block_m, expert_offset=offset is not None)
    buffers = {"experts": experts}
    if offset is not None:
        buffers["expert_offset"] = torch.tensor([offset], dtype=torch.int32)
    done = launch(plans, buffers)
    return done["order"].numpy(), done["tiles"].numpy()


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 256), st.integers(1, 8), st.integers(0, 10**6))
def test_choice_is_the_largest_logits_and_their_softmax(tokens: int, experts: int, top_k: int, seed: int) -> None:
    top_k = min(top_k, experts)
    # Few distinct values, so that ties abound.
    logits = (torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2).round().bfloat16()
    chosen, weights = choose(logits, top_k)
    want, want_weights = route(logits.float(), top_k)
    assert torch.equal(chosen.long(), want)
    torch.testing.assert_close(weights, want_weights, rtol=1e-6, atol=1e-7)


def test_zeros_of_either_sign_tie() -> None:
    assert choose(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), 2)[0].tolist() == [[0, 1]]


def test_minus_infinity_is_a_logit_like_others() -> None:
    chosen, weights = choose(torch.tensor([[-torch.inf, 1.0, -torch.inf]]), 3)
    assert chosen.tolist() == [[1, 0, 2]]
    assert weights.tolist() == [[1.0, 0.0, 0.0]]


def test_nan_is_chosen_and_shows() -> None:
    chosen, weights = choose(torch.tensor([[5.0, torch.nan, 7.0]]), 2)
    assert chosen.tolist() == [[1, 2]]
    assert weights.isnan().all()


@settings(max_examples=30)
@given(st.integers(1, 700), st.integers(1, 64), st.sampled_from([16, 64, 128]), st.integers(0, 10**6), st.booleans())
def test_order_is_a_stable_sort_and_tiles_cover_it(
    pairs: int, count: int, block_m: int, seed: int, sharded: bool
) -> None:
    rng = np.random.default_rng(seed)
    offset = 3 if sharded else None
    experts = rng.integers(-1 if sharded else 0, count + (7 if sharded else 0), pairs).astype(np.int32)
    order, tiles = sort(torch.from_numpy(experts), count, block_m, offset)

    local = experts - (offset or 0)
    held = np.flatnonzero((local >= 0) & (local < count))
    want = held[np.argsort(local[held], kind="stable")]
    np.testing.assert_array_equal(order[: held.size], want)

    used = tiles[tiles[:, 0] >= 0]
    assert (tiles[len(used) :, 0] == -1).all()
    covered = [range(first, min(first + block_m, end)) for _, first, end in used]
    assert [position for tile in covered for position in tile] == list(range(held.size))
    for (expert, _, _), tile in zip(used, covered, strict=True):
        assert (local[want[list(tile)]] == expert).all()


def test_many_pairs_take_several_steps_a_program() -> None:
    experts = torch.randint(0, 4, (128 * 256 + 1,), dtype=torch.int32)
    order, _ = sort(experts, 4, 128, None)
    np.testing.assert_array_equal(order, np.argsort(experts.numpy(), kind="stable"))
