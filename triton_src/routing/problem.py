"""What routing's launches depend on, and what they have in common."""

import dataclasses

from jmoe.triton_src.plan import Buffer, cdiv, next_power_of_2
from jmoe.triton_src.routing.l2_prefetch import Prefetch
from jmoe.triton_src.routing.mma_k_order import mma_k_width
from jmoe.triton_src.tiles import SideWorkTile

SMALLEST_BLOCK = 16
"""Rows or columns that the kernels' blocks have at least; they are padded to powers of two."""


@dataclasses.dataclass(frozen=True)
class RouteProblem:
    """One layer's routing."""

    tokens: int
    top_k: int
    experts: int  # of this shard
    router_experts: int | None  # columns of the router's logits; None: experts and weights are given
    expert_offset: bool
    block_m: int  # rows of a tile
    hidden: int | None  # of x, if it is to be put into mma K order
    counters: bool = False  # a zero for each tile and one beside, where programs of a launch wait for others
    prefetch: Prefetch | None = None  # weights to fetch meanwhile
    pairs: int = dataclasses.field(init=False)
    rows: int = dataclasses.field(init=False)  # tokens, or pairs where experts are given
    columns: int = dataclasses.field(init=False)  # the router's, or this shard's experts where experts are given
    rows_padded: int = dataclasses.field(init=False)  # to those of a kernel's block, as columns_padded
    columns_padded: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        pairs = self.tokens * self.top_k
        rows = pairs if self.router_experts is None else self.tokens
        columns = self.experts if self.router_experts is None else self.router_experts
        vars(self).update(
            pairs=pairs,
            rows=rows,
            columns=columns,
            rows_padded=next_power_of_2(max(rows, SMALLEST_BLOCK)),
            columns_padded=next_power_of_2(max(columns, SMALLEST_BLOCK)),
        )

    @property
    def max_tiles(self) -> int:
        return max_tiles(self.pairs, self.experts, self.block_m)

    @property
    def operands(self) -> dict[str, str | None]:
        """What choice and reordering read, and None for what they do not write either."""
        given = self.router_experts is None
        operands = {
            "logits_ptr": None if given else "router_logits",
            "expert_offset_ptr": "expert_offset" if self.expert_offset else None,
            "x_ptr": None if self.hidden is None else "x",
        }
        if given:
            operands |= {"experts_ptr": "experts", "weights_ptr": None}
        return operands if self.hidden is not None else operands | {"x_in_mma_order_ptr": None}

    @property
    def choice_outputs(self) -> dict[str, Buffer]:
        if self.router_experts is None:
            return {}
        return {
            "experts_ptr": Buffer("experts", (self.tokens, self.top_k), "int32"),
            "weights_ptr": Buffer("weights", (self.tokens, self.top_k), "float32"),
        }

    @property
    def sort_outputs(self) -> dict[str, Buffer]:
        outputs = {
            "order_ptr": Buffer("order", (self.pairs,), "int32"),
            "tiles_ptr": Buffer("tiles", (self.max_tiles, 3), "int32"),
        }
        if self.counters:
            outputs["ready_counters_ptr"] = Buffer("ready_counters", (self.max_tiles + 1,), "int32")
        return outputs

    @property
    def sort_operands(self) -> dict[str, str | None]:
        """None for what sorting does not write."""
        return {} if self.counters else {"ready_counters_ptr": None}

    @property
    def reorder_outputs(self) -> dict[str, Buffer]:
        if self.hidden is None:
            return {}
        shape = (self.tokens, mma_k_width(self.hidden))
        return {"x_in_mma_order_ptr": Buffer("x_in_mma_order", shape, "bfloat16")}

    def reorder_programs(self, tile: SideWorkTile) -> int:
        if self.hidden is None:
            return 0
        return cdiv(self.tokens * mma_k_width(self.hidden), 64 * tile.reorder_blocks)

    def prefetch_programs(self, tile: SideWorkTile) -> int:
        return 0 if self.prefetch is None else self.prefetch.programs(tile.prefetch_lines)

    @property
    def prefetch_operands(self) -> dict[str, str | None]:
        return (
            dict.fromkeys(("words_ptr", "scales_ptr", "layer_ptr")) if self.prefetch is None else self.prefetch.operands
        )

    def side_work_constexprs(self, tile: SideWorkTile) -> dict[str, int]:
        constexprs = {"MATRICES": 1, "BLOCKS": 1, "PREFETCHED_MATRICES": 0, "PREFETCHED_BLOCKS": 1}
        if self.prefetch is not None:
            constexprs = self.prefetch.constexprs
        blocks = {"K": self.hidden or 64, "REORDER_BLOCKS": tile.reorder_blocks}
        return blocks | constexprs | {"LINES": tile.prefetch_lines}

    @property
    def choice_bytes(self) -> int:
        return self.tokens * (4 * self.columns + 8 * self.top_k) + 12 * self.max_tiles

    @property
    def reorder_bytes(self) -> int:
        return 0 if self.hidden is None else 2 * self.tokens * (self.hidden + mma_k_width(self.hidden))


def max_tiles(pairs: int, experts: int, block_m: int) -> int:
    """The most tiles of block_m rows that `pairs` rows of at most `experts` experts can need."""
    active = min(pairs, experts)
    return (pairs - active) // block_m + active


def first_wave_tiles(pairs: int, experts: int, block_m: int) -> int:
    """Tiles that have programs of their own; those past them are extra work for the first ones'.

    Where experts mostly have one tile few tiles are used beyond one an expert, and programs without work cost time.
    """
    active = min(pairs, experts)
    return active if 2 * pairs <= active * block_m else max_tiles(pairs, experts, block_m)
