"""Routing of few tokens in one launch: one program chooses, counts, sorts and writes the tiles."""

import triton
import triton.language as tl

from jmoe.triton_src.plan import Plan, cdiv
from jmoe.triton_src.routing.problem import RouteProblem
from jmoe.triton_src.routing.side_work import do_side_work
from jmoe.triton_src.routing.sort_positions import count_earlier, write_tiles
from jmoe.triton_src.routing.top_k import at_columns, bytes_of_choices, chosen_columns, local_pairs
from jmoe.triton_src.tiles import LaunchTable, tile_for


@triton.jit(do_not_specialize=["rows", "tokens", "tiles_an_expert", "max_tiles", "reorder_programs"])
def route_few_kernel(
    logits_ptr,  # (T, COLUMNS) bf16 or float32, or None: experts are given
    choice_bias_ptr,  # (COLUMNS,) bf16 or float32, what is added to scores for the choice; or None
    expert_offset_ptr,  # (1,) int32, first expert of this shard; None: 0
    x_ptr,  # (T, K) bf16, or None
    words_ptr,  # as in prefetch_lines, or None
    scales_ptr,  # as in prefetch_lines, or None
    layer_ptr,  # as in prefetch_lines
    experts_ptr,  # (T, k) int32, written unless given
    weights_ptr,  # (T, k) float32; None where experts are given
    order_ptr,  # (P,) int32: position -> pair; positions past the local pairs' are not written
    tiles_ptr,  # as in write_tiles
    ready_counters_ptr,  # as in write_tiles
    x_in_mma_order_ptr,  # (T, K padded to 64) bf16, or None
    rows,
    tokens,
    tiles_an_expert,
    max_tiles,
    reorder_programs,
    COLUMNS: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    STRIPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_UNUSED: tl.constexpr,
    SCORING: tl.constexpr,  # jmoe.triton_src.scoring.Scoring
    K: tl.constexpr,
    REORDER_BLOCKS: tl.constexpr,
    MATRICES: tl.constexpr,
    BLOCKS: tl.constexpr,
    PREFETCHED_MATRICES: tl.constexpr,
    PREFETCHED_BLOCKS: tl.constexpr,
    LINES: tl.constexpr,
):
    """All of routing in the first program; the others do side work.

    Rows and columns are those of chosen_columns.
    """
    if tl.program_id(0) == 0:
        offset = 0 if expert_offset_ptr is None else tl.load(expert_offset_ptr)
        row = tl.arange(0, STRIPS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        GIVEN: tl.constexpr = logits_ptr is None
        CHOICES: tl.constexpr = 1 if GIVEN else TOP_K
        choice, used = chosen_columns(
            logits_ptr,
            choice_bias_ptr,
            experts_ptr,
            weights_ptr,
            offset,
            row,
            rows,
            COLUMNS,
            COLUMNS_PADDED,
            TOP_K,
            SCORING,
        )
        column = tl.arange(0, COLUMNS_PADDED)
        expert = column if GIVEN else column - offset
        local = (expert >= 0) & (expert < EXPERTS)
        earlier, count = count_earlier(choice >= 0, STRIPS)
        count = tl.where(local, count, 0)
        begin = tl.cumsum(count, axis=0) - count
        position = at_columns(begin, used) + bytes_of_choices(earlier, choice, CHOICES)
        pair, here = local_pairs(used, offset, row, rows, GIVEN, EXPERTS, CHOICES)
        tl.store(order_ptr + position, pair, mask=here)
        write_tiles(
            tiles_ptr,
            expert,
            begin,
            count,
            tiles_an_expert,
            max_tiles,
            ready_counters_ptr,
            0,
            1,
            BLOCK_M,
            BLOCK_TILES,
            BLOCK_UNUSED,
        )
    else:
        do_side_work(
            x_ptr, x_in_mma_order_ptr, words_ptr, scales_ptr, layer_ptr, tokens, tl.program_id(0) - 1,
            reorder_programs, K, REORDER_BLOCKS, MATRICES, BLOCKS, PREFETCHED_MATRICES, PREFETCHED_BLOCKS, LINES,
        )  # fmt: skip


STRIPS = 4

MOST_ROWS = 256
"""Of one program: count_earlier carries counts in bytes."""


def plan_route_few(problem: RouteProblem, table: LaunchTable) -> Plan:
    """All of routing, and x_in_mma_order if asked for."""
    p = problem
    tile = tile_for(table.route_few, p.rows_padded * p.columns_padded)
    side_work = tile_for(table.side_work, p.tokens)
    return Plan(
        kernel=route_few_kernel,
        grid=(1 + p.reorder_programs(side_work) + p.prefetch_programs(side_work),),
        operands=p.operands | p.sort_operands | p.prefetch_operands,
        scalars={
            "rows": p.rows,
            "tokens": p.tokens,
            "tiles_an_expert": cdiv(p.pairs, p.block_m),
            "max_tiles": p.max_tiles,
            "reorder_programs": p.reorder_programs(side_work),
        },
        outputs=p.choice_outputs | p.sort_outputs | p.reorder_outputs,
        constexprs={
            "COLUMNS": p.columns,
            "COLUMNS_PADDED": p.columns_padded,
            "EXPERTS": p.experts,
            "TOP_K": p.top_k,
            "STRIPS": STRIPS,
            "ROWS": p.rows_padded // STRIPS,
            "BLOCK_M": p.block_m,
            "BLOCK_TILES": tile.block_tiles,
            "BLOCK_UNUSED": tile.block_unused,
            **p.scoring_constexpr,
            **p.side_work_constexprs(side_work),
        },
        num_warps=tile.num_warps,
        bytes_accessed=p.choice_bytes + p.reorder_bytes,
    )
