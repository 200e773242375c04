"""The launches of one mixture-of-experts layer, in order. Both frameworks run this list; neither adds to it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jmoe.triton_src.packed.decode import plan_packed_decode
from jmoe.triton_src.packed.grouped_matmul import plan_packed_grouped_matmul
from jmoe.triton_src.plan import Plan
from jmoe.triton_src.portable.grouped_matmul import plan_grouped_matmul
from jmoe.triton_src.portable.shrink import plan_shrink
from jmoe.triton_src.problem import MoeProblem, Projection, RowTile
from jmoe.triton_src.routing.combine import plan_combine
from jmoe.triton_src.routing.l2_prefetch import Prefetch
from jmoe.triton_src.routing.plan import plan_routing
from jmoe.triton_src.tile_tables import own_table
from jmoe.triton_src.tiles import (
    DecodeTile,
    GroupedMatmulTile,
    GroupedTile,
    LaunchTable,
    layer_tile,
    tile_for,
)


def plan_moe(
    problem: MoeProblem, capability: int, table: LaunchTable | None = None, *, keep: bool = False
) -> list[Plan]:
    """The launches for a GPU of this compute capability (90 is 9.0), in order; the last one writes the buffer "y".

    table: its launch parameters; the package's for that compute capability if None.
    keep: also write "pre_activations" [P, 2I] by position, for the gradient.

    Raises:
      NotImplementedError: the GPU is older than the kernels support, or none of them reads packed weights there.
    """
    table = table or own_table(capability)
    tile = layer_tile(table, problem.rows_of_expert, packed=problem.packed, gradient=keep)
    if tile is None:
        raise no_packed_kernel(capability)
    return LAYERS[type(tile)].plan(problem, tile, table, keep)


def no_packed_kernel(capability: int) -> NotImplementedError:
    """The error where layer_tile finds no kernel."""
    return NotImplementedError(
        f"packed MXFP4 weights are read on compute capability 9.0, got sm_{capability}: unpack them"
    )


def plan_decode_layer(problem: MoeProblem, tile: DecodeTile, table: LaunchTable, keep: bool) -> list[Plan]:
    """Both products and LoRA in one launch, from packed weights."""
    assert not keep
    p = problem
    prefetch = Prefetch(p.experts, p.gate_up.n, p.hidden, tile.prefetched_experts, tile.prefetched_blocks, p.stacked)
    return [
        *plan_routing(p.routing(tile, reorder=True, counters=True, prefetch=prefetch), table),
        plan_packed_decode(problem, tile),
        plan_sum("pair_out", "y", problem, table),
    ]


def plan_packed_layer(problem: MoeProblem, tile: GroupedTile, table: LaunchTable, keep: bool) -> list[Plan]:
    """Products from packed weights, in one launch where LoRA's shrink does not come between."""
    if problem.down.rank is not None:
        return plan_layer(problem, tile, table, keep)
    return [
        *plan_routing(problem.routing(tile, counters=True), table),
        *plan_shrink_before(problem.gate_up, problem, table, tile),
        plan_packed_grouped_matmul((problem.gate_up, problem.down), problem, tile, keep),
        plan_sum("pair_out", "y", problem, table),
    ]


def plan_layer(
    problem: MoeProblem, tile: GroupedMatmulTile | GroupedTile, table: LaunchTable, keep: bool
) -> list[Plan]:
    """One product after another."""
    return [
        *plan_routing(problem.routing(tile), table),
        *plan_product(problem.gate_up, problem, tile, table, keep),
        *plan_product(problem.down, problem, tile, table),
        plan_sum("pair_out", "y", problem, table),
    ]


class LayerPlanner(NamedTuple):
    """How a layer is planned whose products have some kind of tile."""

    kernel: str  # of the products
    plan: Callable[[MoeProblem, Any, LaunchTable, bool], list[Plan]]


LAYERS = {
    GroupedMatmulTile: LayerPlanner("grouped_matmul", plan_layer),
    GroupedTile: LayerPlanner("packed_grouped_matmul", plan_packed_layer),
    DecodeTile: LayerPlanner("packed_decode", plan_decode_layer),
}
"""By the kind of tile."""


def plan_one_packed_product(product: Projection, problem: MoeProblem, tile: GroupedTile, keep: bool = False) -> Plan:
    """plan_packed_grouped_matmul of one product."""
    return plan_packed_grouped_matmul((product,), problem, tile, keep)


PRODUCTS: dict[type, Callable[[Projection, MoeProblem, Any, bool], Plan]] = {
    GroupedMatmulTile: plan_grouped_matmul,
    GroupedTile: plan_one_packed_product,
}
"""How a product is planned that is a launch of its own, by the kind of its tile."""


def plan_product(
    product: Projection,
    problem: MoeProblem,
    tile: GroupedMatmulTile | GroupedTile,
    table: LaunchTable,
    keep: bool = False,
) -> list[Plan]:
    """LoRA's shrink, if there is LoRA, and the product."""
    shrink = plan_shrink_before(product, problem, table, tile)
    return [*shrink, PRODUCTS[type(tile)](product, problem, tile, keep)]


def plan_shrink_before(product: Projection, problem: MoeProblem, table: LaunchTable, routed: RowTile) -> list[Plan]:
    """The shrink of what goes into a product, if that has LoRA."""
    if product.rank is None:
        return []
    source = "x" if product.is_gate_up else "activations"
    tile = tile_for(table.shrink, problem.rows_of_expert)
    return [plan_shrink(source, "a", f"{product.name}_shrunk", product, problem, tile, routed)]


def plan_sum(source: str, out: str, problem: MoeProblem, table: LaunchTable, *, unknown_is_nan: bool = True) -> Plan:
    """The sum over each token's experts, a layer's last launch."""
    return plan_combine(source, out, problem, tile_for(table.combine, problem.tokens), unknown_is_nan=unknown_is_nan)
