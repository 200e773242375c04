"""Launch plans: values that can be checked without a device."""

import dataclasses
import itertools
from typing import Any

import pytest

from jmoe.triton_src.moe import plan_moe
from jmoe.triton_src.moe_backward import plan_moe_backward
from jmoe.triton_src.plan import Plan, cdiv
from jmoe.triton_src.portable.shrink import rank_blocks
from jmoe.triton_src.problem import Layout, MoeProblem
from jmoe.triton_src.routing.many import plan_route_many
from jmoe.triton_src.routing.plan import plan_routing
from jmoe.triton_src.routing.problem import RouteProblem, max_tiles
from jmoe.triton_src.tile_tables import own_table
from jmoe.triton_src.tiles import bound_of, layer_tile, reads_packed, tile_for
from tests.triton_src.problems import moe_problem

CAPABILITIES = (80, 90, 100)

LORA: dict[str, Any] = {"ranks": (8, 16), "adapters": 2, "adapter_ids": True}
PROBLEM = moe_problem(expert_offset=True, **LORA)

VARIANTS = [
    moe_problem(tokens, **change)
    for tokens in (1, 7, 300, 131072)
    for change in (
        {"expert_offset": True, **LORA},
        {"expert_offset": True, "router_experts": None, **LORA},
        {"expert_offset": True},
        {"expert_offset": True, "layout": Layout.DENSE, "bias": False, **LORA},
        {"experts": 128, "router_experts": 128, **LORA},
    )
]

PACKED_SIZES: dict[str, Any] = {"layout": Layout.PACKED, "hidden": 160, "intermediate": 96}
PACKED = moe_problem(expert_offset=True, **PACKED_SIZES)


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
    assert max_tiles(pairs, experts, block_m) == worst


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
        plan for plan in plan_moe(dataclasses.replace(PACKED, tokens=tokens), 90) if "first_wave_tiles" in plan.scalars
    )
    active = min(PACKED.top_k * tokens, PACKED.experts)
    assert active <= experts.scalars["first_wave_tiles"] <= min(experts.scalars["max_tiles"], active + active // 4)


def test_routing_fetches_no_weights_that_there_are_not() -> None:
    sizes = {"hidden": 64, "intermediate": 32, "experts": 1, "router_experts": 1, "top_k": 1}
    one = moe_problem(layout=Layout.PACKED, **sizes)
    for small in (PACKED, one):
        routing = plan_moe(dataclasses.replace(small, tokens=1), 90)[0]
        values = routing.constexprs
        assert (
            0 < values["PREFETCHED_MATRICES"] <= values["MATRICES"] == small.experts * cdiv(2 * small.intermediate, 64)
        )
        assert 0 < values["PREFETCHED_BLOCKS"] <= values["BLOCKS"] == cdiv(small.hidden, 64)
        lines = values["PREFETCHED_MATRICES"] * values["PREFETCHED_BLOCKS"] * 17
        assert (routing.grid[0] - 1 - routing.scalars["reorder_programs"]) * values["LINES"] >= lines


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
        problem = moe_problem(tokens, **PACKED_SIZES, ranks=(8, 5), adapters=3, adapter_ids=True)
    plans = plan_moe(problem, 90)
    for plan in plans:
        plan.check_names()
    names = [plan.name for plan in plans]
    # down's shrink comes between the products, where it is a launch of its own.
    assert names.count(product) == (2 if lora and shrinks else 1)
    assert names.count("shrink") == shrinks * lora
    assert names[-1] == "combine"


PACKED_KERNELS = ("packed_decode", "packed_grouped_matmul", "packed_dgrad")


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_packed_weights_without_a_kernel_are_refused(capability: int) -> None:
    assert not any(reads_packed(kernel, own_table(capability)) for kernel in PACKED_KERNELS)
    with pytest.raises(NotImplementedError, match=f"got sm_{capability}: unpack them"):
        plan_moe(PACKED, capability)


@pytest.mark.parametrize(
    ("missing", "few", "many", "gradient"),
    [
        ("packed_decode", "packed_grouped_matmul", "packed_grouped_matmul", True),
        ("packed_grouped_matmul", "packed_decode", None, False),
        ("packed_dgrad", "packed_decode", "packed_grouped_matmul", False),
    ],
)
def test_a_kernel_for_packed_weights_that_a_gpu_lacks_is_missed_where_it_is_needed(
    missing: str, few: str, many: str | None, gradient: bool
) -> None:
    table = own_table(90).over({missing: ()})
    assert [reads_packed(kernel, table) for kernel in PACKED_KERNELS] == [name != missing for name in PACKED_KERNELS]
    assert few in [plan.name for plan in plan_moe(dataclasses.replace(PACKED, tokens=4), 90, table)]
    large = dataclasses.replace(PACKED, tokens=4096)
    if many is None:
        with pytest.raises(NotImplementedError, match="unpack them"):
            plan_moe(large, 90, table)
    else:
        assert many in [plan.name for plan in plan_moe(large, 90, table)]
    assert (layer_tile(table, large.rows_of_expert, packed=True, gradient=True) is not None) == gradient
    if not gradient:
        for call in (
            lambda: plan_moe(large, 90, table, keep=True),
            lambda: plan_moe_backward(large, {}, True, 90, table),
        ):
            with pytest.raises(NotImplementedError, match="unpack them"):
                call()


@pytest.mark.parametrize("pairs", [1, 8, 9, 100, 5000, 10**6])
@pytest.mark.parametrize("experts", [1, 32, 256])
def test_some_packed_tile_takes_every_size(pairs: int, experts: int) -> None:
    rows = pairs / experts
    tile = layer_tile(own_table(90), rows, packed=True)
    assert tile is not None
    assert rows <= bound_of(tile)
