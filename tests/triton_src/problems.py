"""Layers' problems for tests of plans: gpt-oss-20b's sizes, and what differs from them."""

import dataclasses
from typing import Any

from jmoe.triton_src.activation import SwiGLU
from jmoe.triton_src.problem import Layout, MoeProblem, Projection


def moe_problem(
    tokens: int = 16,
    *,
    hidden: int = 2880,
    intermediate: int = 2880,
    experts: int = 32,
    router_experts: int | None = 32,
    top_k: int = 4,
    layout: Layout = Layout.MXFP4,
    bias: bool = True,
    ranks: tuple[int | None, int | None] = (None, None),
    **options: Any,
) -> MoeProblem:
    """The problem of a layer; ranks are gate_up's and down's, and options are further fields."""
    return MoeProblem(
        tokens=tokens,
        top_k=top_k,
        experts=experts,
        router_experts=router_experts,
        gate_up=Projection("gate_up", 2 * intermediate, hidden, layout, bias, ranks[0]),
        down=Projection("down", hidden, intermediate, layout, bias, ranks[1]),
        **{"activation": SwiGLU(), **options},
    )


def with_both(problem: MoeProblem, **changes: Any) -> MoeProblem:
    """The problem with fields of both projections changed."""
    gate_up, down = (dataclasses.replace(one, **changes) for one in (problem.gate_up, problem.down))
    return dataclasses.replace(problem, gate_up=gate_up, down=down)
