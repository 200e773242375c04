"""The experts' two products from packed MXFP4, for few rows an expert: the weights stream from memory to registers."""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from jmoe.triton_src.activation import swiglu_tile
from jmoe.triton_src.lora import lora_constexprs, lora_operands
from jmoe.triton_src.packed_lora import load_adapters, load_lora_b, load_shrunk
from jmoe.triton_src.packed_weight import (
    nan_bits,
    scale_offsets,
    scales_layout,
    unpack_weights,
    word_offsets,
    words_layout,
)
from jmoe.triton_src.plan import Buffer, Plan, cdiv
from jmoe.triton_src.tiles import FewRowsTile


@triton.jit
def interleave_kernel(
    x_ptr,  # (T, K) bf16
    out_ptr,  # (T, KP) bf16
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[t] = x[t] in the order in which a thread of the product reads it, zero past K.

    Grid: (T, cdiv(KP, BLOCK_K)).
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k = slot // 64 * 64 + slot % 16 // 4 * 16 + slot % 4 // 2 * 8 + slot % 64 // 16 * 2 + slot % 2
    x = tl.load(x_ptr + token * K + k, mask=k < K, other=0.0)
    tl.store(out_ptr + token * KP + slot, x, mask=slot < KP)


@gluon.jit
def load_ahead(pointers, lanes, block, BLOCKS: gl.constexpr):
    """A block's words or scales, which nobody reads again soon; zero past the last block."""
    return gl.load(pointers, mask=(lanes >= 0) & (block < BLOCKS), other=0, eviction_policy="evict_first")


@gluon.jit
def expand(
    acc, shrunk_ptr, lora_b_ptr, pairs, rows, first, end,
    N: gl.constexpr,
    RANK: gl.constexpr,
    RANK_PADDED: gl.constexpr,
    BLOCK_R: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    A: gl.constexpr,
    B: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """acc + B (x A^T)^T for the adapter whose rows of B begin at `rows`."""
    for rank in gl.static_range(0, RANK_PADDED, BLOCK_R):
        shrunk = load_shrunk(shrunk_ptr, first, end, rank, pairs, RANK_PADDED, SPLITS, BLOCK_M, BLOCK_R, WARPS)
        b = load_lora_b(lora_b_ptr, rows, gl.program_id(0) * (16 * WARPS), rank, N, RANK, BLOCK_R, A, WARPS)
        acc = mma_v2(b, gl.convert_layout(shrunk.permute((1, 0)), B), acc)
    return acc


@gluon.jit(do_not_specialize=["pairs"])
def packed_few_rows_kernel(
    x_ptr,  # gate_up: (T, KP) bf16; down: (P, KP) bf16 by position; both interleaved
    words_ptr,  # (E, NP / 64, KP / 64, 512) int32
    scales_ptr,  # (E, NP / 64, KP / 64, 32) int32
    bias_ptr,  # (E, N) bf16 or float32, or None
    gates_ptr,  # down: (P,) float32, routing weight by pair; gate_up: None
    shrunk_ptr,  # (SPLITS, P, RANK_PADDED) float32 by position, or None without LoRA
    lora_b_ptr,  # (A, E, N, R) bf16 or float32, or None without LoRA
    adapter_ids_ptr,  # (T,) int32, -1 for none; None: adapter 0 for all
    order_ptr,  # (P,) int32, position -> pair
    tiles_ptr,  # (slots, 3) int32: expert or -1, first position, end position
    out_ptr,  # gate_up: (P, OUT_WIDTH) bf16 by position, interleaved; down: (P, N) bf16 by pair
    pairs,
    N: gl.constexpr,
    KP: gl.constexpr,
    EXPERTS: gl.constexpr,
    TOP_K: gl.constexpr,
    ADAPTERS: gl.constexpr,
    RANK: gl.constexpr,
    RANK_PADDED: gl.constexpr,
    BLOCK_R: gl.constexpr,
    SPLITS: gl.constexpr,
    GATE_UP: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    OUT_WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    AHEAD: gl.constexpr,
    TOKENS_AHEAD: gl.constexpr,
    WARPS: gl.constexpr,
):
    """As grouped_matmul_kernel, of 16 columns a warp and BLOCK_M rows, AHEAD blocks of weights in flight.

    Grid: (cdiv(N, 16 * WARPS), slots); gate_up's N is padded to 128.
    """
    # Layouts of the accumulators, the product's two operands, words, scales and tokens.
    C: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, C, 2)
    W: gl.constexpr = words_layout(WARPS)
    S: gl.constexpr = scales_layout(WARPS)
    TOKEN_REGS: gl.constexpr = [[8, 0, 0], [16, 0, 0], [32, 0, 0]][: BLOCK_M // 16 - BLOCK_M // 64]
    X: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8]] + TOKEN_REGS,
        [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[0, 0, 0], [0, 0, 0]][: WARPS // 2],
        [],
        [BLOCK_M, 4, 16],
    )
    BLOCKS: gl.constexpr = KP // 64
    COLUMN_BLOCKS: gl.constexpr = (N + 63) // 64
    tile = gl.program_id(1)
    expert = gl.load(tiles_ptr + tile * 3)
    if expert >= 0:
        first = gl.load(tiles_ptr + tile * 3 + 1)
        end = gl.load(tiles_ptr + tile * 3 + 2)
        word = word_offsets(WARPS, 0, W)
        scale = scale_offsets(WARPS, 0, S)
        # gate_up's last programs may lie past N, where they write the zeros that pad the activations.
        PARTS: gl.constexpr = 4 // WARPS
        column_block = gl.minimum(gl.program_id(0) // PARTS, COLUMN_BLOCKS - 1)
        part = gl.program_id(0) % PARTS
        block = (expert.to(gl.int64) * COLUMN_BLOCKS + column_block) * BLOCKS
        words = words_ptr + block * 512 + part * (WARPS * 128) + word
        scales = scales_ptr + block * 32 + part * (WARPS * 8) + scale

        position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, gl.SliceLayout(2, X)))
        row = position
        if GATE_UP:
            row = gl.load(order_ptr + position, mask=position < end, other=0) // TOP_K
        x = (
            x_ptr
            + row.to(gl.int64)[:, None, None] * KP
            + gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, X)))[None, :, None] * 16
            + gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, X)))[None, None, :]
        )
        x_ok = (position < end)[:, None, None]

        acc = gl.zeros([16 * WARPS, BLOCK_M], gl.float32, C)
        nan = gl.zeros([WARPS, 8], gl.int32, S)
        w = ()
        s = ()
        for i in gl.static_range(AHEAD):
            w = w + (load_ahead(words + i * 512, word, i, BLOCKS),)
            s = s + (load_ahead(scales + i * 32, scale, i, BLOCKS),)
        # What the end needs is loaded now, behind the weights.
        OUT: gl.constexpr = gl.BlockedLayout([1, 1], [8 * WARPS, 4 // WARPS], [1, WARPS], [0, 1])
        column = gl.program_id(0) * (8 * WARPS) + gl.arange(0, 8 * WARPS, gl.SliceLayout(1, OUT))
        column_ok = 2 * column < N
        out_position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
        row_ok = out_position < end
        if bias_ptr is not None:
            bias = bias_ptr + expert.to(gl.int64) * N + 2 * column
            bias_even = gl.load(bias, mask=column_ok, other=0.0)
            bias_odd = gl.load(bias + 1, mask=column_ok, other=0.0)
        if not GATE_UP:
            pair = gl.load(order_ptr + out_position, mask=row_ok, other=0)
            gate = gl.load(gates_ptr + pair, mask=row_ok, other=0.0)

        if lora_b_ptr is not None:
            if adapter_ids_ptr is None:
                acc = expand(
                    acc, shrunk_ptr, lora_b_ptr, pairs, expert.to(gl.int64) * N, first, end,
                    N, RANK, RANK_PADDED, BLOCK_R, SPLITS, BLOCK_M, A, B, WARPS,
                )  # fmt: skip
            else:
                used = load_adapters(adapter_ids_ptr, order_ptr, first, end, TOP_K, BLOCK_M, gl.SliceLayout(0, C))
                for adapter in range(ADAPTERS):
                    mine = used == adapter
                    if gl.max(mine.to(gl.int32), axis=0) > 0:
                        zero = gl.zeros([16 * WARPS, BLOCK_M], gl.float32, C)
                        expanded = expand(
                            zero, shrunk_ptr, lora_b_ptr, pairs, (adapter * EXPERTS + expert).to(gl.int64) * N,
                            first, end, N, RANK, RANK_PADDED, BLOCK_R, SPLITS, BLOCK_M, A, B, WARPS,
                        )  # fmt: skip
                        acc = gl.where(mine[None, :], expanded, acc)
        xs = ()
        for i in gl.static_range(TOKENS_AHEAD):
            xs = xs + (gl.load(x + i * 64, mask=x_ok & (i < BLOCKS), other=0.0),)
        for start in range(0, BLOCKS, AHEAD):
            next_w = ()
            next_s = ()
            for i in gl.static_range(AHEAD):
                b = start + i + TOKENS_AHEAD
                xs = xs + (gl.load(x + b * 64, mask=x_ok & (b < BLOCKS), other=0.0),)
                b = start + i + AHEAD
                next_w = next_w + (load_ahead(words + b * 512, word, b, BLOCKS),)
                next_s = next_s + (load_ahead(scales + b * 32, scale, b, BLOCKS),)
                nan = nan | nan_bits(s[i])
                tokens = gl.permute(xs[0].reshape([BLOCK_M, 4, 4, 2, 2]), (2, 3, 1, 4, 0)).reshape([64, BLOCK_M])
                xs = xs[1:]
                acc = mma_v2(unpack_weights(w[i], s[i], A), gl.convert_layout(tokens, B), acc)
            w = next_w
            s = next_s

        # Fragment rows g and g + 8 of a warp's 16 are columns 2g and 2g + 1: gate and up, in one thread.
        even, odd = gl.split(gl.permute(acc.reshape([WARPS, 2, 8, BLOCK_M]), (0, 2, 3, 1)))
        even = gl.convert_layout(even.reshape([8 * WARPS, BLOCK_M]), OUT)
        odd = gl.convert_layout(odd.reshape([8 * WARPS, BLOCK_M]), OUT)
        nan = gl.convert_layout(nan.reshape([8 * WARPS]), gl.SliceLayout(1, OUT))[:, None]
        even = gl.where((nan & 0x00800080) != 0, float("nan"), even)
        odd = gl.where((nan & -2147450880) != 0, float("nan"), odd)
        if bias_ptr is not None:
            even += bias_even.to(gl.float32)[:, None]
            odd += bias_odd.to(gl.float32)[:, None]
        ok = column_ok[:, None] & row_ok[None, :]
        if GATE_UP:
            out = swiglu_tile(even, odd, ALPHA, LIMIT).to(gl.bfloat16)
            in_block = column % 64
            slot = (
                column - in_block + in_block % 8 // 2 * 16 + in_block // 16 * 4 + in_block % 16 // 8 * 2 + in_block % 2
            )
            # Columns that pad the width are written too, as zero: the next product reads them.
            out = gl.where(column_ok[:, None], out, 0.0)
            padded_ok = (column < OUT_WIDTH)[:, None] & row_ok[None, :]
            gl.store(out_ptr + out_position.to(gl.int64)[None, :] * OUT_WIDTH + slot[:, None], out, mask=padded_ok)
        else:
            at = out_ptr + pair.to(gl.int64)[None, :] * N + 2 * column[:, None]
            gl.store(at, (even * gate[None, :]).to(gl.bfloat16), mask=ok)
            gl.store(at + 1, (odd * gate[None, :]).to(gl.bfloat16), mask=ok)


def plan_interleave(*, tokens: int, hidden: int) -> Plan:
    """x_interleaved [T, H padded to 64] from x [T, H]."""
    width, block_k = pad(hidden), 1024
    return Plan(
        kernel=interleave_kernel,
        grid=(tokens, cdiv(width, block_k)),
        operands={"x_ptr": "x"},
        outputs={"out_ptr": Buffer("x_interleaved", (tokens, width), "bfloat16")},
        constexprs={"K": hidden, "KP": width, "BLOCK_K": block_k},
        bytes_accessed=2 * tokens * (hidden + width),
    )


def plan_packed_few_rows(
    projection: str,
    *,
    n: int,
    k: int,
    slots: int,
    pairs: int,
    top_k: int,
    experts: int,
    bias: bool,
    adapters: int,
    rank: int | None,
    adapter_ids: bool,
    swiglu_alpha: float,
    swiglu_limit: float,
    tile: FewRowsTile,
) -> Plan:
    """gate_up: activations [P, I padded to 64], interleaved, from x_interleaved. down: pair_out [P, H] from these."""
    gate_up = projection == "gate_up"
    width = pad(n // 2) if gate_up else n
    columns = 16 * tile.num_warps
    programs = 2 * width // columns if gate_up else cdiv(n, columns)
    out = Buffer("activations" if gate_up else "pair_out", (pairs, width), "bfloat16")
    return Plan(
        kernel=packed_few_rows_kernel,
        grid=(programs, slots),
        operands={
            "x_ptr": "x_interleaved" if gate_up else "activations",
            "words_ptr": projection,
            "scales_ptr": f"{projection}_scales",
            "bias_ptr": f"{projection}_bias" if bias else None,
            "gates_ptr": None if gate_up else "weights",
            **lora_operands(projection, rank, adapter_ids),
            "order_ptr": "order",
            "tiles_ptr": "tiles",
        },
        scalars={"pairs": pairs},
        outputs={"out_ptr": out},
        constexprs={
            "N": n,
            "KP": pad(k),
            "EXPERTS": experts,
            "TOP_K": top_k,
            **lora_constexprs(adapters, rank, tile.shrink_splits),
            "GATE_UP": gate_up,
            "ALPHA": swiglu_alpha,
            "LIMIT": swiglu_limit,
            "OUT_WIDTH": width,
            "BLOCK_M": tile.block_m,
            "AHEAD": tile.ahead,
            "TOKENS_AHEAD": tile.tokens_ahead,
            "WARPS": tile.num_warps,
        },
        num_warps=tile.num_warps,
        num_stages=1,
        flops=2 * pairs * n * (k + (rank or 0)),
        bytes_accessed=min(pairs, experts) * n * k * 17 // 32 + 2 * pairs * (k + width),
    )


def pad(size: int) -> int:
    """The size of whole packed blocks, 64 wide."""
    return cdiv(size, 64) * 64
