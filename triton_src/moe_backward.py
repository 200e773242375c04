"""The launches of a layer's gradient, in order. Both frameworks run this list; neither adds to it.

Names: dy is the gradient of y; a gradient of buffer B is B_grad. Kept from the forward pass are the inputs, the routing
(experts, weights) and pre_activations, or these are computed again.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from jmoe.triton_src.moe import no_packed_kernel, plan_product, plan_sum
from jmoe.triton_src.packed.dgrad import plan_packed_dgrad
from jmoe.triton_src.plan import Plan
from jmoe.triton_src.portable.dgrad import plan_dgrad
from jmoe.triton_src.portable.shrink import plan_shrink
from jmoe.triton_src.portable.swiglu_backward import plan_swiglu_backward
from jmoe.triton_src.portable.weight_grad import plan_bias_grad, plan_lora_grad
from jmoe.triton_src.problem import MoeProblem, Projection, RowTile
from jmoe.triton_src.routing.backward import plan_route_backward
from jmoe.triton_src.routing.plan import plan_routing
from jmoe.triton_src.tile_tables import own_table
from jmoe.triton_src.tiles import GroupedMatmulTile, GroupedTile, LaunchTable, layer_tile, tile_for


def plan_moe_backward(
    problem: MoeProblem,
    wanted: Mapping[str, str],
    kept: bool,
    capability: int,
    table: LaunchTable | None = None,
) -> list[Plan]:
    """The launches for a GPU of this compute capability, in order, which write f"{name}_grad" of what is wanted.

    They read dy, which is zero for tokens whose adapter does not exist.

    problem: of the forward pass, whose experts and weights are given.
    wanted: name -> dtype of the gradient, of x, router_logits or weights, gate_up_a and so on, gate_up_bias, down_bias.
    kept: pre_activations [P, 2I] are given; else they are computed again.

    Raises:
      NotImplementedError: as plan_moe.
    """
    p = problem
    table = table or own_table(capability)
    rows = p.rows_of_expert
    routed: Any = layer_tile(table, rows, packed=p.packed, gradient=True)
    if routed is None:
        raise no_packed_kernel(capability)
    # A dtype is asked for what is wanted; what is not is left out below.
    dtypes = {f"{product.name}_{part}": "float32" for product in (p.gate_up, p.down) for part in ("a", "b", "bias")}
    dtypes |= {"router_logits": "float32", **wanted}
    plans = plan_routing(p.routing(routed, replay=True), table)
    if not kept:
        plans += plan_product(p.gate_up, p, routed, table, keep=True)
    plans += [
        *plan_input_gradient(p.down, p, routed, table),
        plan_swiglu_backward(p, tile_for(table.swiglu_backward, rows), routed),
        plan_route_backward(p, tile_for(table.route_backward, p.tokens), dtypes["router_logits"]),
        *plan_lora_gradients(p.down, "weighted_activations", "dy", p, routed, table, dtypes),
        *plan_input_gradient(p.gate_up, p, routed, table),
        *plan_lora_gradients(p.gate_up, "x", "pre_activations_grad", p, routed, table, dtypes),
    ]
    for product in (p.gate_up, p.down):
        tile = tile_for(table.bias_grad, rows)
        plans.append(plan_bias_grad(product, p, tile, routed, dtypes[f"{product.name}_bias"]))
    plans.append(plan_sum("pair_dx", "x_grad", p, table, unknown_is_nan=False))
    return needed(plans, {f"{name}_grad" for name in wanted})


def plan_dgrad_of_tile(product: Projection, problem: MoeProblem, table: LaunchTable, routed: GroupedMatmulTile) -> Plan:
    """plan_dgrad with the table's tile."""
    return plan_dgrad(product, problem, tile_for(table.dgrad, problem.rows_of_expert), routed)


def plan_packed_dgrad_of_tile(
    product: Projection, problem: MoeProblem, table: LaunchTable, routed: GroupedTile
) -> Plan:
    """plan_packed_dgrad with the table's tile."""
    return plan_packed_dgrad(product, problem, tile_for(table.packed_dgrad, routed.block_m), routed)


DGRADS: dict[type, Callable[[Projection, MoeProblem, LaunchTable, Any], Plan]] = {
    GroupedMatmulTile: plan_dgrad_of_tile,
    GroupedTile: plan_packed_dgrad_of_tile,
}
"""How the gradient of a product in its rows is planned, by the kind of tile that these are sorted into."""


def plan_input_gradient(product: Projection, problem: MoeProblem, routed: RowTile, table: LaunchTable) -> list[Plan]:
    """LoRA's shrink of the gradient through B, if there is LoRA, and the product with the weights."""
    plans = []
    if product.rank is not None:
        source = "pre_activations_grad" if product.is_gate_up else "dy"
        tile = tile_for(table.shrink, problem.rows_of_expert)
        plans.append(plan_shrink(source, "b", f"{product.name}_grad_shrunk", product, problem, tile, routed))
    return [*plans, DGRADS[type(routed)](product, problem, table, routed)]


def plan_lora_gradients(
    product: Projection,
    wide: str,
    grad: str,
    problem: MoeProblem,
    routed: RowTile,
    table: LaunchTable,
    dtypes: Mapping[str, str],
) -> list[Plan]:
    """Of A and B, from the rows that went into the product and the gradient of what came out of it."""
    if product.rank is None:
        return []
    rows, name = problem.rows_of_expert, product.name
    tile, again = tile_for(table.lora_grad, rows), f"{name}_shrunk_again"
    return [
        plan_lora_grad("a", wide, f"{name}_grad_shrunk", product, problem, tile, routed, dtypes[f"{name}_a"]),
        plan_shrink(wide, "a", again, product, problem, tile_for(table.shrink, rows), routed),
        plan_lora_grad("b", grad, again, product, problem, tile, routed, dtypes[f"{name}_b"]),
    ]


def needed(plans: list[Plan], wanted: Collection[str]) -> list[Plan]:
    """The launches, in order, that lead to a wanted buffer."""
    reads = set(wanted)
    kept = []
    for plan in reversed(plans):
        if any(buffer.name in reads for buffer in plan.outputs.values()):
            kept.append(plan)
            reads |= {name for name in plan.operands.values() if name is not None}
    return kept[::-1]
