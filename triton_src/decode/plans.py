"""Plans of the decode operations, by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jmoe.triton_src.decode.cached_attention import CachedAttentionProblem, plan_cached_attention
from jmoe.triton_src.decode.linear import DecodeLinearProblem, plan_decode_linear
from jmoe.triton_src.decode.norm_linear import NormLinearProblem, plan_norm_linear
from jmoe.triton_src.plan import Plan
from jmoe.triton_src.tiles import LaunchTable, tile_for


class Operation(NamedTuple):
    """An operation's problem, and its planner, which takes the problem and a tile of the table's section."""

    problem: type[Any]
    plan: Callable[[Any, Any], list[Plan]]


OPERATIONS = {
    "cached_attention": Operation(CachedAttentionProblem, plan_cached_attention),
    "decode_linear": Operation(DecodeLinearProblem, plan_decode_linear),
    "norm_linear": Operation(NormLinearProblem, plan_norm_linear),
}
"""By the name that is also the table's section."""


def plan_decode(operation: str, table: LaunchTable, **sizes: Any) -> list[Plan]:
    """The launches of one of OPERATIONS; for the sizes see its problem."""
    problem = OPERATIONS[operation].problem(**sizes)
    return OPERATIONS[operation].plan(problem, tile_for(getattr(table, operation), problem.rows))
