"""The launches of one mixture-of-experts layer, in order. Both frameworks run this list; neither adds to it."""

import dataclasses
from collections.abc import Mapping
from typing import Self

from jmoe.triton_src.activation import SwiGLU
from jmoe.triton_src.packed.decode import plan_packed_decode
from jmoe.triton_src.packed.grouped_matmul import plan_packed_grouped_matmul
from jmoe.triton_src.plan import Plan, cdiv
from jmoe.triton_src.portable.grouped_matmul import plan_grouped_matmul
from jmoe.triton_src.portable.shrink import plan_shrink
from jmoe.triton_src.routing.combine import plan_combine
from jmoe.triton_src.routing.l2_prefetch import Fetch
from jmoe.triton_src.routing.plan import plan_routing
from jmoe.triton_src.routing.problem import RouteProblem, spread_slots, tile_slots
from jmoe.triton_src.stacked import ONE_LAYER, Stacked
from jmoe.triton_src.tile_tables import own_table
from jmoe.triton_src.tiles import (
    DecodeTile,
    GroupedMatmulTile,
    GroupedTile,
    LaunchTable,
    grouped_tile_for,
    packed_tile_for,
    tile_for,
)


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
    activation: SwiGLU
    stacked: Stacked = ONE_LAYER

    @classmethod
    def from_shapes(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        intermediate: int,
        packed: bool,
        top_k: int,
        activation: SwiGLU,
    ) -> Self:
        """The problem posed by buffers of these names and shapes.

        x [T, H]; router_logits [T, E], or experts and weights [T, k]; gate_up and down, with gate_up_scales and
        down_scales if they are MXFP4; gate_up_bias, down_bias, gate_up_a, gate_up_b, gate_up_scale, down_a, down_b,
        down_scale, adapter_ids and expert_offset where there are any. Packed weights hide I, so it is named. With layer
        [1] weights and biases, and LoRA or not, have a leading axis for layers.
        """
        tokens, hidden = shapes["x"]
        stacked = Stacked("layer" in shapes, any(len(shapes.get(name, ())) == 5 for name in ("gate_up_a", "down_a")))
        experts = shapes["gate_up"][1 if stacked.weights else 0]
        scale = shapes.get("gate_up_scale", shapes.get("down_scale"))
        return cls(
            tokens=tokens,
            hidden=hidden,
            intermediate=intermediate,
            experts=experts,
            top_k=top_k,
            router_experts=shapes["router_logits"][1] if "router_logits" in shapes else None,
            packed=packed,
            gate_up_mxfp4="gate_up_scales" in shapes,
            down_mxfp4="down_scales" in shapes,
            gate_up_bias="gate_up_bias" in shapes,
            down_bias="down_bias" in shapes,
            adapters=0 if scale is None else scale[-1],
            gate_up_rank=shapes["gate_up_a"][-2] if "gate_up_a" in shapes else None,
            down_rank=shapes["down_a"][-2] if "down_a" in shapes else None,
            adapter_ids="adapter_ids" in shapes,
            expert_offset="expert_offset" in shapes,
            activation=activation,
            stacked=stacked,
        )

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    @property
    def rows_of_expert(self) -> float:
        """On average, which most tiles are chosen by."""
        return self.pairs / self.experts

    def rank(self, projection: str) -> int | None:
        """LoRA's rank of "gate_up" or "down"; None without."""
        return self.gate_up_rank if projection == "gate_up" else self.down_rank

    def routing(
        self, block_m: int, *, interleave: bool = False, counters: bool = False, fetch: Fetch | None = None
    ) -> RouteProblem:
        """The layer's routing into tiles of block_m rows; see RouteProblem for what goes beside it."""
        return RouteProblem(
            tokens=self.tokens,
            top_k=self.top_k,
            experts=self.experts,
            router_experts=self.router_experts,
            expert_offset=self.expert_offset,
            block_m=block_m,
            hidden=self.hidden if interleave else None,
            counters=counters,
            fetch=fetch,
        )

    def fetch(self, tile: DecodeTile) -> Fetch:
        """What routing fetches of packed weights for the launch after it."""
        return Fetch(
            experts=self.experts,
            column_blocks=cdiv(2 * self.intermediate, 64),
            blocks=cdiv(self.hidden, 64),
            fetched_experts=min(self.experts, tile.prefetched_experts),
            fetched_blocks=min(cdiv(self.hidden, 64), tile.prefetched_blocks),
            stacked=self.stacked,
        )


