"""Routing: the choice of experts, and the order in which grouped products visit (token, expert) pairs."""

from jmoe.triton_src.plan import Plan
from jmoe.triton_src.routing.few import MOST_ROWS, plan_route_few
from jmoe.triton_src.routing.many import plan_route_many
from jmoe.triton_src.routing.problem import RouteProblem
from jmoe.triton_src.tiles import LaunchTable


def plan_routing(problem: RouteProblem, table: LaunchTable) -> list[Plan]:
    """experts and weights [T, k] unless given, order [P] and tiles [max_tiles, 3], and x_in_mma_order if asked for."""
    elements = problem.rows_padded * problem.columns_padded  # that one program of all rows holds in registers
    if problem.rows_padded <= MOST_ROWS and elements <= table.route_few[-1].elements:
        return [plan_route_few(problem, table)]
    return plan_route_many(problem, table)
