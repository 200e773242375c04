"""Routing of few tokens in one launch: one program chooses, counts, sorts and writes the tiles."""

import triton
import triton.language as tl

from jmoe.triton_src.plan import Plan, cdiv, next_power_of_2
from jmoe.triton_src.routing.problem import RouteProblem
from jmoe.triton_src.routing.side_work import interleave_or_fetch
from jmoe.triton_src.routing.sort_positions import count_earlier, write_tiles
from jmoe.triton_src.routing.top_k import at_columns, bytes_of_choices, chosen_columns, held_pairs
from jmoe.triton_src.tiles import LaunchTable, tile_for


@triton.jit(do_not_specialize=["rows", "tokens", "tiles_an_expert", "slots", "interleave_programs"])
def route_few_kernel(
    logits_ptr,  # (T, COLUMNS) bf16 or float32, or None: experts are given
    expert_offset_ptr,  # (1,) int32, first expert held here; None: 0
    x_ptr,  # (T, K) bf16, or None
    words_ptr,  # as in fetch_lines, or None
    scales_ptr,  # as in fetch_lines, or None
    layer_ptr,  # as in fetch_lines
    experts_ptr,  # (T, k) int32, written unless given
    weights_ptr,  # (T, k) float32; None where experts are given
    order_ptr,  # (P,) int32: position -> pair; positions past the held pairs are not written
    tiles_ptr,  # as in write_tiles
    finished_ptr,  # as in write_tiles
    x_interleaved_ptr,  # (T, K padded to 64) bf16, or None
    rows,
    tokens,
    tiles_an_expert,
    slots,
    interleave_programs,
    COLUMNS: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    STRIPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    K: tl.constexpr,
    INTERLEAVE_BLOCKS: tl.constexpr,
    MATRICES: tl.constexpr,
    BLOCKS: tl.constexpr,
    FETCHED_MATRICES: tl.constexpr,
    FETCHED_BLOCKS: tl.constexpr,
    LINES: tl.constexpr,
):
    """All of routing in the first program; the others do what interleave_or_fetch does.

    Rows and columns are those of chosen_columns.
    """
    if tl.program_id(0) == 0:
        offset = 0 if expert_offset_ptr is None else tl.load(expert_offset_ptr)
        row = tl.arange(0, STRIPS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        GIVEN: tl.constexpr = logits_ptr is None
        CHOICES: tl.constexpr = 1 if GIVEN else TOP_K
        choice, used = chosen_columns(
            logits_ptr, experts_ptr, weights_ptr, offset, row, rows, COLUMNS, COLUMNS_PADDED, TOP_K
        )
        column = tl.arange(0, COLUMNS_PADDED)
        expert = column if GIVEN else column - offset
        held = (expert >= 0) & (expert < EXPERTS)
        earlier, count = count_earlier(choice >= 0, STRIPS)
        count = tl.where(held, count, 0)
        begin = tl.cumsum(count, axis=0) - count
        position = at_columns(begin, used) + bytes_of_choices(earlier, choice, CHOICES)
        pair, here = held_pairs(used, offset, row, rows, GIVEN, EXPERTS, CHOICES)
        tl.store(order_ptr + position, pair, mask=here)
        write_tiles(
            tiles_ptr,
            expert,
            begin,
            count,
            tiles_an_expert,
            slots,
            finished_ptr,
            0,
            1,
            BLOCK_M,
            BLOCK_TILES,
            BLOCK_SLOTS,
        )
    else:
        interleave_or_fetch(
            x_ptr, x_interleaved_ptr, words_ptr, scales_ptr, layer_ptr, tokens, tl.program_id(0) - 1,
            interleave_programs, K, INTERLEAVE_BLOCKS, MATRICES, BLOCKS, FETCHED_MATRICES, FETCHED_BLOCKS, LINES,
        )  # fmt: skip


STRIPS = 4

MOST_ROWS = 256
"""Of one program: count_earlier carries counts in bytes."""


def elements(problem: RouteProblem) -> int:
    """Rows times columns that one program of all rows holds in registers."""
    return padded_rows(problem) * problem.columns_padded


def padded_rows(problem: RouteProblem) -> int:
    """Rows of the block, a power of two."""
    return max(16, next_power_of_2(problem.rows))


def fits(problem: RouteProblem, table: LaunchTable) -> bool:
    """Whether one program routes all rows."""
    return padded_rows(problem) <= MOST_ROWS and elements(problem) <= table.route_few[-1].elements


def plan_route_few(problem: RouteProblem, table: LaunchTable) -> Plan:
    """All of routing, and x_interleaved if asked for."""
    p = problem
    tile, side_work = tile_for(table.route_few, elements(p)), tile_for(table.side_work, p.tokens)
    return Plan(
        kernel=route_few_kernel,
        grid=(1 + p.interleave_programs(side_work) + p.fetch_programs(side_work),),
        operands=p.operands | p.sort_operands | p.fetch_operands,
        scalars={
            "rows": p.rows,
            "tokens": p.tokens,
            "tiles_an_expert": cdiv(p.pairs, p.block_m),
            "slots": p.slots,
            "interleave_programs": p.interleave_programs(side_work),
        },
        outputs=p.choice_outputs | p.sort_outputs | p.interleave_outputs,
        constexprs={
            "COLUMNS": p.columns,
            "COLUMNS_PADDED": p.columns_padded,
            "EXPERTS": p.experts,
            "TOP_K": p.top_k,
            "STRIPS": STRIPS,
            "ROWS": padded_rows(p) // STRIPS,
            "BLOCK_M": p.block_m,
            "BLOCK_TILES": tile.block_tiles,
            "BLOCK_SLOTS": tile.block_slots,
            **p.side_work_constexprs(side_work),
        },
        num_warps=tile.num_warps,
        bytes_accessed=p.choice_bytes + p.interleave_bytes,
    )
