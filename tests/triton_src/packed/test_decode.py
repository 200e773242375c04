"""The kernel of a whole layer of few rows, assembled for Hopper: it fits registers and shared memory."""

from pathlib import Path

import pytest

from jmoe.triton_src.moe import plan_moe
from jmoe.triton_src.problem import Layout
from tests.triton_src.packed.assembled import check_programs_fit
from tests.triton_src.problems import moe_problem


@pytest.mark.parametrize("rank", [None, 16, 64])
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_several_programs_fit_a_multiprocessor(tokens: int, rank: int | None, tmp_path: Path) -> None:
    problem = moe_problem(tokens, layout=Layout.PACKED, ranks=(rank, rank), adapters=0 if rank is None else 1)
    (plan,) = (plan for plan in plan_moe(problem, 90) if plan.name.startswith("packed"))
    assert plan.name == "packed_decode"
    check_programs_fit(plan, 4, tmp_path)


def test_several_programs_fit_with_mixed_adapters_too(tmp_path: Path) -> None:
    problem = moe_problem(16, layout=Layout.PACKED, ranks=(64, 64), adapters=32, adapter_ids=True)
    (plan,) = (plan for plan in plan_moe(problem, 90) if plan.name.startswith("packed"))
    check_programs_fit(plan, 4, tmp_path)
