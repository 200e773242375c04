"""The products of many rows, assembled for Hopper: they fit registers and shared memory, and overlap."""

from pathlib import Path

import pytest

from jmoe.triton_src.moe import plan_moe
from jmoe.triton_src.problem import Layout
from tests.triton_src.packed.assembled import assemble, check_programs_fit
from tests.triton_src.problems import moe_problem


@pytest.mark.parametrize("tokens", [256, 4096])
@pytest.mark.parametrize("rank", [16, 64, 100])
def test_products_overlap_with_mixed_adapters_too(tokens: int, rank: int, tmp_path: Path) -> None:
    problem = moe_problem(tokens, layout=Layout.PACKED, ranks=(rank, rank), adapters=8, adapter_ids=True)
    for plan in plan_moe(problem, 90):
        if plan.name == "packed_grouped_matmul":
            assert "serialized" not in assemble(plan, tmp_path)[0]


@pytest.mark.parametrize("rank", [None, 16, 64])
@pytest.mark.parametrize(("tokens", "programs"), [(256, 3), (4096, 2)])
def test_several_programs_fit_a_multiprocessor(tokens: int, programs: int, rank: int | None, tmp_path: Path) -> None:
    problem = moe_problem(tokens, layout=Layout.PACKED, ranks=(rank, rank), adapters=0 if rank is None else 1)
    plan = next(plan for plan in plan_moe(problem, 90) if plan.name.startswith("packed"))
    assert plan.name == "packed_grouped_matmul"
    check_programs_fit(plan, programs, tmp_path)
