"""The experts' two products from packed MXFP4, for few rows an expert: the weights stream from memory to registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from jmoe.triton_src.activation import swiglu_tile
from jmoe.triton_src.interleave import interleaved_width
from jmoe.triton_src.lora import lora_constexprs, lora_operands
from jmoe.triton_src.packed_lora import load_adapters, load_shrunk, packed_column
from jmoe.triton_src.packed_weight import (
    nan_bits,
    scale_offsets,
    scales_layout,
    unpack_weights,
    word_offsets,
    words_layout,
)
from jmoe.triton_src.plan import Buffer, Plan, cdiv
from jmoe.triton_src.stacked import Stacked, in_stack
from jmoe.triton_src.tiles import FewRowsTile


@gluon.jit
def load_ahead(pointers, block, BLOCKS: gl.constexpr, EXACT: gl.constexpr):
    """Words or scales of each warp's block, which nobody reads again soon; past the last zero, or if EXACT unused."""
    if EXACT:
        return gl.load(pointers, mask=block < BLOCKS, eviction_policy="evict_first")
    else:
        return gl.load(pointers, mask=block < BLOCKS, other=0, eviction_policy="evict_first")


@gluon.jit
def load_tokens(pointers, block, BLOCKS: gl.constexpr, EXACT: gl.constexpr):
    """load_ahead for tokens."""
    if EXACT:
        return gl.load(pointers, mask=block < BLOCKS)
    else:
        return gl.load(pointers, mask=block < BLOCKS, other=0.0)


@gluon.jit
def load_shrunk_blocks(
    shrunk_ptr, pairs, first, end,
    RANK_PADDED: gl.constexpr,
    BLOCK_R: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    PARTS: gl.constexpr,
    ROWS: gl.constexpr,
    B: gl.constexpr,
):  # fmt: skip
    """(x A^T)^T of the tile's rows, each by its own adapter, as the products take it: a block for each BLOCK_R ranks.

    Of the parts of K the first has it and the others zeros.
    """
    blocks = ()
    for rank in gl.static_range(0, RANK_PADDED, BLOCK_R):
        shrunk = load_shrunk(shrunk_ptr, first, end, rank, pairs, RANK_PADDED, SPLITS, BLOCK_M, BLOCK_R, PARTS * ROWS)
        shrunk = shrunk.permute((1, 0)).reshape([1, BLOCK_R, BLOCK_M])
        zeros = gl.zeros([PARTS, BLOCK_R, BLOCK_M], gl.bfloat16, shrunk.type.layout)
        part = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, shrunk.type.layout)))[:, None, None]
        blocks = blocks + (gl.convert_layout(gl.where(part == 0, shrunk, zeros), B),)
    return blocks


