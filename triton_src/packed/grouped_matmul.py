"""The experts' products from packed MXFP4, for many rows an expert: one of them a launch, or both.

Both in one launch have one end at which multiprocessors run out of work instead of two.
"""

from collections.abc import Sequence
from typing import Any

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from jmoe.triton_src.packed.grouped_product import packed_tile
from jmoe.triton_src.packed.operands import Lora, Product, Rows, Tile
from jmoe.triton_src.packed.ready_counters import is_mine, signal_all, start
from jmoe.triton_src.plan import Buffer, Plan, cdiv
from jmoe.triton_src.portable.grouped_matmul import pre_activations
from jmoe.triton_src.portable.shrink import rank_blocks
from jmoe.triton_src.problem import MoeProblem, Projection
from jmoe.triton_src.tiles import GroupedTile


@gluon.jit
def tile_of_rows(p, rows, pre_activations_ptr, work, signals, SMALLEST_M: gl.constexpr, PROGRAMS: gl.constexpr):
    """A tile's columns that `work` numbers, of PROGRAMS a tile.

    By a product of fewer rows where that is enough, down to SMALLEST_M.
    """
    BLOCK_M: gl.constexpr = rows.BLOCK_M
    index = work // PROGRAMS
    program = work % PROGRAMS
    expert = gl.load(rows.tiles_ptr + index * 3)
    if expert >= 0:
        first = gl.load(rows.tiles_ptr + index * 3 + 1)
        end = gl.load(rows.tiles_ptr + index * 3 + 2)
        counter = rows.ready_counters_ptr
        if rows.ready_counters_ptr is not None:
            counter = rows.ready_counters_ptr + index
        tile = Tile(expert, first, end, counter, signals)
        if (end - first <= BLOCK_M // 4) & (BLOCK_M // 4 >= SMALLEST_M):
            packed_tile(p, rows, tile, pre_activations_ptr, program, max(BLOCK_M // 4, SMALLEST_M))
        elif (end - first <= BLOCK_M // 2) & (BLOCK_M // 2 >= SMALLEST_M):
            packed_tile(p, rows, tile, pre_activations_ptr, program, max(BLOCK_M // 2, SMALLEST_M))
        else:
            packed_tile(p, rows, tile, pre_activations_ptr, program, BLOCK_M)


@gluon.jit(do_not_specialize=["pairs", "max_tiles"])
def packed_grouped_matmul_kernel(
    x_ptr,  # (T, H) bf16, or None without gate_up
    gate_up_words_ptr,  # (E, 2 I / 64, H / 64, 512) int32; this and what follows of gate_up None without it
    gate_up_scales_ptr,  # (E, 2 I / 64, H / 64, 32) int32
    gate_up_bias_ptr,  # (E, 2 I) bf16 or float32, or None
    gate_up_shrunk_ptr,  # (SPLITS, P, rank padded) float32 by position, or None without LoRA
    gate_up_b_ptr,  # (A, E, 2 I, R) bf16 or float32, or None without LoRA
    down_words_ptr,  # (E, H / 64, I / 64, 512) int32; this and what follows of down None without it
    down_scales_ptr,  # (E, H / 64, I / 64, 32) int32
    down_bias_ptr,  # (E, H) bf16 or float32, or None
    down_shrunk_ptr,  # (SPLITS, P, rank padded) float32 by position, or None without LoRA
    down_b_ptr,  # (A, E, H, R) bf16 or float32, or None without LoRA
    gates_ptr,  # (P,) float32, routing weight by pair, or None without down
    adapter_ids_ptr,  # (T,) int32, -1 for none; None: adapter 0 for all
    order_ptr,  # (P,) int32, position -> pair
    tiles_ptr,  # (max_tiles, 3) int32: expert or -1, first position, end position
    layer_ptr,  # (1,) int32: which layer's weights, of several; None: there is one layer's
    lora_layer_ptr,  # (1,) int32: which layer's LoRA, of several; None: there is one layer's
    ready_counters_ptr,  # (max_tiles + 1,) int32, zero at first, as of decode; None unless both
    activations_ptr,  # (P, I) bf16 by position
    pre_activations_ptr,  # (P, 2 I) bf16 by position, or None unless they are kept for gradients
    pair_out_ptr,  # (P, H) bf16 by pair, or None without down
    pairs,
    max_tiles,
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
    SMALLEST_M: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
    GATE_UP: gl.constexpr,
    DOWN: gl.constexpr,
):
    """gate_up, down, or both of grouped_matmul_kernel; a program has 128 columns of a tile. Eight warps.

    Of both, gate_up comes first for all tiles, and down's programs wait for those that have their rows.
    GATE_UP and DOWN are programs a tile, 0 of what is not computed. Grid: (max_tiles * (GATE_UP + DOWN),).
    """
    pairs = gl.to_tensor(pairs)  # a single one is a constexpr, by jax-triton
    rows = Rows(order_ptr, tiles_ptr, ready_counters_ptr, adapter_ids_ptr, pairs, EXPERTS, TOP_K, ADAPTERS, BLOCK_M)
    program = gl.program_id(0)
    if GATE_UP > 0:
        gate_up = Product(
            x_ptr, gate_up_words_ptr, gate_up_scales_ptr, gate_up_bias_ptr, layer_ptr, None, activations_ptr,
            Lora(
                None, gate_up_b_ptr, None, lora_layer_ptr, gate_up_shrunk_ptr, GATE_UP_RANK,
                rank_blocks(GATE_UP_RANK)[1], GATE_UP_BLOCK_R, SPLITS,
            ),
            N=2 * I, K=H, OUT_WIDTH=I, GATE_UP=True, ACTIVATION=ACTIVATION, AHEAD=AHEAD, STAGES=STAGES,
            X_READY=0, SHRUNK_READY=0,
        )  # fmt: skip
        if ready_counters_ptr is None:
            tile_of_rows(gate_up, rows, pre_activations_ptr, program, 1, SMALLEST_M, GATE_UP)
        else:
            pieces = max_tiles * GATE_UP
            started_ptr = ready_counters_ptr + max_tiles
            expert_ptr = tiles_ptr + (program - pieces) // DOWN * 3
            begin, step = start(started_ptr, program, pieces, pieces, expert_ptr)
            for work in tl.range(begin, pieces, step, disable_licm=True):
                if is_mine(started_ptr, program, pieces):
                    signals = gl.where(program < pieces, 1, 0)
                    tile_of_rows(gate_up, rows, pre_activations_ptr, work, signals, SMALLEST_M, GATE_UP)
                    if (program >= pieces) & (work == pieces - 1):
                        signal_all(ready_counters_ptr, max_tiles, GATE_UP)
            program -= pieces
    if DOWN > 0:
        down = Product(
            activations_ptr, down_words_ptr, down_scales_ptr, down_bias_ptr, layer_ptr, gates_ptr, pair_out_ptr,
            Lora(
                None, down_b_ptr, None, lora_layer_ptr, down_shrunk_ptr, DOWN_RANK,
                rank_blocks(DOWN_RANK)[1], DOWN_BLOCK_R, SPLITS,
            ),
            N=H, K=I, OUT_WIDTH=H, GATE_UP=False, ACTIVATION=ACTIVATION, AHEAD=AHEAD, STAGES=STAGES,
            X_READY=GATE_UP, SHRUNK_READY=0,
        )  # fmt: skip
        if program >= 0:
            tile_of_rows(down, rows, None, program, 1, SMALLEST_M, DOWN)


def plan_packed_grouped_matmul(
    products: Sequence[Projection], problem: MoeProblem, tile: GroupedTile, keep: bool = False
) -> Plan:
    """Of gate_up: activations [P, I] from x [T, H], and pre_activations [P, 2I] too if `keep`.

    Of down: pair_out [P, H] from activations.

    products: one of the problem's two, or both in order.
    """
    p = problem
    both = len(products) == 2
    lora = any(product.rank is not None for product in products)
    operands: dict[str, str | None] = {
        "x_ptr": "x" if p.gate_up in products else None,
        "gates_ptr": "weights" if p.down in products else None,
        "adapter_ids_ptr": "adapter_ids" if lora and p.adapter_ids else None,
        "order_ptr": "order",
        "tiles_ptr": "tiles",
        "ready_counters_ptr": "ready_counters" if both else None,
        **p.stacked.weights_operand,
        **p.stacked.lora_operand,
    }
    outputs: dict[str, Buffer] = {}
    constexprs: dict[str, Any] = {}
    flops = bytes_accessed = 0
    for product in (p.gate_up, p.down):
        here = product in products
        name, n, k = product.name, product.n, product.k
        rank = product.rank if here else None
        block_r, _ = rank_blocks(rank or 1, tile.block_r)
        # Of mixed adapters more ranks at once spill, and ptxas then serialises the main loop's products too.
        constexprs |= {
            f"{name}_RANK".upper(): rank or 0,
            f"{name}_BLOCK_R".upper(): tile.mixed_block_r if p.adapter_ids else block_r,
        }
        constexprs[name.upper()] = cdiv(n, 128) if here else 0
        operands |= {
            f"{name}_words_ptr": name if here else None,
            f"{name}_scales_ptr": f"{name}_scales" if here else None,
            f"{name}_bias_ptr": f"{name}_bias" if here and product.bias else None,
        }
        for part in ("shrunk", "b"):
            operands[f"{name}_{part}_ptr"] = f"{name}_{part}" if rank is not None else None
        if here:
            flops += 2 * p.pairs * n * (k + (rank or 0))
            bytes_accessed += p.active_experts * product.layout.bytes(n, k) + 2 * p.pairs * (k + n)
    if p.gate_up in products:
        outputs["activations_ptr"] = Buffer("activations", (p.pairs, p.intermediate), "bfloat16")
    else:
        operands["activations_ptr"] = "activations"
    if keep:
        outputs |= pre_activations(p)
    else:
        operands["pre_activations_ptr"] = None
    if p.down in products:
        outputs["pair_out_ptr"] = Buffer("pair_out", (p.pairs, p.hidden), "bfloat16")
    else:
        operands["pair_out_ptr"] = None
    max_tiles = p.max_tiles(tile)
    return Plan(
        kernel=packed_grouped_matmul_kernel,
        grid=(max_tiles * (constexprs["GATE_UP"] + constexprs["DOWN"]),),
        operands=operands,
        updates=("ready_counters_ptr",) if both else (),
        scalars={"pairs": p.pairs, "max_tiles": max_tiles},
        outputs=outputs,
        constexprs={
            **constexprs,
            "H": p.hidden,
            "I": p.intermediate,
            "EXPERTS": p.experts,
            "TOP_K": p.top_k,
            "ADAPTERS": p.adapters,
            "SPLITS": tile.shrink_splits,
            "ACTIVATION": p.activation,
            "BLOCK_M": tile.block_m,
            "SMALLEST_M": tile.smallest_m,
            "STAGES": tile.stages,
            "AHEAD": tile.ahead,
        },
        num_warps=8,
        num_stages=1,
        # Mixed adapters hold a second accumulator while they are expanded.
        max_registers=max(tile.mixed_max_registers if lora and p.adapter_ids else 0, tile.max_registers),
        flops=flops,
        bytes_accessed=bytes_accessed,
    )
