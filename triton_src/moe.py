"""The launches of one mixture-of-experts layer, in order. Both frameworks run this list; neither adds to it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jmoe.triton_src.combine import plan_combine
from jmoe.triton_src.grouped_matmul import plan_grouped_matmul
from jmoe.triton_src.interleave import interleaved_width
from jmoe.triton_src.lora import plan_shrink
from jmoe.triton_src.packed_few_rows import plan_packed_few_rows
from jmoe.triton_src.packed_many_rows import plan_packed_many_rows
from jmoe.triton_src.plan import Plan
from jmoe.triton_src.route_problem import RouteProblem, tile_slots
from jmoe.triton_src.routing import plan_routing
from jmoe.triton_src.tiles import PACKED_TILES, FewRowsTile, TileTables, choose_packed_tile, choose_tile


@dataclasses.dataclass(frozen=True)
class MoeProblem:
    """Everything a layer's launches depend on, apart from the GPU. Hashable."""

    tokens: int  # at least 1
    hidden: int
    intermediate: int
    experts: int  # held here
    top_k: int
    router_experts: int | None  # columns of the router's logits; None: experts and weights are given
    packed: bool  # both weights are packed MXFP4
    gate_up_mxfp4: bool
    down_mxfp4: bool
    gate_up_bias: bool
    down_bias: bool
    adapters: int  # 0 without LoRA
    gate_up_rank: int | None
    down_rank: int | None
    adapter_ids: bool
    expert_offset: bool
    swiglu_alpha: float
    swiglu_limit: float

    @classmethod
    def from_shapes(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        intermediate: int,
        packed: bool,
        top_k: int,
        swiglu_alpha: float,
        swiglu_limit: float,
    ) -> Self:
        """The problem posed by buffers of these names and shapes.

        x [T, H]; router_logits [T, E], or experts and weights [T, k]; gate_up and down, with gate_up_scales and
        down_scales if they are MXFP4; gate_up_bias, down_bias, gate_up_a, gate_up_b, gate_up_scale, down_a, down_b,
        down_scale, adapter_ids and expert_offset where there are any. Packed weights hide I, so it is named.
        """
        tokens, hidden = shapes["x"]
        scale = shapes.get("gate_up_scale", shapes.get("down_scale"))
        return cls(
            tokens=tokens,
            hidden=hidden,
            intermediate=intermediate,
            experts=shapes["gate_up"][0],
            top_k=top_k,
            router_experts=shapes["router_logits"][1] if "router_logits" in shapes else None,
            packed=packed,
            gate_up_mxfp4="gate_up_scales" in shapes,
            down_mxfp4="down_scales" in shapes,
            gate_up_bias="gate_up_bias" in shapes,
            down_bias="down_bias" in shapes,
            adapters=0 if scale is None else scale[0],
            gate_up_rank=shapes["gate_up_a"][2] if "gate_up_a" in shapes else None,
            down_rank=shapes["down_a"][2] if "down_a" in shapes else None,
            adapter_ids="adapter_ids" in shapes,
            expert_offset="expert_offset" in shapes,
            swiglu_alpha=swiglu_alpha,
            swiglu_limit=swiglu_limit,
        )

    def routing(self, block_m: int, interleave: bool) -> RouteProblem:
        """The layer's routing into tiles of block_m rows; `interleave`: with x in the order of packed weights."""
        return RouteProblem(
            tokens=self.tokens,
            top_k=self.top_k,
            experts=self.experts,
            router_experts=self.router_experts,
            expert_offset=self.expert_offset,
            block_m=block_m,
            hidden=self.hidden if interleave else None,
        )


