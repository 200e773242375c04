"""What routing's launches depend on, and what they have in common."""

import dataclasses

from jmoe.triton_src.plan import Buffer, cdiv, next_power_of_2
from jmoe.triton_src.routing.l2_prefetch import Fetch
from jmoe.triton_src.routing.mma_k_order import interleaved_width
from jmoe.triton_src.tiles import SideWorkTile


@dataclasses.dataclass(frozen=True)
class RouteProblem:
    """One layer's routing."""

    tokens: int
    top_k: int
    experts: int  # held here
    router_experts: int | None  # columns of the router's logits; None: experts and weights are given
    expert_offset: bool
    block_m: int  # rows of a tile
    hidden: int | None  # of x, if it is to be interleaved
    counters: bool = False  # a zero for each tile, where programs of a launch wait for others
    fetch: Fetch | None = None  # weights to fetch meanwhile

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    @property
    def rows(self) -> int:
        """Tokens, or pairs where experts are given."""
        return self.pairs if self.router_experts is None else self.tokens

    @property
    def columns(self) -> int:
        """The router's experts, or those held here where experts are given."""
        return self.experts if self.router_experts is None else self.router_experts

    @property
    def columns_padded(self) -> int:
        return padded_experts(self.columns)

    @property
    def slots(self) -> int:
        return tile_slots(self.pairs, self.experts, self.block_m)

    @property
    def operands(self) -> dict[str, str | None]:
        """What choice and interleaving read, and None for what they do not write either."""
        given = self.router_experts is None
        operands = {
            "logits_ptr": None if given else "router_logits",
            "expert_offset_ptr": "expert_offset" if self.expert_offset else None,
            "x_ptr": None if self.hidden is None else "x",
        }
        if given:
            operands |= {"experts_ptr": "experts", "weights_ptr": None}
        return operands if self.hidden is not None else operands | {"x_interleaved_ptr": None}

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
            "tiles_ptr": Buffer("tiles", (self.slots, 3), "int32"),
        }
        if self.counters:
            outputs["finished_ptr"] = Buffer("finished", (self.slots,), "int32")
        return outputs

    @property
    def sort_operands(self) -> dict[str, str | None]:
        """None for what sorting does not write."""
        return {} if self.counters else {"finished_ptr": None}

    @property
    def interleave_outputs(self) -> dict[str, Buffer]:
        if self.hidden is None:
            return {}
        shape = (self.tokens, interleaved_width(self.hidden))
        return {"x_interleaved_ptr": Buffer("x_interleaved", shape, "bfloat16")}

    def interleave_programs(self, tile: SideWorkTile) -> int:
        if self.hidden is None:
            return 0
        return cdiv(self.tokens * interleaved_width(self.hidden), 64 * tile.interleave_blocks)

    def fetch_programs(self, tile: SideWorkTile) -> int:
        return 0 if self.fetch is None else self.fetch.programs(tile.prefetch_lines)

    @property
    def fetch_operands(self) -> dict[str, str | None]:
        return dict.fromkeys(("words_ptr", "scales_ptr", "layer_ptr")) if self.fetch is None else self.fetch.operands

    def side_work_constexprs(self, tile: SideWorkTile) -> dict[str, int]:
        constexprs = {"MATRICES": 1, "BLOCKS": 1, "FETCHED_MATRICES": 0, "FETCHED_BLOCKS": 1}
        if self.fetch is not None:
            constexprs = self.fetch.constexprs
        blocks = {"K": self.hidden or 64, "INTERLEAVE_BLOCKS": tile.interleave_blocks}
        return blocks | constexprs | {"LINES": tile.prefetch_lines}

    @property
    def choice_bytes(self) -> int:
        return self.tokens * (4 * self.columns + 8 * self.top_k) + 12 * self.slots

    @property
    def interleave_bytes(self) -> int:
        return 0 if self.hidden is None else 2 * self.tokens * (self.hidden + interleaved_width(self.hidden))


def padded_experts(experts: int) -> int:
    """Columns of the kernels' blocks: a power of two, at least 16."""
    return max(16, next_power_of_2(experts))


def tile_slots(pairs: int, experts: int, block_m: int) -> int:
    """The most tiles of block_m rows that `pairs` rows of at most `experts` experts can need."""
    active = min(pairs, experts)
    return (pairs - active) // block_m + active


def spread_slots(pairs: int, experts: int, block_m: int) -> int:
    """Tiles that have programs of their own; those past them are extra work for the first ones'.

    Where experts mostly have one tile few slots are used beyond one an expert, and programs without work cost time.
    """
    active = min(pairs, experts)
    return active if 2 * pairs <= active * block_m else tile_slots(pairs, experts, block_m)