def plan_moe(
    problem: MoeProblem, capability: int, table: LaunchTable | None = None, *, keep: bool = False
) -> list[Plan]:
    """The launches for a GPU of this compute capability (90 is 9.0), in order; the last one writes the buffer "y".

    table: its launch parameters; the package's for that compute capability if None.
    keep: also write "pre_activations" [P, 2I] by position, for the gradient.

    Raises:
      NotImplementedError: the GPU is older than the kernels support, or none reads packed weights there.
    """
    p = problem
    table = table or own_table(capability)
    tile = choose_layer_tile(problem, capability, table, keep)
    slots = tile_slots(p.pairs, p.experts, tile.block_m)
    if isinstance(tile, DecodeTile):
        return [
            *plan_routing(
                problem.routing(tile.block_m, interleave=True, counters=True, fetch=problem.fetch(tile)), table
            ),
            plan_packed_decode(
                hidden=p.hidden,
                intermediate=p.intermediate,
                slots=slots,
                spread=spread_slots(p.pairs, p.experts, tile.block_m),
                pairs=p.pairs,
                top_k=p.top_k,
                experts=p.experts,
                gate_up_bias=p.gate_up_bias,
                down_bias=p.down_bias,
                adapters=p.adapters,
                gate_up_rank=p.gate_up_rank,
                down_rank=p.down_rank,
                adapter_ids=p.adapter_ids,
                stacked=p.stacked,
                activation=p.activation,
                tile=tile,
            ),
            plan_sum("pair_out", "y", problem, table),
        ]
    if isinstance(tile, GroupedTile) and p.down_rank is None:
        return [
            *plan_routing(problem.routing(tile.block_m, counters=True), table),
            *plan_projections(("gate_up", "down"), problem, tile, table, slots, keep),
            plan_sum("pair_out", "y", problem, table),
        ]
    return [
        *plan_routing(problem.routing(tile.block_m), table),
        *plan_projection("gate_up", problem, tile, table, slots, keep),
        *plan_projection("down", problem, tile, table, slots),
        plan_sum("pair_out", "y", problem, table),
    ]


def choose_layer_tile(
    problem: MoeProblem, capability: int, table: LaunchTable, gradient: bool
) -> GroupedMatmulTile | DecodeTile | GroupedTile:
    """The tile of a layer's launches. For a gradient, packed weights go through packed_grouped_matmul alone."""
    rows = problem.rows_of_expert
    if not problem.packed:
        return tile_for(table.grouped_matmul, rows)
    if not reads_packed(capability):
        raise NotImplementedError(
            f"packed MXFP4 weights are read on compute capability 9.0, got sm_{capability}: unpack them"
        )
    return grouped_tile_for(table, rows) if gradient else packed_tile_for(table, rows)


def plan_projection(
    projection: str,
    problem: MoeProblem,
    tile: GroupedMatmulTile | GroupedTile,
    table: LaunchTable,
    slots: int,
    keep: bool = False,
) -> list[Plan]:
    """LoRA's shrink, if there is LoRA, and the product of "gate_up" or "down"."""
    p = problem
    if isinstance(tile, GroupedTile):
        return plan_projections((projection,), problem, tile, table, slots, keep)
    gate_up = projection == "gate_up"
    n, k = (2 * p.intermediate, p.hidden) if gate_up else (p.hidden, p.intermediate)
    product = plan_grouped_matmul(
        projection,
        n=n,
        k=k,
        slots=slots,
        pairs=p.pairs,
        top_k=p.top_k,
        experts=p.experts,
        mxfp4=p.gate_up_mxfp4 if gate_up else p.down_mxfp4,
        bias=p.gate_up_bias if gate_up else p.down_bias,
        adapters=p.adapters,
        rank=p.rank(projection),
        adapter_ids=p.adapter_ids,
        stacked=p.stacked,
        activation=p.activation,
        tile=tile,
        keep=keep,
    )
    return [*plan_shrink_before(projection, problem, tile, table, slots), product]


