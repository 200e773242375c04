"""Both of the experts' products from packed MXFP4, with LoRA, in one launch: for few rows an expert.

Beside launches of their own, the products then have one end at which some multiprocessors have nothing left to do, and
not two, and down's weights stream in while the last of gate_up's programs run.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from jmoe.triton_src.packed.decode_product import product
from jmoe.triton_src.packed.operands import Lora, Product, Rows, Tile
from jmoe.triton_src.packed.ready_counters import is_mine, signal_all, start, take_ticket, tickets_to_take
from jmoe.triton_src.packed.shrink import shrink
from jmoe.triton_src.plan import Buffer, Plan, cdiv
from jmoe.triton_src.portable.shrink import rank_blocks
from jmoe.triton_src.problem import MoeProblem
from jmoe.triton_src.routing.mma_k_order import mma_k_width
from jmoe.triton_src.tiles import DecodeTile


@gluon.jit
def product_of_tile(p, rows, work, signals, COLUMN_WARPS: gl.constexpr, PROGRAMS: gl.constexpr):
    """The product of a tile's columns that `work` numbers, of PROGRAMS a tile.

    Of 8 rows where the tile has no more: one of 16 takes longer.
    """
    index = work // PROGRAMS
    expert = gl.load(rows.tiles_ptr + index * 3)
    if expert >= 0:
        first = gl.load(rows.tiles_ptr + index * 3 + 1)
        end = gl.load(rows.tiles_ptr + index * 3 + 2)
        tile = Tile(expert, first, end, rows.ready_counters_ptr + index, signals)
        short = end - first <= 8 if rows.BLOCK_M > 8 else True
        if short:
            product(p, rows, tile, work % PROGRAMS, min(8, rows.BLOCK_M), COLUMN_WARPS)
        else:
            product(p, rows, tile, work % PROGRAMS, rows.BLOCK_M, COLUMN_WARPS)


@gluon.jit
def multiply_tiles(p, rows, program, first_wave_tiles, max_tiles, COLUMN_WARPS: gl.constexpr, PROGRAMS: gl.constexpr):
    """A program's share of a product: its columns of a tile of the first wave, and of each first_wave_tiles tiles on.

    What LLVM could take out of the loop would need registers in it, so it may not.
    """
    for work in tl.range(program, max_tiles * PROGRAMS, first_wave_tiles * PROGRAMS, disable_licm=True):
        product_of_tile(p, rows, work, 1, COLUMN_WARPS, PROGRAMS)


@gluon.jit
def shrink_tiles(p, rows, program, first_wave_tiles, max_tiles, PROGRAMS: gl.constexpr):
    """multiply_tiles for LoRA's shrink."""
    for work in tl.range(program, max_tiles * PROGRAMS, first_wave_tiles * PROGRAMS, disable_licm=True):
        shrink(p, rows, work, PROGRAMS)