@gluon.jit
def expand(
    acc, shrunk, lora_b_ptr, rows,
    N: gl.constexpr,
    RANK: gl.constexpr,
    BLOCK_R: gl.constexpr,
    PARTS: gl.constexpr,
    ROWS: gl.constexpr,
    A: gl.constexpr,
):  # fmt: skip
    """acc + B (x A^T)^T for the adapter whose rows of B begin at `rows`: the first part's work."""
    part = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, A)))[:, None, None]
    fragment_row = gl.arange(0, 16 * ROWS, gl.SliceLayout(0, gl.SliceLayout(2, A)))[None, :, None]
    column = gl.program_id(0) * (16 * ROWS) + packed_column(fragment_row)
    ranks = gl.arange(0, BLOCK_R, gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, None, :]
    for i in gl.static_range(len(shrunk)):
        rank = i * BLOCK_R + ranks
        at = lora_b_ptr + (rows + column) * RANK + rank
        b = gl.load(at, mask=(part == 0) & (column < N) & (rank < RANK), other=0.0).to(gl.bfloat16)
        acc = mma_v2(b, shrunk[i], acc)
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
    layer_ptr,  # (1,) int32: which layer's weights, of several; None: there is one layer's
    lora_layer_ptr,  # (1,) int32: which layer's LoRA, of several; None: there is one layer's
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
    PARTS: gl.constexpr,
    ROWS: gl.constexpr,
):
    """As grouped_matmul_kernel, of ROWS * 16 columns and BLOCK_M rows, with PARTS * ROWS warps.

    A warp has 16 columns and takes turns along K with PARTS - 1 others; AHEAD blocks of weights are in flight. Grid:
    (cdiv(N, ROWS * 16), slots); gate_up's N is padded to 128.
    """
    # Layouts of the accumulators, the product's two operands, words, scales and tokens.
    C: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[PARTS, ROWS, 1], instr_shape=[1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, C, 2)
    WARPS: gl.constexpr = PARTS * ROWS
    W: gl.constexpr = words_layout(WARPS)
    S: gl.constexpr = scales_layout(WARPS)
    TOKEN_REGS: gl.constexpr = [[0, 8, 0, 0], [0, 16, 0, 0], [0, 32, 0, 0]][: BLOCK_M // 16 - BLOCK_M // 64]
    X: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 0, 8]] + TOKEN_REGS,
        [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0]][: ROWS // 2] + [[1, 0, 0, 0], [2, 0, 0, 0]][: PARTS // 2],
        [],
        [PARTS, BLOCK_M, 4, 16],
    )
    BLOCKS: gl.constexpr = KP // 64
    COLUMN_BLOCKS: gl.constexpr = (N + 63) // 64
    STEPS: gl.constexpr = (BLOCKS + PARTS - 1) // PARTS
    EXACT: gl.constexpr = BLOCKS % (PARTS * AHEAD) == 0
    tile = gl.program_id(1)
    expert = gl.load(tiles_ptr + tile * 3)
    if expert >= 0:
        first = gl.load(tiles_ptr + tile * 3 + 1)
        end = gl.load(tiles_ptr + tile * 3 + 2)
        # gate_up's last programs may lie past N, where they write the zeros that pad the activations.
        column_block = gl.minimum(gl.program_id(0) * ROWS // 4, COLUMN_BLOCKS - 1)
        row_of_block = gl.program_id(0) * ROWS % 4
        matrix = in_stack(expert, layer_ptr, EXPERTS).to(gl.int64)
        lora_expert = in_stack(expert, lora_layer_ptr, ADAPTERS * EXPERTS)
        block = (matrix * COLUMN_BLOCKS + column_block) * BLOCKS
        warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, W))))[:, None, None, None]
        word_part = warp // ROWS
        words = (
            words_ptr + block * 512 + row_of_block * 128 + word_offsets(WARPS, 128, W) + word_part * (512 - ROWS * 128)
        )
        warp = gl.arange(0, WARPS, gl.SliceLayout(1, S))[:, None]
        scale_part = warp // ROWS
        scales = scales_ptr + block * 32 + row_of_block * 8 + scale_offsets(WARPS, 8, S) + scale_part * (32 - ROWS * 8)
        w = ()
        s = ()
        for i in gl.static_range(AHEAD):
            w = w + (load_ahead(words + i * (PARTS * 512), i * PARTS + word_part, BLOCKS, EXACT),)
            s = s + (load_ahead(scales + i * (PARTS * 32), i * PARTS + scale_part, BLOCKS, EXACT),)

        # Positions past the end repeat the last one: what comes of them is not stored.
        position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, X))))
        row = gl.minimum(position, end - 1)
        if GATE_UP:
            row = gl.load(order_ptr + row) // TOP_K
        x_part = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, X))))[:, None, None, None]
        x = (
            x_ptr
            + row.to(gl.int64)[None, :, None, None] * KP
            + x_part * 64
            + gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, X))))[None, None, :, None] * 16
            + gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, X))))[None, None, None, :]
        )

        # What the end needs is loaded now, behind the weights.
        OUT: gl.constexpr = gl.BlockedLayout([1, 1], [8 * ROWS, 4 // ROWS], [1, WARPS], [0, 1])
        column = gl.program_id(0) * (8 * ROWS) + gl.arange(0, 8 * ROWS, gl.SliceLayout(1, OUT))
        column_ok = 2 * column < N
        out_position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
        row_ok = out_position < end
        if bias_ptr is not None:
            bias = bias_ptr + matrix * N + 2 * column
            bias_even = gl.load(bias, mask=column_ok, other=0.0)
            bias_odd = gl.load(bias + 1, mask=column_ok, other=0.0)
        if not GATE_UP:
            pair = gl.load(order_ptr + out_position, mask=row_ok, other=0)
            gate = gl.load(gates_ptr + pair, mask=row_ok, other=0.0)

        acc = gl.zeros([PARTS, 16 * ROWS, BLOCK_M], gl.float32, C)
        nan = gl.zeros([WARPS, 8], gl.int32, S)
        if lora_b_ptr is not None:
            shrunk = load_shrunk_blocks(
                shrunk_ptr, pairs, first, end, RANK_PADDED, BLOCK_R, SPLITS, BLOCK_M, PARTS, ROWS, B
            )
            if adapter_ids_ptr is None:
                acc = expand(acc, shrunk, lora_b_ptr, lora_expert.to(gl.int64) * N, N, RANK, BLOCK_R, PARTS, ROWS, A)
            else:
                COLUMN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, C))
                used = load_adapters(adapter_ids_ptr, order_ptr, first, end, TOP_K, BLOCK_M, COLUMN)
                for adapter in range(ADAPTERS):
                    mine = used == adapter
                    if gl.max(mine.to(gl.int32), axis=0) > 0:
                        zero = gl.zeros([PARTS, 16 * ROWS, BLOCK_M], gl.float32, C)
                        own = (adapter * EXPERTS + lora_expert).to(gl.int64) * N
                        expanded = expand(zero, shrunk, lora_b_ptr, own, N, RANK, BLOCK_R, PARTS, ROWS, A)
                        acc = gl.where(mine[None, None, :], expanded, acc)

        xs = ()
        for i in gl.static_range(TOKENS_AHEAD):
            xs = xs + (load_tokens(x + i * (PARTS * 64), i * PARTS + x_part, BLOCKS, EXACT),)
        for start in range(0, STEPS, AHEAD):
            next_w = ()
            next_s = ()
            for i in gl.static_range(AHEAD):
                b = (start + i + TOKENS_AHEAD) * PARTS
                xs = xs + (load_tokens(x + b * 64, b + x_part, BLOCKS, EXACT),)
                b = (start + i + AHEAD) * PARTS
                next_w = next_w + (load_ahead(words + b * 512, b + word_part, BLOCKS, EXACT),)
                next_s = next_s + (load_ahead(scales + b * 32, b + scale_part, BLOCKS, EXACT),)
                nan = nan | nan_bits(s[i])
                tokens = gl.permute(xs[0].reshape([PARTS, BLOCK_M, 4, 4, 2, 2]), (0, 3, 4, 2, 5, 1))
                tokens = gl.convert_layout(tokens.reshape([PARTS, 64, BLOCK_M]), B)
                xs = xs[1:]
                acc = mma_v2(unpack_weights(w[i], s[i], A), tokens, acc)
            w = next_w
            s = next_s

        # Fragment rows g and g + 8 are columns 2g and 2g + 1: gate and up.
        total = gl.sum(acc, axis=0).reshape([ROWS, 2, 8, BLOCK_M])
        even, odd = gl.split(gl.permute(total, (0, 2, 3, 1)))
        even = gl.convert_layout(even.reshape([8 * ROWS, BLOCK_M]), OUT)
        odd = gl.convert_layout(odd.reshape([8 * ROWS, BLOCK_M]), OUT)
        nan = nan.reshape([PARTS, 8 * ROWS])
        nan_even = gl.max(((nan & 0x00800080) != 0).to(gl.int32), axis=0)
        nan_odd = gl.max(((nan & -2147450880) != 0).to(gl.int32), axis=0)
        COLUMNS: gl.constexpr = gl.SliceLayout(1, OUT)
        even = gl.where(gl.convert_layout(nan_even, COLUMNS)[:, None] != 0, float("nan"), even)
        odd = gl.where(gl.convert_layout(nan_odd, COLUMNS)[:, None] != 0, float("nan"), odd)
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
    stacked: Stacked,
    swiglu_alpha: float,
    swiglu_limit: float,
    tile: FewRowsTile,
) -> Plan:
    """gate_up: activations [P, I padded to 64], interleaved, from x_interleaved. down: pair_out [P, H] from these."""
    gate_up = projection == "gate_up"
    width = interleaved_width(n // 2) if gate_up else n
    columns = 16 * tile.column_warps
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
            **stacked.weights_operand,
            **stacked.lora_operand,
        },
        scalars={"pairs": pairs},
        outputs={"out_ptr": out},
        constexprs={
            "N": n,
            "KP": interleaved_width(k),
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
            "PARTS": 4 // tile.column_warps,
            "ROWS": tile.column_warps,
        },
        num_warps=4,
        num_stages=1,
        flops=2 * pairs * n * (k + (rank or 0)),
        bytes_accessed=min(pairs, experts) * n * k * 17 // 32 + 2 * pairs * (k + width),
    )