def plan_moe(problem: MoeProblem, capability: int, tables: TileTables | None = None) -> list[Plan]:
    """The launches for a GPU of this compute capability (90 is 9.0), in order; the last one writes the buffer "y".

    tables: measured on that GPU, if there are any.

    Raises:
      NotImplementedError: the GPU is older than the kernels support, or none reads packed weights there.
    """
    p = problem
    pairs = p.tokens * p.top_k
    if p.packed:
        return plan_packed_moe(problem, capability, tables)
    tile = choose_tile(capability, pairs, p.experts, tables)
    slots = tile_slots(pairs, p.experts, tile.block_m)
    plans = plan_routing(problem.routing(tile.block_m, interleave=False))
    for projection in ("gate_up", "down"):
        gate_up = projection == "gate_up"
        n, k = (2 * p.intermediate, p.hidden) if gate_up else (p.hidden, p.intermediate)
        rank = p.gate_up_rank if gate_up else p.down_rank
        shared: dict[str, Any] = {
            "k": k,
            "slots": slots,
            "pairs": pairs,
            "top_k": p.top_k,
            "experts": p.experts,
            "adapters": p.adapters,
            "rank": rank,
            "adapter_ids": p.adapter_ids,
        }
        if rank is not None:
            plans.append(plan_shrink(projection, splits=tile.shrink_splits, tile_m=tile.block_m, **shared))
        plans.append(
            plan_grouped_matmul(
                projection,
                n=n,
                mxfp4=p.gate_up_mxfp4 if gate_up else p.down_mxfp4,
                bias=p.gate_up_bias if gate_up else p.down_bias,
                swiglu_alpha=p.swiglu_alpha,
                swiglu_limit=p.swiglu_limit,
                tile=tile,
                **shared,
            )
        )
    return [*plans, plan_sum(problem)]


def reads_packed(capability: int) -> bool:
    """Whether there are kernels that read packed weights on this GPU."""
    return capability in PACKED_TILES


def plan_packed_moe(problem: MoeProblem, capability: int, tables: TileTables | None = None) -> list[Plan]:
    """plan_moe for packed weights."""
    p = problem
    if not reads_packed(capability):
        raise NotImplementedError(
            f"packed MXFP4 weights are read on compute capability 9.0, got sm_{capability}: unpack them"
        )
    pairs = p.tokens * p.top_k
    tile = choose_packed_tile(capability, pairs, p.experts, tables)
    few = isinstance(tile, FewRowsTile)
    plans = plan_routing(problem.routing(tile.block_m, interleave=few))
    for projection in ("gate_up", "down"):
        gate_up = projection == "gate_up"
        n, k = (2 * p.intermediate, p.hidden) if gate_up else (p.hidden, p.intermediate)
        rank = p.gate_up_rank if gate_up else p.down_rank
        shared: dict[str, Any] = {
            "k": k,
            "slots": tile_slots(pairs, p.experts, tile.block_m),
            "pairs": pairs,
            "top_k": p.top_k,
            "experts": p.experts,
            "adapters": p.adapters,
            "rank": rank,
            "adapter_ids": p.adapter_ids,
        }
        if rank is not None:
            width = interleaved_width(k) if few and not gate_up else None
            plans.append(plan_shrink(projection, splits=tile.shrink_splits, tile_m=tile.block_m, width=width, **shared))
        shared |= {
            "n": n,
            "bias": p.gate_up_bias if gate_up else p.down_bias,
            "swiglu_alpha": p.swiglu_alpha,
            "swiglu_limit": p.swiglu_limit,
        }
        if isinstance(tile, FewRowsTile):
            plans.append(plan_packed_few_rows(projection, tile=tile, **shared))
        else:
            plans.append(plan_packed_many_rows(projection, tile=tile, **shared))
    return [*plans, plan_sum(problem)]


def plan_sum(problem: MoeProblem) -> Plan:
    """The layer's last launch."""
    p = problem
    return plan_combine(
        tokens=p.tokens,
        top_k=p.top_k,
        hidden=p.hidden,
        experts=p.experts,
        adapters=p.adapters,
        adapter_ids=p.adapter_ids,
        expert_offset=p.expert_offset,
    )
