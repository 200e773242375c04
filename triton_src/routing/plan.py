"""Routing: the choice of experts, and the order in which grouped products visit (token, expert) pairs."""

from jmoe.triton_src.plan import Plan
from jmoe.triton_src.routing.few import MOST_ROWS, elements, padded_rows, plan_route_few
from jmoe.triton_src.routing.many import plan_route_many
from jmoe.triton_src.routing.problem import RouteProblem
from jmoe.triton_src.tiles import LaunchTable, tile_for


def plan_routing(problem: RouteProblem, table: LaunchTable) -> list[Plan]:
    """experts and weights [T, k] unless given, order [P] and tiles [slots, 3], and x_interleaved if asked for."""
    side_work = tile_for(table.side_work, problem.tokens)
    if padded_rows(problem) <= MOST_ROWS and elements(problem) <= table.route_few[-1].elements:
        return [plan_route_few(problem, tile_for(table.route_few, elements(problem)), side_work)]
    section = table.count if problem.router_experts is not None else table.count_pairs
    count, sort = tile_for(section, problem.columns_padded), tile_for(table.sort, problem.pairs)
    return plan_route_many(problem, count, sort, side_work)