@gluon.jit(do_not_specialize=["pairs", "max_tiles", "first_wave_tiles", "tail_tiles"])
def packed_decode_kernel(
    x_ptr,  # (T, HP) bf16, in mma K order
    gate_up_words_ptr,  # (E, 2 I / 64, HP / 64, 512) int32
    gate_up_scales_ptr,  # (E, 2 I / 64, HP / 64, 32) int32
    gate_up_bias_ptr,  # (E, 2 I) bf16 or float32, or None
    gate_up_a_ptr,  # (A, E, R, H) bf16 or float32, or None
    gate_up_b_ptr,  # (A, E, 2 I, R) bf16 or float32, or None
    gate_up_scale_ptr,  # (A,) float32, or None
    down_words_ptr,  # (E, H / 64, IP / 64, 512) int32
    down_scales_ptr,  # (E, H / 64, IP / 64, 32) int32
    down_bias_ptr,  # (E, H) bf16 or float32, or None
    down_a_ptr,  # (A, E, R, I) bf16 or float32, or None
    down_b_ptr,  # (A, E, H, R) bf16 or float32, or None
    down_scale_ptr,  # (A,) float32, or None
    adapter_ids_ptr,  # (T,) int32, -1 for none; None: adapter 0 for all
    gates_ptr,  # (P,) float32, routing weight by pair
    order_ptr,  # (P,) int32, position -> pair
    tiles_ptr,  # (max_tiles, 3) int32: expert or -1, first position, end position
    layer_ptr,  # (1,) int32: which layer's weights, of several; None: there is one layer's
    lora_layer_ptr,  # (1,) int32: which layer's LoRA, of several; None: there is one layer's
    ready_counters_ptr,  # (max_tiles + 1,) int32, zero at first: see ready_counters
    gate_up_shrunk_ptr,  # (SPLITS, P, rank padded) float32 by position, or None
    activations_ptr,  # (P, IP) bf16 by position, in mma K order
    down_shrunk_ptr,  # (SPLITS, P, rank padded) float32 by position, or None
    pair_out_ptr,  # (P, H) bf16 by pair
    pairs,
    max_tiles,
    first_wave_tiles,  # tiles that have programs of their own
    tail_tiles,  # of these the last ones, whose programs of down are short
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    EXPERTS: gl.constexpr,
    TOP_K: gl.constexpr,
    ADAPTERS: gl.constexpr,
    GATE_UP_RANK: gl.constexpr,
    GATE_UP_BLOCK_R: gl.constexpr,
    DOWN_RANK: gl.constexpr,
    DOWN_BLOCK_R: gl.constexpr,
    SPLITS: gl.constexpr,
    ACTIVATION: gl.constexpr,  # jmoe.triton_src.activation.SwiGLU
    BLOCK_M: gl.constexpr,
    AHEAD: gl.constexpr,
    STAGES: gl.constexpr,
    GATE_UP_COLUMN_WARPS: gl.constexpr,
    DOWN_COLUMN_WARPS: gl.constexpr,
    TAIL_COLUMN_WARPS: gl.constexpr,
):
    """The roles of a layer in order, each for all tiles: gate_up's shrink, gate_up, down's shrink, down.

    activations = swiglu(x W^T + bias + LoRA) and pair_out = gate * (activations W^T + bias + LoRA), as in
    grouped_matmul_kernel. A program waits for those that have its rows: see ready_counters. Tiles past the first
    wave's, of which there are some if routing is uneven, are further work for the programs of these.
    Grid: (first_wave_tiles * (GATE_UP_SHRINK + GATE_UP + DOWN_SHRINK) + (first_wave_tiles - tail_tiles) * DOWN
    + tail_tiles * TAIL_DOWN,).
    """
    IP: gl.constexpr = (I + 63) // 64 * 64
    GATE_UP_RANK_PADDED: gl.constexpr = (GATE_UP_RANK + GATE_UP_BLOCK_R - 1) // GATE_UP_BLOCK_R * GATE_UP_BLOCK_R
    DOWN_RANK_PADDED: gl.constexpr = (DOWN_RANK + DOWN_BLOCK_R - 1) // DOWN_BLOCK_R * DOWN_BLOCK_R
    # Programs of a tile in each role, and how many have finished when down's rows can be read.
    GATE_UP_SHRINK: gl.constexpr = GATE_UP_RANK_PADDED // GATE_UP_BLOCK_R * SPLITS
    GATE_UP: gl.constexpr = 2 * IP // (16 * GATE_UP_COLUMN_WARPS)
    DOWN_SHRINK: gl.constexpr = DOWN_RANK_PADDED // DOWN_BLOCK_R * SPLITS
    DOWN: gl.constexpr = (H + 16 * DOWN_COLUMN_WARPS - 1) // (16 * DOWN_COLUMN_WARPS)
    TAIL_DOWN: gl.constexpr = (H + 16 * TAIL_COLUMN_WARPS - 1) // (16 * TAIL_COLUMN_WARPS)
    ACTIVATED: gl.constexpr = GATE_UP_SHRINK + GATE_UP
    pairs = gl.to_tensor(pairs)  # a single one is a constexpr, by jax-triton
    rows = Rows(order_ptr, tiles_ptr, ready_counters_ptr, adapter_ids_ptr, pairs, EXPERTS, TOP_K, ADAPTERS, BLOCK_M)
    gate_up = Product(
        x_ptr, gate_up_words_ptr, gate_up_scales_ptr, gate_up_bias_ptr, layer_ptr, None, activations_ptr,
        Lora(
            gate_up_a_ptr, gate_up_b_ptr, gate_up_scale_ptr, lora_layer_ptr, gate_up_shrunk_ptr, GATE_UP_RANK,
            GATE_UP_RANK_PADDED, GATE_UP_BLOCK_R, SPLITS,
        ),
        N=2 * I, K=H, OUT_WIDTH=IP, GATE_UP=True, ACTIVATION=ACTIVATION, AHEAD=AHEAD, STAGES=STAGES,
        X_READY=0, SHRUNK_READY=GATE_UP_SHRINK,
    )  # fmt: skip
    down = Product(
        activations_ptr, down_words_ptr, down_scales_ptr, down_bias_ptr, layer_ptr, gates_ptr, pair_out_ptr,
        Lora(
            down_a_ptr, down_b_ptr, down_scale_ptr, lora_layer_ptr, down_shrunk_ptr, DOWN_RANK,
            DOWN_RANK_PADDED, DOWN_BLOCK_R, SPLITS,
        ),
        N=H, K=I, OUT_WIDTH=H, GATE_UP=False, ACTIVATION=ACTIVATION, AHEAD=AHEAD, STAGES=STAGES,
        X_READY=ACTIVATED, SHRUNK_READY=ACTIVATED + DOWN_SHRINK,
    )  # fmt: skip
    # Each role's work follows the last one's, and down's tail the others of down.
    program = gl.program_id(0)
    gate_up_begin = first_wave_tiles * GATE_UP_SHRINK
    down_shrink_begin = gate_up_begin + first_wave_tiles * GATE_UP
    down_begin = down_shrink_begin + first_wave_tiles * DOWN_SHRINK
    tail_begin = down_begin + (first_wave_tiles - tail_tiles) * DOWN
    if GATE_UP_RANK == 0 and DOWN_RANK == 0:
        if TAIL_COLUMN_WARPS >= DOWN_COLUMN_WARPS or program < tail_begin:
            down_tile = (program - down_begin) // DOWN
        else:
            down_tile = (program - tail_begin) // TAIL_DOWN + (first_wave_tiles - tail_tiles)
        started_ptr = ready_counters_ptr + max_tiles
        pieces = max_tiles * GATE_UP
        begin, step = start(started_ptr, program, down_begin, pieces, tiles_ptr + down_tile * 3)
        for work in tl.range(begin, pieces, step, disable_licm=True):
            if is_mine(started_ptr, program, down_begin):
                signals = gl.where(program < down_begin, 1, 0)
                product_of_tile(gate_up, rows, work, signals, GATE_UP_COLUMN_WARPS, GATE_UP)
                if (program >= down_begin) & (work == pieces - 1):
                    signal_all(ready_counters_ptr, max_tiles, GATE_UP)
    else:
        tickets_ptr = ready_counters_ptr + max_tiles
        for _ in tl.range(0, tickets_to_take(tickets_ptr, program, down_begin), disable_licm=True):
            ticket = take_ticket(tickets_ptr)
            if GATE_UP_SHRINK > 0 and ticket < gate_up_begin:
                shrink_tiles(gate_up, rows, ticket, first_wave_tiles, max_tiles, GATE_UP_SHRINK)
            elif ticket < down_shrink_begin:
                multiply_tiles(
                    gate_up, rows, ticket - gate_up_begin, first_wave_tiles, max_tiles, GATE_UP_COLUMN_WARPS, GATE_UP
                )
            elif DOWN_SHRINK > 0 and ticket < down_begin:
                shrink_tiles(down, rows, ticket - down_shrink_begin, first_wave_tiles, max_tiles, DOWN_SHRINK)
    if program >= down_begin:
        if TAIL_COLUMN_WARPS >= DOWN_COLUMN_WARPS or program < tail_begin:
            multiply_tiles(down, rows, program - down_begin, first_wave_tiles, max_tiles, DOWN_COLUMN_WARPS, DOWN)
        else:
            of_tail = program - tail_begin + (first_wave_tiles - tail_tiles) * TAIL_DOWN
            multiply_tiles(down, rows, of_tail, first_wave_tiles, max_tiles, TAIL_COLUMN_WARPS, TAIL_DOWN)