def plan_projections(
    projections: tuple[str, ...], problem: MoeProblem, tile: GroupedTile, table: LaunchTable, slots: int, keep: bool
) -> list[Plan]:
    """LoRA's shrink for the first of the projections, if that has LoRA, and their products from packed weights."""
    p = problem
    products = plan_packed_grouped_matmul(
        projections,
        hidden=p.hidden,
        intermediate=p.intermediate,
        slots=slots,
        pairs=p.pairs,
        top_k=p.top_k,
        experts=p.experts,
        biases=[name for name, bias in (("gate_up", p.gate_up_bias), ("down", p.down_bias)) if bias],
        adapters=p.adapters,
        ranks={"gate_up": p.gate_up_rank, "down": p.down_rank},
        adapter_ids=p.adapter_ids,
        stacked=p.stacked,
        activation=p.activation,
        tile=tile,
        keep=keep,
    )
    return [*plan_shrink_before(projections[0], problem, tile, table, slots), products]


def plan_shrink_before(
    projection: str, problem: MoeProblem, tile: GroupedMatmulTile | GroupedTile, table: LaunchTable, slots: int
) -> list[Plan]:
    """The shrink of what goes into a product, if that has LoRA."""
    if problem.rank(projection) is None:
        return []
    source = "x" if projection == "gate_up" else "activations"
    return [plan_shrink_of(source, f"{projection}_a", f"{projection}_shrunk", problem, tile, table, slots)]


def plan_shrink_of(
    source: str,
    matrix: str,
    out: str,
    problem: MoeProblem,
    tile: GroupedMatmulTile | GroupedTile,
    table: LaunchTable,
    slots: int,
) -> Plan:
    """plan_shrink of a layer's rows through one of its LoRA matrices, "gate_up_a" for example."""
    p = problem
    projection, part = matrix[:-2], matrix[-1]
    rank = p.rank(projection)
    assert rank is not None
    n, k = (2 * p.intermediate, p.hidden) if projection == "gate_up" else (p.hidden, p.intermediate)
    return plan_shrink(
        source,
        matrix,
        out,
        gather=source in ("x", "dy"),
        transposed=part == "b",
        k=k if part == "a" else n,
        slots=slots,
        pairs=p.pairs,
        top_k=p.top_k,
        experts=p.experts,
        adapters=p.adapters,
        rank=rank,
        adapter_ids=p.adapter_ids,
        stacked=p.stacked,
        splits=tile.shrink_splits,
        tile_m=tile.block_m,
        tile=tile_for(table.shrink, p.rows_of_expert),
    )


def reads_packed(capability: int) -> bool:
    """Whether there are kernels that read packed weights on this GPU."""
    return bool(own_table(capability).packed_grouped_matmul)


def plan_sum(source: str, out: str, problem: MoeProblem, table: LaunchTable, *, unknown_is_nan: bool = True) -> Plan:
    """The sum over each token's experts, a layer's last launch; NaN where a token's adapter does not exist."""
    p = problem
    return plan_combine(
        source,
        out,
        tokens=p.tokens,
        top_k=p.top_k,
        hidden=p.hidden,
        experts=p.experts,
        adapters=p.adapters,
        adapter_ids=p.adapter_ids and unknown_is_nan,
        expert_offset=p.expert_offset,
        tile=tile_for(table.combine, p.tokens),
    )
