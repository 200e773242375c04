"""Launch plans: values that can be checked without a device."""

import dataclasses
import itertools

import pytest

from jmoe.triton_src.activation import SwiGLU
from jmoe.triton_src.moe import MoeProblem, plan_moe, reads_packed
from jmoe.triton_src.plan import Plan, cdiv
from jmoe.triton_src.portable.shrink import rank_blocks
from jmoe.triton_src.routing.many import plan_route_many
from jmoe.triton_src.routing.plan import plan_routing
from jmoe.triton_src.routing.problem import RouteProblem, tile_slots
from jmoe.triton_src.tile_tables import own_table
from jmoe.triton_src.tiles import bound_of, packed_tile_for, tile_for

CAPABILITIES = (80, 90, 100)

PROBLEM = MoeProblem(
    tokens=16,
    hidden=2880,
    intermediate=2880,
    experts=32,
    top_k=4,
    router_experts=32,
    packed=False,
    gate_up_mxfp4=True,
    down_mxfp4=True,
    gate_up_bias=True,
    down_bias=True,
    adapters=2,
    gate_up_rank=8,
    down_rank=16,
    adapter_ids=True,
    expert_offset=True,
    activation=SwiGLU(),
)

VARIANTS = [
    dataclasses.replace(PROBLEM, tokens=tokens, **change)
    for tokens in (1, 7, 300, 131072)
    for change in (
        {},
        {"router_experts": None},
        {"gate_up_rank": None, "down_rank": None, "adapters": 0, "adapter_ids": False},
        {"gate_up_mxfp4": False, "down_mxfp4": False, "gate_up_bias": False, "down_bias": False},
        {"expert_offset": False, "experts": 128, "router_experts": 128},
    )
]

PACKED = dataclasses.replace(
    PROBLEM, packed=True, adapters=0, gate_up_rank=None, down_rank=None, adapter_ids=False, intermediate=96, hidden=160
)