def plan_packed_decode(problem: MoeProblem, tile: DecodeTile) -> Plan:
    """pair_out [P, H] from x_in_mma_order; beside it activations [P, I padded to 64] in that order, and shrunk rows."""
    p = problem
    max_tiles, first_wave_tiles = p.max_tiles(tile), p.first_wave_tiles(tile)
    width = mma_k_width(p.intermediate)
    programs = 2 * width // (16 * tile.column_warps)
    down = cdiv(p.hidden, 16 * tile.down_column_warps)
    tail_down = cdiv(p.hidden, 16 * tile.tail_column_warps)
    tail_tiles = min(first_wave_tiles, tile.tail_tiles) if tile.tail_column_warps < tile.down_column_warps else 0
    if p.adapter_ids:
        # Sums along K are split otherwise in the tail, and which rows lie there depends on where all rows are routed:
        # a row would have other bits beside rows of other adapters.
        tail_tiles = 0
    outputs = {
        "activations_ptr": Buffer("activations", (p.pairs, width), "bfloat16"),
        "pair_out_ptr": Buffer("pair_out", (p.pairs, p.hidden), "bfloat16"),
    }
    operands: dict[str, str | None] = {}
    ranks: dict[str, int] = {}
    flops = weight_bytes = 0
    for one in (p.gate_up, p.down):
        name, rank = one.name, one.rank
        operands |= {
            f"{name}_words_ptr": name,
            f"{name}_scales_ptr": f"{name}_scales",
            f"{name}_bias_ptr": f"{name}_bias" if one.bias else None,
        }
        block_r, rank_padded = rank_blocks(rank or 1, tile.block_r)
        ranks |= {f"{name}_RANK".upper(): rank or 0, f"{name}_BLOCK_R".upper(): block_r}
        for part in ("a", "b", "scale"):
            operands[f"{name}_{part}_ptr"] = f"{name}_{part}" if rank else None
        if rank:
            programs += rank_padded // block_r * tile.shrink_splits
            shrunk = Buffer(f"{name}_shrunk", (tile.shrink_splits, p.pairs, rank_padded), "float32")
            outputs[f"{name}_shrunk_ptr"] = shrunk
        else:
            operands[f"{name}_shrunk_ptr"] = None
        flops += 2 * p.pairs * (one.n * one.k + (rank or 0) * (one.n + one.k))
        weight_bytes += one.layout.bytes(one.n, one.k)
    return Plan(
        kernel=packed_decode_kernel,
        grid=(first_wave_tiles * programs + (first_wave_tiles - tail_tiles) * down + tail_tiles * tail_down,),
        operands={
            "x_ptr": "x_in_mma_order",
            "adapter_ids_ptr": "adapter_ids" if p.adapter_ids else None,
            "gates_ptr": "weights",
            "order_ptr": "order",
            "tiles_ptr": "tiles",
            "ready_counters_ptr": "ready_counters",
            **operands,
            **p.stacked.weights_operand,
            **p.stacked.lora_operand,
        },
        updates=("ready_counters_ptr",),
        outputs=outputs,
        scalars={
            "pairs": p.pairs,
            "max_tiles": max_tiles,
            "first_wave_tiles": first_wave_tiles,
            "tail_tiles": tail_tiles,
        },
        constexprs={
            "H": p.hidden,
            "I": p.intermediate,
            "EXPERTS": p.experts,
            "TOP_K": p.top_k,
            "ADAPTERS": p.adapters,
            **ranks,
            "SPLITS": tile.shrink_splits,
            "ACTIVATION": p.activation,
            "BLOCK_M": tile.block_m,
            "AHEAD": tile.ahead,
            "STAGES": tile.stages,
            "GATE_UP_COLUMN_WARPS": tile.column_warps,
            "DOWN_COLUMN_WARPS": tile.down_column_warps,
            "TAIL_COLUMN_WARPS": tile.tail_column_warps,
        },
        num_warps=4,
        num_stages=1,
        max_registers=tile.max_registers,
        flops=flops,
        bytes_accessed=p.active_experts * weight_bytes + 4 * p.pairs * (p.hidden + width),
    )
