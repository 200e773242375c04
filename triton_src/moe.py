"""The launches of one mixture-of-experts layer, in order. Both frameworks run this list; neither adds to it."""

from collections.abc import Callable, Sequence
from typing import Any

from jmoe.triton_src.packed.decode import plan_packed_decode
from jmoe.triton_src.packed.grouped_matmul import plan_packed_grouped_matmul
from jmoe.triton_src.plan import Plan
from jmoe.triton_src.portable.grouped_matmul import plan_grouped_matmul
from jmoe.triton_src.portable.shrink import plan_shrink
from jmoe.triton_src.problem import MoeProblem, Projection, RowTile
from jmoe.triton_src.routing.combine import plan_combine
from jmoe.triton_src.routing.plan import plan_routing
from jmoe.triton_src.tile_tables import own_table
from jmoe.triton_src.tiles import (
    DecodeTile,
    GroupedMatmulTile,
    GroupedTile,
    LaunchTable,
    bound_of,
    tile_for,
)

type LayerTile = GroupedMatmulTile | DecodeTile | GroupedTile


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
    tile = layer_tile(problem, capability, table, FOR_GRADIENTS if keep else FORWARD)
    return LAYERS[type(tile)](problem, tile, table, keep)


FORWARD = ("packed_decode", "packed_grouped_matmul")
"""Kernels of which one is enough for a forward pass on packed weights: each for its numbers of rows."""

FOR_GRADIENTS = ("packed_grouped_matmul",)
"""Of these the one that keeps what a gradient needs, and computes it again."""


def layer_tile(problem: MoeProblem, capability: int, table: LaunchTable, kernels: Sequence[str]) -> LayerTile:
    """The tile of a layer's products, of one of these kernels if the weights are packed.

    Raises:
      NotImplementedError: none of them reads packed weights on this GPU.
    """
    if not problem.packed:
        return tile_for(table.grouped_matmul, problem.rows_of_expert)
    tile = packed_tile(table, problem.rows_of_expert, kernels)
    if tile is None:
        raise NotImplementedError(
            f"packed MXFP4 weights are read on compute capability 9.0, got sm_{capability}: unpack them"
        )
    return tile


def packed_tile(table: LaunchTable, rows: float, kernels: Sequence[str] = FORWARD) -> DecodeTile | GroupedTile | None:
    """The tile of the one of these kernels that takes packed weights at so many rows an expert; None if none does.

    A section of the table is empty where its kernel does not run, and packed_decode's ends at its last bound.
    """
    if (
        "packed_decode" in kernels
        and reads_packed(table, "packed_decode")
        and rows <= bound_of(table.packed_decode[-1])
    ):
        return tile_for(table.packed_decode, rows)
    return tile_for(table.packed_grouped_matmul, rows) if reads_packed(table, "packed_grouped_matmul") else None


def reads_packed(table: LaunchTable, kernel: str) -> bool:
    """Whether packed_decode, packed_grouped_matmul or packed_dgrad runs on the table's GPU."""
    return bool(getattr(table, kernel))


def plan_decode_layer(problem: MoeProblem, tile: DecodeTile, table: LaunchTable, keep: bool) -> list[Plan]:
    """Both products and LoRA in one launch, from packed weights."""
    assert not keep
    return [
        *plan_routing(problem.routing(tile, interleave=True, counters=True, fetch=problem.fetch(tile)), table),
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


LAYERS: dict[type, Callable[[MoeProblem, Any, LaunchTable, bool], list[Plan]]] = {
    GroupedMatmulTile: plan_layer,
    GroupedTile: plan_packed_layer,
    DecodeTile: plan_decode_layer,
}
"""How a layer is planned, by the kind of its products' tile."""


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
