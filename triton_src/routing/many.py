"""Routing of many tokens in two launches: count chooses and counts by runs of rows, sort adds the counts up.

Everything is integer arithmetic on prefix counts, so the order is stable and two runs agree bit for bit.
"""

import triton
import triton.language as tl

from jmoe.triton_src.plan import Buffer, Plan, cdiv, next_power_of_2
from jmoe.triton_src.routing.problem import SMALLEST_BLOCK, RouteProblem
from jmoe.triton_src.routing.side_work import do_side_work
from jmoe.triton_src.routing.sort_positions import count_earlier, write_tiles
from jmoe.triton_src.routing.top_k import at_columns, bytes_of_choices, chosen_columns, local_pairs
from jmoe.triton_src.tiles import LaunchTable, tile_for


@triton.jit(do_not_specialize=["rows", "tokens", "programs", "reorder_programs"])
def count_kernel(
    logits_ptr,  # (T, COLUMNS) bf16 or float32, or None: experts are given
    choice_bias_ptr,  # (COLUMNS,) bf16 or float32, what is added to scores for the choice; or None
    expert_offset_ptr,  # (1,) int32, first expert of this shard; None: 0
    x_ptr,  # (T, K) bf16, or None
    words_ptr,  # as in prefetch_lines, or None
    scales_ptr,  # as in prefetch_lines, or None
    layer_ptr,  # as in prefetch_lines
    experts_ptr,  # (T, k) int32, written unless given
    weights_ptr,  # (T, k) float32; None where experts are given
    positions_in_run_ptr,  # (P,) int32: earlier pairs of the program with the same expert; of this shard's pairs alone
    counts_ptr,  # (programs, E) int32: pairs of each expert of this shard
    x_in_mma_order_ptr,  # (T, K padded to 64) bf16, or None
    rows,
    tokens,
    programs,
    reorder_programs,
    COLUMNS: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    STRIPS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    SCORING: tl.constexpr,  # jmoe.triton_src.scoring.Scoring
    K: tl.constexpr,
    REORDER_BLOCKS: tl.constexpr,
    MATRICES: tl.constexpr,
    BLOCKS: tl.constexpr,
    PREFETCHED_MATRICES: tl.constexpr,
    PREFETCHED_BLOCKS: tl.constexpr,
    LINES: tl.constexpr,
):
    """Each of the first `programs` programs takes a run of STEPS blocks of STRIPS * ROWS rows.

    The others do side work.

    Rows and columns are those of chosen_columns.
    """
    program = tl.program_id(0)
    if program < programs:
        offset = 0 if expert_offset_ptr is None else tl.load(expert_offset_ptr)
        column = tl.arange(0, COLUMNS_PADDED)
        expert = column if logits_ptr is None else column - offset
        local = (expert >= 0) & (expert < EXPERTS)
        counts = tl.zeros((COLUMNS_PADDED,), tl.int32)
        GIVEN: tl.constexpr = logits_ptr is None
        CHOICES: tl.constexpr = 1 if GIVEN else TOP_K
        in_block = tl.arange(0, STRIPS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        for step in range(STEPS):
            row = (program * STEPS + step) * STRIPS * ROWS + in_block
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
            earlier, count = count_earlier(choice >= 0, STRIPS)
            position_in_run = bytes_of_choices(earlier, choice, CHOICES)
            if STEPS > 1:
                position_in_run += at_columns(counts, used)
            pair, here = local_pairs(used, offset, row, rows, GIVEN, EXPERTS, CHOICES)
            tl.store(positions_in_run_ptr + pair, position_in_run, mask=here)
            counts += count
        mine = counts_ptr + program * EXPERTS
        tl.store(mine + expert, counts, mask=local)
        if logits_ptr is not None:
            # Experts of this shard that the router does not know.
            for start in tl.static_range(0, EXPERTS, COLUMNS_PADDED):
                unknown = start + column
                known = (unknown + offset >= 0) & (unknown + offset < COLUMNS)
                tl.store(mine + unknown, 0, mask=(unknown < EXPERTS) & (known == 0))
    else:
        do_side_work(
            x_ptr, x_in_mma_order_ptr, words_ptr, scales_ptr, layer_ptr, tokens, program - programs,
            reorder_programs, K, REORDER_BLOCKS, MATRICES, BLOCKS, PREFETCHED_MATRICES, PREFETCHED_BLOCKS, LINES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pairs", "programs", "tiles_an_expert", "max_tiles"])
def sort_kernel(
    experts_ptr,  # (P,) int32
    expert_offset_ptr,  # (1,) int32, or None
    positions_in_run_ptr,  # (P,) int32, of count
    counts_ptr,  # (programs, E) int32, of count
    order_ptr,  # (P,) int32: position -> pair; positions past the local pairs' are not written
    tiles_ptr,  # as in write_tiles
    ready_counters_ptr,  # as in write_tiles
    pairs,
    programs,
    tiles_an_expert,
    max_tiles,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COUNT_BLOCKS: tl.constexpr,
    BLOCK_COUNTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_UNUSED: tl.constexpr,
):
    """Positions of the pairs, sorted by expert and stable, and the tiles.

    Grid: (programs,), each with the run of RUN pairs that it had in count.
    """
    program = tl.program_id(0)
    bins = tl.arange(0, EXPERTS_PADDED)
    offset = 0 if expert_offset_ptr is None else tl.load(expert_offset_ptr)
    end = tl.minimum((program + 1) * RUN, pairs)
    pair = program * RUN + tl.arange(0, BLOCK_P)
    # Loaded before the counts are added up, and each later block before the one before it is written.
    expert = tl.load(experts_ptr + pair, mask=pair < end, other=0) - offset
    position_in_run = tl.load(positions_in_run_ptr + pair, mask=pair < end, other=0)

    # Added up within each thread first: a sum over threads is a barrier.
    totals = tl.zeros((BLOCK_COUNTS, EXPERTS_PADDED), tl.int32)
    befores = tl.zeros((BLOCK_COUNTS, EXPERTS_PADDED), tl.int32)
    for block in tl.static_range(COUNT_BLOCKS):
        other = block * BLOCK_COUNTS + tl.arange(0, BLOCK_COUNTS)[:, None]
        counts = tl.load(
            counts_ptr + other * EXPERTS + bins[None, :],
            mask=(other < programs) & (bins < EXPERTS)[None, :],
            other=0,
        )
        totals += counts
        befores += tl.where(other < program, counts, 0)
    total = tl.sum(totals, axis=0)
    before = tl.sum(befores, axis=0)
    begin = tl.cumsum(total, axis=0) - total

    first = begin + before
    for _ in range(0, RUN, BLOCK_P):
        next_pair = pair + BLOCK_P
        next_expert = tl.load(experts_ptr + next_pair, mask=next_pair < end, other=0) - offset
        next_position_in_run = tl.load(positions_in_run_ptr + next_pair, mask=next_pair < end, other=0)
        local = (pair < end) & (expert >= 0) & (expert < EXPERTS)
        position = tl.gather(first, tl.where(local, expert, 0), axis=0) + position_in_run
        tl.store(order_ptr + position, pair, mask=local)
        pair, expert, position_in_run = next_pair, next_expert, next_position_in_run
    write_tiles(
        tiles_ptr,
        bins,
        begin,
        total,
        tiles_an_expert,
        max_tiles,
        ready_counters_ptr,
        program,
        programs,
        BLOCK_M,
        BLOCK_TILES,
        BLOCK_UNUSED,
    )


STRIPS = 4


def plan_route_many(problem: RouteProblem, table: LaunchTable) -> list[Plan]:
    """count and sort, and x_in_mma_order if asked for."""
    p = problem
    tile = tile_for(table.count_pairs if p.router_experts is None else table.count, p.columns_padded)
    sort_tile, side_work = tile_for(table.sort, p.pairs), tile_for(table.side_work, p.tokens)
    block_rows = max(STRIPS, min(tile.block_rows, tile.largest_block // p.columns_padded))
    experts_padded = next_power_of_2(max(p.experts, SMALLEST_BLOCK))
    steps = cdiv(p.rows, block_rows * tile.most_programs)
    programs = cdiv(p.rows, block_rows * steps)
    counted = {
        "positions_in_run_ptr": Buffer("positions_in_run", (p.pairs,), "int32"),
        "counts_ptr": Buffer("counts", (programs, p.experts), "int32"),
    }
    run = block_rows * steps * p.pairs // p.rows
    most_counts = max(8, sort_tile.block_counts // experts_padded)
    block_counts = min(tile.most_programs, most_counts, next_power_of_2(programs))
    count = Plan(
        kernel=count_kernel,
        grid=(programs + p.reorder_programs(side_work) + p.prefetch_programs(side_work),),
        operands=p.operands | p.prefetch_operands,
        scalars={
            "rows": p.rows,
            "tokens": p.tokens,
            "programs": programs,
            "reorder_programs": p.reorder_programs(side_work),
        },
        outputs=p.choice_outputs | counted | p.reorder_outputs,
        constexprs={
            "COLUMNS": p.columns,
            "COLUMNS_PADDED": p.columns_padded,
            "EXPERTS": p.experts,
            "TOP_K": p.top_k,
            "STRIPS": STRIPS,
            "ROWS": block_rows // STRIPS,
            "STEPS": steps,
            **p.scoring_constexpr,
            **p.side_work_constexprs(side_work),
        },
        num_warps=tile.num_warps,
        bytes_accessed=p.choice_bytes + p.reorder_bytes,
    )
    sort = Plan(
        kernel=sort_kernel,
        grid=(programs,),
        operands={
            "experts_ptr": "experts",
            "expert_offset_ptr": "expert_offset" if p.expert_offset else None,
            "positions_in_run_ptr": "positions_in_run",
            "counts_ptr": "counts",
            **p.sort_operands,
        },
        scalars={
            "pairs": p.pairs,
            "programs": programs,
            "tiles_an_expert": cdiv(p.pairs, p.block_m),
            "max_tiles": p.max_tiles,
        },
        outputs=p.sort_outputs,
        constexprs={
            "EXPERTS": p.experts,
            "EXPERTS_PADDED": experts_padded,
            "RUN": run,
            "BLOCK_P": min(sort_tile.block_pairs, next_power_of_2(run)),
            "COUNT_BLOCKS": cdiv(programs, block_counts),
            "BLOCK_COUNTS": block_counts,
            "BLOCK_M": p.block_m,
            "BLOCK_TILES": sort_tile.block_tiles,
            "BLOCK_UNUSED": sort_tile.block_unused,
        },
        num_warps=sort_tile.num_warps,
        bytes_accessed=4 * (3 * p.pairs + programs * programs * p.experts + 3 * p.max_tiles),
    )
    return [count, sort]
