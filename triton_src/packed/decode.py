"""Both of the experts' products from packed MXFP4, with LoRA, in one launch: for few rows an expert.

Beside launches of their own, the products then have one end at which some multiprocessors have nothing left to do, and
not two, and down's weights stream in while the last of gate_up's programs run.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from jmoe.triton_src.packed.decode_product import product
from jmoe.triton_src.packed.operands import Lora, Product, Rows, Tile
from jmoe.triton_src.packed.shrink import shrink
from jmoe.triton_src.plan import Buffer, Plan, cdiv
from jmoe.triton_src.portable.shrink import rank_blocks
from jmoe.triton_src.problem import MoeProblem
from jmoe.triton_src.routing.mma_k_order import interleaved_width
from jmoe.triton_src.tiles import DecodeTile


@gluon.jit
def product_of_tile(p, rows, work, ROWS: gl.constexpr, PROGRAMS: gl.constexpr):
    """The product of a tile's columns that `work` numbers, of PROGRAMS a tile.

    Of 8 rows where the tile has no more: one of 16 takes longer.
    """
    index = work // PROGRAMS
    expert = gl.load(rows.tiles_ptr + index * 3)
    if expert >= 0:
        first = gl.load(rows.tiles_ptr + index * 3 + 1)
        end = gl.load(rows.tiles_ptr + index * 3 + 2)
        tile = Tile(expert, first, end, rows.finished_ptr + index)
        short = end - first <= 8 if rows.BLOCK_M > 8 else True
        if short:
            product(p, rows, tile, work % PROGRAMS, min(8, rows.BLOCK_M), ROWS)
        else:
            product(p, rows, tile, work % PROGRAMS, rows.BLOCK_M, ROWS)


@gluon.jit(do_not_specialize=["pairs", "slots", "spread", "last"])
def packed_decode_kernel(
    x_ptr,  # (T, HP) bf16, interleaved
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
    tiles_ptr,  # (slots, 3) int32: expert or -1, first position, end position
    layer_ptr,  # (1,) int32: which layer's weights, of several; None: there is one layer's
    lora_layer_ptr,  # (1,) int32: which layer's LoRA, of several; None: there is one layer's
    finished_ptr,  # (slots,) int32, zero at first: a tile's programs that have finished, of those that others wait for
    gate_up_shrunk_ptr,  # (SPLITS, P, rank padded) float32 by position, or None
    activations_ptr,  # (P, IP) bf16 by position, interleaved
    down_shrunk_ptr,  # (SPLITS, P, rank padded) float32 by position, or None
    pair_out_ptr,  # (P, H) bf16 by pair
    pairs,
    slots,
    spread,  # slots that have programs of their own
    last,  # of these the last ones, whose programs of down are short
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
    GATE_UP_ROWS: gl.constexpr,
    DOWN_ROWS: gl.constexpr,
    LAST_ROWS: gl.constexpr,
):
    """The roles of a layer in order, each for all tiles: gate_up's shrink, gate_up, down's shrink, down.

    activations = swiglu(x W^T + bias + LoRA) and pair_out = gate * (activations W^T + bias + LoRA), as in
    grouped_matmul_kernel. A program waits for those before it that have its rows. Slots past the first `spread`, which
    hold tiles if routing is uneven, are further work for programs of the first.
    Grid: (spread * (GATE_UP_SHRINK + GATE_UP + DOWN_SHRINK) + (spread - last) * DOWN + last * LAST_DOWN,).
    """
    IP: gl.constexpr = (I + 63) // 64 * 64
    # Programs of a tile in each role, and how many have finished when down's rows can be read.
    GATE_UP_SHRINK: gl.constexpr = (GATE_UP_RANK + GATE_UP_BLOCK_R - 1) // GATE_UP_BLOCK_R * SPLITS * ADAPTERS
    GATE_UP: gl.constexpr = 2 * IP // (16 * GATE_UP_ROWS)
    DOWN_SHRINK: gl.constexpr = (DOWN_RANK + DOWN_BLOCK_R - 1) // DOWN_BLOCK_R * SPLITS * ADAPTERS
    DOWN: gl.constexpr = (H + 16 * DOWN_ROWS - 1) // (16 * DOWN_ROWS)
    LAST_DOWN: gl.constexpr = (H + 16 * LAST_ROWS - 1) // (16 * LAST_ROWS)
    ACTIVATED: gl.constexpr = GATE_UP_SHRINK + GATE_UP
    pairs = gl.to_tensor(pairs)  # a single one is a constexpr, by jax-triton
    rows = Rows(order_ptr, tiles_ptr, finished_ptr, adapter_ids_ptr, pairs, EXPERTS, TOP_K, ADAPTERS, BLOCK_M)
    gate_up = Product(
        x_ptr, gate_up_words_ptr, gate_up_scales_ptr, gate_up_bias_ptr, layer_ptr, None, activations_ptr,
        Lora(
            gate_up_a_ptr, gate_up_b_ptr, gate_up_scale_ptr, lora_layer_ptr, gate_up_shrunk_ptr, GATE_UP_RANK,
            GATE_UP_BLOCK_R, SPLITS,
        ),
        N=2 * I, K=H, OUT_WIDTH=IP, GATE_UP=True, ACTIVATION=ACTIVATION, AHEAD=AHEAD, STAGES=STAGES,
        X_READY=0, SHRUNK_READY=GATE_UP_SHRINK,
    )  # fmt: skip
    down = Product(
        activations_ptr, down_words_ptr, down_scales_ptr, down_bias_ptr, layer_ptr, gates_ptr, pair_out_ptr,
        Lora(
            down_a_ptr, down_b_ptr, down_scale_ptr, lora_layer_ptr, down_shrunk_ptr, DOWN_RANK, DOWN_BLOCK_R, SPLITS
        ),
        N=H, K=I, OUT_WIDTH=H, GATE_UP=False, ACTIVATION=ACTIVATION, AHEAD=AHEAD, STAGES=STAGES,
        X_READY=ACTIVATED, SHRUNK_READY=ACTIVATED + DOWN_SHRINK,
    )  # fmt: skip
    program = gl.program_id(0)
    # What LLVM could take out of these loops would need registers in them, so it may not.
    if GATE_UP_SHRINK > 0:
        if program < spread * GATE_UP_SHRINK:
            for work in tl.range(program, slots * GATE_UP_SHRINK, spread * GATE_UP_SHRINK, disable_licm=True):
                shrink(gate_up, rows, work, GATE_UP_SHRINK)
        program -= spread * GATE_UP_SHRINK
    if program >= 0:
        if program < spread * GATE_UP:
            for work in tl.range(program, slots * GATE_UP, spread * GATE_UP, disable_licm=True):
                product_of_tile(gate_up, rows, work, GATE_UP_ROWS, GATE_UP)
        else:
            program -= spread * GATE_UP
            if DOWN_SHRINK > 0:
                if program < spread * DOWN_SHRINK:
                    for work in tl.range(program, slots * DOWN_SHRINK, spread * DOWN_SHRINK, disable_licm=True):
                        shrink(down, rows, work, DOWN_SHRINK)
                program -= spread * DOWN_SHRINK
            if LAST_ROWS < DOWN_ROWS:
                short = program - (spread - last) * DOWN
                if short >= 0:
                    short += (spread - last) * LAST_DOWN
                    for work in tl.range(short, slots * LAST_DOWN, spread * LAST_DOWN, disable_licm=True):
                        product_of_tile(down, rows, work, LAST_ROWS, LAST_DOWN)
                    program = -1
            if program >= 0:
                for work in tl.range(program, slots * DOWN, spread * DOWN, disable_licm=True):
                    product_of_tile(down, rows, work, DOWN_ROWS, DOWN)


def plan_packed_decode(problem: MoeProblem, tile: DecodeTile) -> Plan:
    """pair_out [P, H] from x_interleaved; beside it activations [P, I padded to 64], interleaved, and shrunk rows."""
    p = problem
    slots, spread = p.slots(tile), p.spread(tile)
    width = interleaved_width(p.intermediate)
    programs = 2 * width // (16 * tile.column_warps)
    down = cdiv(p.hidden, 16 * tile.down_column_warps)
    last_down = cdiv(p.hidden, 16 * tile.tail_column_warps)
    last = min(spread, tile.tail_tiles) if tile.tail_column_warps < tile.down_column_warps else 0
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
            programs += rank_padded // block_r * tile.shrink_splits * p.adapters
            shrunk = Buffer(f"{name}_shrunk", (tile.shrink_splits, p.pairs, rank_padded), "float32")
            outputs[f"{name}_shrunk_ptr"] = shrunk
        else:
            operands[f"{name}_shrunk_ptr"] = None
        flops += 2 * p.pairs * (one.n * one.k + (rank or 0) * (one.n + one.k))
        weight_bytes += one.layout.bytes(one.n, one.k)
    return Plan(
        kernel=packed_decode_kernel,
        grid=(spread * programs + (spread - last) * down + last * last_down,),
        operands={
            "x_ptr": "x_interleaved",
            "adapter_ids_ptr": "adapter_ids" if p.adapter_ids else None,
            "gates_ptr": "weights",
            "order_ptr": "order",
            "tiles_ptr": "tiles",
            "finished_ptr": "finished",
            **operands,
            **p.stacked.weights_operand,
            **p.stacked.lora_operand,
        },
        updates=("finished_ptr",),
        outputs=outputs,
        scalars={"pairs": p.pairs, "slots": slots, "spread": spread, "last": last},
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
            "GATE_UP_ROWS": tile.column_warps,
            "DOWN_ROWS": tile.down_column_warps,
            "LAST_ROWS": tile.tail_column_warps,
        },
        num_warps=4,
        num_stages=1,
        max_registers=tile.max_registers,
        flops=flops,
        bytes_accessed=p.active_experts * weight_bytes + 4 * p.pairs * (p.hidden + width),
    )
