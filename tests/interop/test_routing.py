"""Routing's kernels through Triton's interpreter, against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.interop import launch as launches
from jmoe.interop.interpreter import bfloat16_arithmetic
from jmoe.interop.launch import launch
from jmoe.interop.reference import route
from jmoe.triton_src.plan import Buffer
from jmoe.triton_src.routing.few import plan_route_few
from jmoe.triton_src.routing.many import plan_route_many
from jmoe.triton_src.routing.mma_k_order import interleaved_width
from jmoe.triton_src.routing.plan import plan_routing
from jmoe.triton_src.routing.problem import RouteProblem
from jmoe.triton_src.tile_tables import own_table

pytestmark = pytest.mark.interpret


TABLE = own_table(90)

PLANS = {
    "one launch": lambda problem: [plan_route_few(problem, TABLE)],
    "two launches": lambda problem: plan_route_many(problem, TABLE),
    "either": lambda problem: plan_routing(problem, TABLE),
}


def problem(tokens: int, top_k: int, experts: int, **change: object) -> RouteProblem:
    """A routing by logits over all experts, in tiles of 16 rows, but for what is changed."""
    usual = {"router_experts": experts, "expert_offset": False, "block_m": 16, "hidden": None}
    return RouteProblem(tokens=tokens, top_k=top_k, experts=experts, **(usual | change))


def choose(logits: torch.Tensor, top_k: int, plan: str = "either") -> tuple[torch.Tensor, torch.Tensor]:
    """(experts, weights) of the kernel."""
    tokens, experts = logits.shape
    with bfloat16_arithmetic():
        done = launch(PLANS[plan](problem(tokens, top_k, experts)), {"router_logits": logits})
    return done["experts"], done["weights"]


def sort(
    experts: torch.Tensor, count: int, block_m: int, offset: int | None, plan: str = "either"
) -> tuple[np.ndarray, np.ndarray]:
    """(order, tiles) of the kernels, for given experts [T, k]."""
    tokens, top_k = experts.shape
    buffers = {"experts": experts}
    if offset is not None:
        buffers["expert_offset"] = torch.tensor([offset], dtype=torch.int32)
    given = problem(tokens, top_k, count, router_experts=None, expert_offset=offset is not None, block_m=block_m)
    done = launch(PLANS[plan](given), buffers)
    return done["order"].numpy(), done["tiles"].numpy()


@pytest.mark.parametrize("plan", ["one launch", "two launches"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@settings(max_examples=12)
@given(tokens=st.integers(1, 40), experts=st.integers(1, 256), top_k=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_choice_is_the_largest_logits_and_their_softmax(
    plan: str, dtype: torch.dtype, tokens: int, experts: int, top_k: int, seed: int
) -> None:
    top_k = min(top_k, experts)
    # Few distinct values, so that ties abound.
    logits = (torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2).round().to(dtype)
    chosen, weights = choose(logits, top_k, plan)
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


@pytest.mark.parametrize("plan", ["one launch", "two launches"])
@settings(max_examples=20)
@given(
    pairs=st.integers(1, 256),
    count=st.integers(1, 64),
    block_m=st.sampled_from([8, 64, 128]),
    seed=st.integers(0, 10**6),
    sharded=st.booleans(),
)
def test_order_is_a_stable_sort_and_tiles_cover_it(
    plan: str, pairs: int, count: int, block_m: int, seed: int, sharded: bool
) -> None:
    rng = np.random.default_rng(seed)
    offset = 3 if sharded else None
    experts = rng.integers(-1 if sharded else 0, count + (7 if sharded else 0), pairs).astype(np.int32)
    order, tiles = sort(torch.from_numpy(experts)[:, None], count, block_m, offset, plan)

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


@pytest.mark.parametrize("plan", ["one launch", "two launches"])
@settings(max_examples=20)
@given(
    tokens=st.integers(1, 64),
    router_experts=st.integers(1, 130),
    held=st.integers(1, 40),
    offset=st.integers(-5, 140),
    top_k=st.integers(1, 8),
    seed=st.integers(0, 10**6),
)
def test_chosen_experts_are_sorted_where_they_are_held(
    plan: str, tokens: int, router_experts: int, held: int, offset: int, top_k: int, seed: int
) -> None:
    top_k = min(top_k, router_experts)
    logits = torch.randn(tokens, router_experts, generator=torch.Generator().manual_seed(seed)).bfloat16()
    sharded = problem(tokens, top_k, held, router_experts=router_experts, expert_offset=True)
    buffers = {"router_logits": logits, "expert_offset": torch.tensor([offset], dtype=torch.int32)}
    with bfloat16_arithmetic():
        done = launch(PLANS[plan](sharded), buffers)
    chosen = route(logits.float(), top_k)[0]
    order, tiles = sort(chosen.int(), held, 16, offset)
    here = ((chosen >= offset) & (chosen < offset + held)).sum()
    np.testing.assert_array_equal(done["order"].numpy()[:here], order[:here])
    np.testing.assert_array_equal(done["tiles"].numpy(), tiles)


@pytest.mark.parametrize("plan", ["one launch", "two launches"])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 32), (5, 96), (3, 2880)])
def test_x_is_interleaved_beside_the_routing(plan: str, tokens: int, hidden: int) -> None:
    x = torch.randn(tokens, hidden).bfloat16()
    logits = torch.randn(tokens, 8).bfloat16()
    with bfloat16_arithmetic():
        done = launch(PLANS[plan](problem(tokens, 2, 8, hidden=hidden)), {"x": x, "router_logits": logits})
    width = interleaved_width(hidden)
    padded = torch.nn.functional.pad(x, (0, width - hidden))
    want = padded.reshape(tokens, width // 64, 2, 2, 2, 4, 2).permute(0, 1, 2, 5, 3, 4, 6).reshape(tokens, width)
    assert torch.equal(done["x_interleaved"], want)


@pytest.mark.parametrize("plan", ["one launch", "two launches"])
@pytest.mark.parametrize("tokens", [1, 60, 200])
def test_every_tile_has_a_counter_at_zero(plan: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(buffer: Buffer, device: torch.device) -> torch.Tensor:
        return torch.full(buffer.shape, 7, dtype=getattr(torch, buffer.dtype), device=device)

    monkeypatch.setattr(launches, "allocate", filled)
    few = problem(tokens, 4, 30, hidden=64, block_m=8, counters=True)
    buffers = {"x": torch.randn(tokens, 64).bfloat16(), "router_logits": torch.randn(tokens, 30).bfloat16()}
    with bfloat16_arithmetic():
        done = launch(PLANS[plan](few), buffers)
    assert done["finished"].shape == done["tiles"].shape[:1]
    assert not done["finished"].any()


@pytest.mark.parametrize("plan", ["one launch", "two launches"])
def test_with_counters_half_empty_tiles_come_last(plan: str) -> None:
    # 20, 3, 8, 0, 5 and 4 rows: in tiles of 8 experts 1 and 5 have half or less.
    experts = torch.tensor([0] * 20 + [1] * 3 + [2] * 8 + [4] * 5 + [5] * 4, dtype=torch.int32)[torch.randperm(40)]
    given = problem(40, 1, 6, router_experts=None, block_m=8, counters=True)
    tiles = launch(PLANS[plan](given), {"experts": experts[:, None]})["tiles"]
    wanted = [(0, 0, 20), (0, 8, 20), (0, 16, 20), (2, 23, 31), (4, 31, 36), (1, 20, 23), (5, 36, 40)]
    assert [tuple(tile) for tile in tiles.tolist() if tile[0] >= 0] == wanted


def test_many_pairs_take_several_steps_a_program() -> None:
    experts = torch.randint(0, 4, (128 * 256 + 1, 1), dtype=torch.int32)
    order, _ = sort(experts, 4, 128, None)
    np.testing.assert_array_equal(order, np.argsort(experts[:, 0].numpy(), kind="stable"))


def test_many_tokens_take_several_steps_a_program() -> None:
    logits = torch.randn(128 * 32 + 1, 5).bfloat16()
    with bfloat16_arithmetic():
        done = launch(PLANS["two launches"](problem(len(logits), 2, 5)), {"router_logits": logits})
    chosen = route(logits.float(), 2)[0].numpy()
    np.testing.assert_array_equal(done["experts"].numpy(), chosen)
    np.testing.assert_array_equal(done["order"].numpy(), np.argsort(chosen.reshape(-1), kind="stable"))
