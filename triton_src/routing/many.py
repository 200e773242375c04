"""Routing of many tokens in two launches: count chooses and counts by runs of rows, sort adds the counts up.

Everything is integer arithmetic on prefix counts, so the order is stable and two runs agree bit for bit.
"""

import triton
import triton.language as tl

from jmoe.triton_src.plan import Buffer, Plan, cdiv, next_power_of_2
from jmoe.triton_src.routing.problem import RouteProblem, padded_experts
from jmoe.triton_src.routing.side_work import interleave_or_fetch
from jmoe.triton_src.routing.sort_positions import count_earlier, write_tiles
from jmoe.triton_src.routing.top_k import at_columns, bytes_of_choices, chosen_columns, held_pairs
from jmoe.triton_src.tiles import LaunchTable, tile_for


@triton.jit(do_not_specialize=["rows", "tokens", "programs", "interleave_programs"])
def count_kernel(
    logits_ptr,  # (T, COLUMNS) bf16 or float32, or None: experts are given
    expert_offset_ptr,  # (1,) int32, first expert held here; None: 0
    x_ptr,  # (T, K) bf16, or None
    words_ptr,  # as in fetch_lines, or None
    scales_ptr,  # as in fetch_lines, or None
    layer_ptr,  # as in fetch_lines
    experts_ptr,  # (T, k) int32, written unless given
    weights_ptr,  # (T, k) float32; None where experts are given
    places_ptr,  # (P,) int32: earlier pairs of the program with the same expert; not written for pairs not held
    counts_ptr,  # (programs, E) int32: pairs of each expert held here
    x_interleaved_ptr,  # (T, K padded to 64) bf16, or None
    rows,
    tokens,
    programs,
    interleave_programs,
    COLUMNS: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    STRIPS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    K: tl.constexpr,
    INTERLEAVE_BLOCKS: tl.constexpr,
    MATRICES: tl.constexpr,
    BLOCKS: tl.constexpr,
    FETCHED_MATRICES: tl.constexpr,
    FETCHED_BLOCKS: tl.constexpr,
    LINES: tl.constexpr,
):
    """Each of the first `programs` programs takes a run of STEPS blocks of STRIPS * ROWS rows.

    The others do what interleave_or_fetch does.

    Rows and columns are those of chosen_columns.
    """
    program = tl.program_id(0)
    if program < programs:
        offset = 0 if expert_offset_ptr is None else tl.load(expert_offset_ptr)
        column = tl.arange(0, COLUMNS_PADDED)
        expert = column if logits_ptr is None else column - offset
        held = (expert >= 0) & (expert < EXPERTS)
        counts = tl.zeros((COLUMNS_PADDED,), tl.int32)
        GIVEN: tl.constexpr = logits_ptr is None
        CHOICES: tl.constexpr = 1 if GIVEN else TOP_K
        in_block = tl.arange(0, STRIPS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        for step in range(STEPS):
            row = (program * STEPS + step) * STRIPS * ROWS + in_block
            choice, used = chosen_columns(
                logits_ptr, experts_ptr, weights_ptr, offset, row, rows, COLUMNS, COLUMNS_PADDED, TOP_K
            )
            earlier, count = count_earlier(choice >= 0, STRIPS)
            place = bytes_of_choices(earlier, choice, CHOICES)
            if STEPS > 1:
                place += at_columns(counts, used)
            pair, here = held_pairs(used, offset, row, rows, GIVEN, EXPERTS, CHOICES)
            tl.store(places_ptr + pair, place, mask=here)
            counts += count
        mine = counts_ptr + program * EXPERTS
        tl.store(mine + expert, counts, mask=held)
        if logits_ptr is not None:
            # Experts held here that the router does not know.
            for start in tl.static_range(0, EXPERTS, COLUMNS_PADDED):
                unknown = start + column
                known = (unknown + offset >= 0) & (unknown + offset < COLUMNS)
                tl.store(mine + unknown, 0, mask=(unknown < EXPERTS) & (known == 0))
    else:
        interleave_or_fetch(
            x_ptr, x_interleaved_ptr, words_ptr, scales_ptr, layer_ptr, tokens, program - programs,
            interleave_programs, K, INTERLEAVE_BLOCKS, MATRICES, BLOCKS, FETCHED_MATRICES, FETCHED_BLOCKS, LINES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pairs", "programs", "tiles_an_expert", "slots"])
def sort_kernel(
    experts_ptr,  # (P,) int32
    expert_offset_ptr,  # (1,) int32, or None
    places_ptr,  # (P,) int32, of count
    counts_ptr,  # (programs, E) int32, of count
    order_ptr,  # (P,) int32: position -> pair; positions past the held pairs are not written
    tiles_ptr,  # as in write_tiles
    finished_ptr,  # as in write_tiles
    pairs,
    programs,
    tiles_an_expert,
    slots,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COUNT_BLOCKS: tl.constexpr,
    BLOCK_COUNTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
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
    place = tl.load(places_ptr + pair, mask=pair < end, other=0)

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
        next_place = tl.load(places_ptr + next_pair, mask=next_pair < end, other=0)
        held = (pair < end) & (expert >= 0) & (expert < EXPERTS)
        position = tl.gather(first, tl.where(held, expert, 0), axis=0) + place
        tl.store(order_ptr + position, pair, mask=held)
        pair, expert, place = next_pair, next_expert, next_place
    write_tiles(
        tiles_ptr,
        bins,
        begin,
        total,
        tiles_an_expert,
        slots,
        finished_ptr,
        program,
        programs,
        BLOCK_M,
        BLOCK_TILES,
        BLOCK_SLOTS,
    )


STRIPS = 4


def plan_route_many(problem: RouteProblem, table: LaunchTable) -> list[Plan]:
    """count and sort, and x_interleaved if asked for."""
    p = problem
    tile = tile_for(table.count_pairs if p.router_experts is None else table.count, p.columns_padded)
    sort_tile, side_work = tile_for(table.sort, p.pairs), tile_for(table.side_work, p.tokens)
    block_rows = max(STRIPS, min(tile.block_rows, tile.largest_block // p.columns_padded))
    steps = cdiv(p.rows, block_rows * tile.most_programs)
    programs = cdiv(p.rows, block_rows * steps)
    counted = {
        "places_ptr": Buffer("places", (p.pairs,), "int32"),
        "counts_ptr": Buffer("counts", (programs, p.experts), "int32"),
    }
    run = block_rows * steps * p.pairs // p.rows
    most_counts = max(8, sort_tile.block_counts // padded_experts(p.experts))
    block_counts = min(tile.most_programs, most_counts, next_power_of_2(programs))
    count = Plan(
        kernel=count_kernel,
        grid=(programs + p.interleave_programs(side_work) + p.fetch_programs(side_work),),
        operands=p.operands | p.fetch_operands,
        scalars={
            "rows": p.rows,
            "tokens": p.tokens,
            "programs": programs,
            "interleave_programs": p.interleave_programs(side_work),
        },
        outputs=p.choice_outputs | counted | p.interleave_outputs,
        constexprs={
            "COLUMNS": p.columns,
            "COLUMNS_PADDED": p.columns_padded,
            "EXPERTS": p.experts,
            "TOP_K": p.top_k,
            "STRIPS": STRIPS,
            "ROWS": block_rows // STRIPS,
            "STEPS": steps,
            **p.side_work_constexprs(side_work),
        },
        num_warps=tile.num_warps,
        bytes_accessed=p.choice_bytes + p.interleave_bytes,
    )
    sort = Plan(
        kernel=sort_kernel,
        grid=(programs,),
        operands={
            "experts_ptr": "experts",
            "expert_offset_ptr": "expert_offset" if p.expert_offset else None,
            "places_ptr": "places",
            "counts_ptr": "counts",
            **p.sort_operands,
        },
        scalars={
            "pairs": p.pairs,
            "programs": programs,
            "tiles_an_expert": cdiv(p.pairs, p.block_m),
            "slots": p.slots,
        },
        outputs=p.sort_outputs,
        constexprs={
            "EXPERTS": p.experts,
            "EXPERTS_PADDED": padded_experts(p.experts),
            "RUN": run,
            "BLOCK_P": min(sort_tile.block_pairs, next_power_of_2(run)),
            "COUNT_BLOCKS": cdiv(programs, block_counts),
            "BLOCK_COUNTS": block_counts,
            "BLOCK_M": p.block_m,
            "BLOCK_TILES": sort_tile.block_tiles,
            "BLOCK_SLOTS": sort_tile.block_slots,
        },
        num_warps=sort_tile.num_warps,
        bytes_accessed=4 * (3 * p.pairs + programs * programs * p.experts + 3 * p.slots),
    )
    return [count, sort]