@pytest.mark.parametrize("problem", VARIANTS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_plans_name_every_parameter_and_read_only_what_was_written(problem: MoeProblem, capability: int) -> None:
    given = {"x", "gate_up", "down", "gate_up_scales", "down_scales", "gate_up_bias", "down_bias", "adapter_ids"}
    given |= {f"{projection}_{part}" for projection in ("gate_up", "down") for part in ("a", "b", "scale")}
    given |= {"expert_offset"} | ({"experts", "weights"} if problem.router_experts is None else {"router_logits"})
    for plan in plan_moe(problem, capability):
        plan.check_names()
        assert {name for name in plan.operands.values() if name} <= given
        given |= {buffer.name for buffer in plan.outputs.values()}
        # CUDA's limits; the second and third axes are short ones.
        assert 1 <= plan.grid[0] < 2**31
        assert all(1 <= size <= 65535 for size in plan.grid[1:])
    assert "y" in given


@pytest.mark.parametrize("problem", VARIANTS)
def test_grids_cover_rows_and_columns(problem: MoeProblem) -> None:
    for plan in plan_moe(problem, 90):
        if plan.name == "grouped_matmul":
            assert plan.grid[0] * plan.constexprs["BLOCK_N"] >= plan.constexprs["N"]
            assert plan.constexprs["BLOCK_N"] % 2 == 0  # gate and up stay together
        if plan.name == "shrink":
            assert plan.grid[0] * plan.constexprs["BLOCK_R"] == plan.constexprs["RANK_PADDED"]
            assert plan.constexprs["RANK_PADDED"] >= plan.constexprs["RANK"]


def test_a_misspelt_parameter_is_noticed() -> None:
    plan = plan_moe(PROBLEM, 90)[-1]
    wrong = dataclasses.replace(plan, operands={**plan.operands, "adapter_ptr": None})
    with pytest.raises(TypeError, match=r"plan of combine: missing \[\], unknown \['adapter_ptr'\]"):
        wrong.check_names()
    fewer = {name: value for name, value in plan.constexprs.items() if name != "H"}
    with pytest.raises(TypeError, match=r"plan of combine: missing \['H'\], unknown \[\]"):
        dataclasses.replace(plan, constexprs=fewer).check_names()


@pytest.mark.parametrize(("pairs", "experts", "block_m"), list(itertools.product((1, 3, 17, 300), (1, 4, 40), (4, 16))))
def test_slots_hold_the_worst_spread_of_pairs(pairs: int, experts: int, block_m: int) -> None:
    worst = 0
    for active in range(1, min(pairs, experts) + 1):
        # The most tiles: every expert but one ends with a tile of a single row.
        spare = pairs - active
        worst = max(worst, active + spare // block_m)
    assert tile_slots(pairs, experts, block_m) == worst


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("experts", [4, 32, 256])
@pytest.mark.parametrize("tokens", [1, 64, 257, 4096, 131072])
def test_sort_bounds_what_its_programs_read(tokens: int, experts: int, given: bool) -> None:
    problem = RouteProblem(tokens, 4, experts, None if given else experts, False, 128, None)
    count, sort = plan_route_many(problem, own_table(90))
    assert count.grid == sort.grid
    assert sort.grid[0] <= min(128, sort.constexprs["COUNT_BLOCKS"] * sort.constexprs["BLOCK_COUNTS"])
    assert sort.grid[0] * sort.constexprs["RUN"] >= problem.pairs


@pytest.mark.parametrize(("tokens", "experts"), [(1, 32), (64, 32), (32, 128)])
def test_decoding_is_routed_in_one_launch(tokens: int, experts: int) -> None:
    assert len(plan_routing(RouteProblem(tokens, 4, experts, experts, False, 8, 2880), own_table(90))) == 1


@pytest.mark.parametrize("tokens", [1, 4, 16, 60, 64])
def test_an_even_routing_gives_every_tile_a_program_and_few_are_idle(tokens: int) -> None:
    experts = next(
        plan for plan in plan_moe(dataclasses.replace(PACKED, tokens=tokens), 90) if "spread" in plan.scalars
    )
    active = min(PACKED.top_k * tokens, PACKED.experts)
    assert active <= experts.scalars["spread"] <= min(experts.scalars["slots"], active + active // 4)


def test_routing_fetches_no_weights_that_there_are_not() -> None:
    one = dataclasses.replace(PACKED, hidden=64, intermediate=32, experts=1, router_experts=1, top_k=1)
    for small in (PACKED, one):
        routing = plan_moe(dataclasses.replace(small, tokens=1), 90)[0]
        values = routing.constexprs
        assert 0 < values["FETCHED_MATRICES"] <= values["MATRICES"] == small.experts * cdiv(2 * small.intermediate, 64)
        assert 0 < values["FETCHED_BLOCKS"] <= values["BLOCKS"] == cdiv(small.hidden, 64)
        lines = values["FETCHED_MATRICES"] * values["FETCHED_BLOCKS"] * 17
        assert (routing.grid[0] - 1 - routing.scalars["interleave_programs"]) * values["LINES"] >= lines


@pytest.mark.parametrize("rank", [1, 8, 16, 17, 64, 65, 200, 256])
def test_ranks_are_padded_to_whole_blocks(rank: int) -> None:
    block, padded = rank_blocks(rank)
    assert block >= 16
    assert padded == cdiv(rank, block) * block
    assert padded - rank < block


def test_tables_reach_any_load_on_any_gpu() -> None:
    for capability in (80, 86, 89, 90, 100, 103, 120):
        for pairs in (1, 64, 10**6):
            tile = tile_for(own_table(capability).grouped_matmul, pairs / 32)
            assert pairs / 32 <= tile.rows
    with pytest.raises(NotImplementedError, match=r"need compute capability 8.0 or later, got sm_75"):
        own_table(75)


@pytest.mark.parametrize("problem", VARIANTS[:5])
def test_estimates_are_positive(problem: MoeProblem) -> None:
    plans: list[Plan] = plan_moe(problem, 90)
    assert all(plan.bytes_accessed > 0 for plan in plans)
    assert sum(plan.flops for plan in plans) > 2 * problem.tokens * problem.top_k * 3 * 2880**2


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("tokens", "product", "shrinks"),
    [(1, "packed_decode", 0), (16, "packed_decode", 0), (1024, "packed_grouped_matmul", 2)],
)
def test_packed_plans_name_every_parameter(tokens: int, product: str, shrinks: int, lora: bool) -> None:
    problem = dataclasses.replace(PACKED, tokens=tokens)
    if lora:
        problem = dataclasses.replace(problem, adapters=3, gate_up_rank=8, down_rank=5, adapter_ids=True)
    plans = plan_moe(problem, 90)
    for plan in plans:
        plan.check_names()
    names = [plan.name for plan in plans]
    # down's shrink comes between the products, where it is a launch of its own.
    assert names.count(product) == (2 if lora and shrinks else 1)
    assert names.count("shrink") == shrinks * lora
    assert names[-1] == "combine"


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_packed_weights_without_a_kernel_are_refused(capability: int) -> None:
    assert not reads_packed(capability)
    with pytest.raises(NotImplementedError, match=f"got sm_{capability}: unpack them"):
        plan_moe(PACKED, capability)


@pytest.mark.parametrize("pairs", [1, 8, 9, 100, 5000, 10**6])
@pytest.mark.parametrize("experts", [1, 32, 256])
def test_some_packed_tile_takes_every_size(pairs: int, experts: int) -> None:
    rows = pairs / experts
    assert rows <= bound_of(packed_tile_for(own_table(90), rows))
