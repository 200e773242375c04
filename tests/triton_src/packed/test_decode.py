"""The kernel of a whole layer of few rows, assembled for Hopper: it fits registers and shared memory."""

import dataclasses
from pathlib import Path

import pytest

from jmoe.triton_src.moe import plan_moe
from tests.triton_src.packed.assembled import PROBLEM, check_programs_fit


@pytest.mark.parametrize("rank", [None, 16, 64])
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_several_programs_fit_a_multiprocessor(tokens: int, rank: int | None, tmp_path: Path) -> None:
    problem = PROBLEM if rank is None else dataclasses.replace(PROBLEM, adapters=1, gate_up_rank=rank, down_rank=rank)
    problem = dataclasses.replace(problem, tokens=tokens)
    (plan,) = (plan for plan in plan_moe(problem, 90) if plan.name.startswith("packed"))
    assert plan.name == "packed_decode"
    check_programs_fit(plan, 4, tmp_path)
