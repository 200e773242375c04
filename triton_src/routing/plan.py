"""Routing: the choice of experts, and the order in which grouped products visit (token, expert) pairs."""

from jmoe.triton_src.plan import Plan
from jmoe.triton_src.routing.few import fits, plan_route_few
from jmoe.triton_src.routing.many import plan_route_many
from jmoe.triton_src.routing.problem import RouteProblem
from jmoe.triton_src.tiles import LaunchTable


def plan_routing(problem: RouteProblem, table: LaunchTable) -> list[Plan]:
    """experts and weights [T, k] unless given, order [P] and tiles [slots, 3], and x_interleaved if asked for."""
    return [plan_route_few(problem, table)] if fits(problem, table) else plan_route_many(problem, table)
