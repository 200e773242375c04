"""The launches of a layer's gradient, in order. Both frameworks run this list; neither adds to it.

Names: dy is the gradient of y; a gradient of buffer B is B_grad. Kept from the forward pass are the inputs, the routing
(experts, weights) and pre_activations, or these are computed again.
"""

from collections.abc import Collection, Mapping
from typing import Any

from jmoe.triton_src.moe import MoeProblem, choose_layer_tile, plan_projection, plan_shrink_of, plan_sum
from jmoe.triton_src.packed.dgrad import plan_packed_dgrad
from jmoe.triton_src.plan import Plan
from jmoe.triton_src.portable.dgrad import plan_dgrad
from jmoe.triton_src.portable.swiglu_backward import plan_swiglu_backward
from jmoe.triton_src.portable.weight_grad import plan_bias_grad, plan_lora_grad
from jmoe.triton_src.routing.backward import plan_route_backward
from jmoe.triton_src.routing.plan import plan_routing
from jmoe.triton_src.routing.problem import tile_slots
from jmoe.triton_src.tile_tables import own_table
from jmoe.triton_src.tiles import DecodeTile, GroupedMatmulTile, GroupedTile, LaunchTable, tile_for


def plan_moe_backward(
    problem: MoeProblem,
    wanted: Mapping[str, str],
    router_experts: int | None,
    kept: bool,
    capability: int,
    table: LaunchTable | None = None,
) -> list[Plan]:
    """The launches for a GPU of this compute capability, in order, which write f"{name}_grad" of what is wanted.

    They read dy, which is zero for tokens whose adapter does not exist.

    problem: of the layer with experts and weights given, as the forward pass chose them.
    wanted: name -> dtype of the gradient, of x, router_logits or weights, gate_up_a and so on, gate_up_bias, down_bias.
    router_experts: columns of the router's logits, or None if their gradient is not asked for.
    kept: pre_activations [P, 2I] are given; else they are computed again.

    Raises:
      NotImplementedError: as plan_moe.
    """
    p = problem
    table = table or own_table(capability)
    tile = choose_layer_tile(p, capability, table, gradient=True)
    assert not isinstance(tile, DecodeTile)
    slots = tile_slots(p.pairs, p.experts, tile.block_m)
    # A dtype is asked for what is wanted; what is not is left out below.
    dtype = {f"{projection}_{part}": "float32" for projection in ("gate_up", "down") for part in ("a", "b", "bias")}
    dtype |= {"router_logits": "float32", **wanted}

    def weight_gradients(projection: str, wide: str, grad: str) -> list[Plan]:
        """Of A and B, from the rows that went into the product and the gradient of what came out of it."""
        rank = p.rank(projection)
        if rank is None:
            return []
        n, k = (2 * p.intermediate, p.hidden) if projection == "gate_up" else (p.hidden, p.intermediate)
        shared: dict[str, Any] = {
            "slots": slots,
            "pairs": p.pairs,
            "top_k": p.top_k,
            "experts": p.experts,
            "adapters": p.adapters,
            "rank": rank,
            "adapter_ids": p.adapter_ids,
            "splits": tile.shrink_splits,
            "tile": tile_for(table.lora_grad, p.rows_of_expert),
        }
        a, b, again = f"{projection}_a", f"{projection}_b", f"{projection}_shrunk_again"
        return [
            plan_lora_grad(
                f"{a}_grad", wide, f"{projection}_grad_shrunk",
                dtype=dtype[a], gather=wide == "x", transposed=False, k=k, **shared,
            ),
            plan_shrink_of(wide, a, again, p, tile, table, slots),
            plan_lora_grad(
                f"{b}_grad", grad, again, dtype=dtype[b], gather=grad == "dy", transposed=True, k=n, **shared
            ),
        ]  # fmt: skip

    plans = plan_routing(p.routing(tile.block_m), table)
    if not kept:
        plans += plan_projection("gate_up", p, tile, table, slots, keep=True)
    plans += [
        *plan_input_gradient("down", p, tile, table, slots),
        plan_swiglu_backward(
            hidden=p.hidden,
            intermediate=p.intermediate,
            pairs=p.pairs,
            slots=slots,
            tile_m=tile.block_m,
            top_k=p.top_k,
            experts=p.experts,
            bias=p.down_bias,
            stacked=p.stacked,
            activation=p.activation,
            tile=tile_for(table.swiglu_backward, p.rows_of_expert),
        ),
        plan_route_backward(
            tokens=p.tokens,
            top_k=p.top_k,
            experts=p.experts,
            router_experts=router_experts,
            dtype=dtype["router_logits"],
            expert_offset=p.expert_offset,
            tile=tile_for(table.route_backward, p.tokens),
        ),
        *weight_gradients("down", "weighted_activations", "dy"),
        *plan_input_gradient("gate_up", p, tile, table, slots),
        *weight_gradients("gate_up", "x", "pre_activations_grad"),
    ]
    for projection, n in (("gate_up", 2 * p.intermediate), ("down", p.hidden)):
        bias_dtype = dtype[f"{projection}_bias"]
        plans.append(
            plan_bias_grad(
                projection,
                dtype=bias_dtype,
                n=n,
                slots=slots,
                pairs=p.pairs,
                top_k=p.top_k,
                experts=p.experts,
                tile=tile_for(table.bias_grad, p.rows_of_expert),
            )
        )
    plans.append(plan_sum("pair_dx", "x_grad", p, table, unknown_is_nan=False))
    return needed(plans, {f"{name}_grad" for name in wanted})


def plan_input_gradient(
    projection: str, problem: MoeProblem, tile: GroupedMatmulTile | GroupedTile, table: LaunchTable, slots: int
) -> list[Plan]:
    """LoRA's shrink of the gradient through B, if there is LoRA, and the product with the weights."""
    p = problem
    gate_up = projection == "gate_up"
    rank = p.rank(projection)
    plans = []
    if rank is not None:
        source = "pre_activations_grad" if gate_up else "dy"
        plans.append(plan_shrink_of(source, f"{projection}_b", f"{projection}_grad_shrunk", p, tile, table, slots))
    n, k = (2 * p.intermediate, p.hidden) if gate_up else (p.hidden, p.intermediate)
    shared: dict[str, Any] = {
        "n": n,
        "k": k,
        "slots": slots,
        "pairs": p.pairs,
        "top_k": p.top_k,
        "experts": p.experts,
        "adapters": p.adapters,
        "rank": rank,
        "adapter_ids": p.adapter_ids,
        "stacked": p.stacked,
    }
    if isinstance(tile, GroupedTile):
        dgrad_tile = tile_for(table.packed_dgrad, tile.block_m)
        return [*plans, plan_packed_dgrad(projection, routed=tile, tile=dgrad_tile, **shared)]
    mxfp4 = p.gate_up_mxfp4 if gate_up else p.down_mxfp4
    return [
        *plans,
        plan_dgrad(projection, mxfp4=mxfp4, routed=tile, tile=tile_for(table.dgrad, p.rows_of_expert), **shared),
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
