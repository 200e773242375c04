"""Routing: the choice of experts, and the order in which grouped products visit (token, expert) pairs."""

from jmoe.triton_src.plan import Plan
from jmoe.triton_src.route_few import fits, plan_route_few
from jmoe.triton_src.route_many import plan_route_many
from jmoe.triton_src.route_problem import RouteProblem


def plan_routing(problem: RouteProblem) -> list[Plan]:
    """experts and weights [T, k] unless given, order [P] and tiles [slots, 3], and x_interleaved if asked for."""
    return [plan_route_few(problem)] if fits(problem) else plan_route_many(problem)
