"""A tile of an expert's product from packed MXFP4, for many rows: weights in registers, tokens in shared memory.

A warp group's wgmma takes decoded weights as operand A from registers, so they never pass through shared memory, and
tokens as operand B. While one product runs, the warps decode the weights of the next.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from jmoe.triton_src.activation_tile import activate, keep_clamped
from jmoe.triton_src.packed.lora import load_adapters, load_lora_b, load_shrunk
from jmoe.triton_src.packed.operands import Tile
from jmoe.triton_src.packed.ready_counters import signal, wait
from jmoe.triton_src.packed.weight import (
    any_large,
    nan_bits,
    nan_rows,
    scale_offsets,
    scales_layout,
    unknown,
    unpack_weights,
    word_offsets,
    words_layout,
)
from jmoe.triton_src.row_adapters import next_adapter
from jmoe.triton_src.stacked import in_stack


@gluon.jit
def copy_tokens(stages, stage, x, row_ok, k_in_stage, k, K: gl.constexpr):
    """Starts the copy of 128 columns from k on of the tile's rows into a stage; zeros past the rows and past K."""
    async_copy.async_load(stages.index(stage), x + k, mask=row_ok & (k + k_in_stage < K))
    async_copy.commit_group()


@gluon.jit
def load_ahead(pointers, offsets, block, STRIDE: gl.constexpr, BLOCKS: gl.constexpr):
    """A block's words or scales; zero past the last block."""
    return gl.load(pointers + block * STRIDE, mask=(offsets >= 0) & (block < BLOCKS), other=0)


@gluon.jit
def in_column_blocks(offset, stride, BLOCK: gl.constexpr):
    """An offset into two blocks of 64 columns side by side, as one into the weights, where these lie `stride` apart.

    The stride is in blocks, and 0 where there is no second block: the first is taken twice, and stored once.
    """
    return offset + offset // BLOCK * (stride * BLOCK - BLOCK)


@gluon.jit
def packed_tile(p, rows, tile, pre_activations_ptr, program, BLOCK_M: gl.constexpr):
    """Columns `program` * 128 and on of a tile of at most BLOCK_M rows."""
    STAGES: gl.constexpr = p.STAGES
    C: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK_M, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    W: gl.constexpr = words_layout(8)
    S: gl.constexpr = scales_layout(8)
    X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BLOCKS: gl.constexpr = (p.K + 63) // 64

    x, row_ok, k_in_stage = rows_of_tile(p, rows, tile.first, tile.end, BLOCK_M, X)
    words, word, scales, scale = weights_of(p, rows, tile, program, W, S)
    w = ()
    s = ()
    for i in gl.static_range(p.AHEAD):
        w = w + (load_ahead(words, word, i, 512, BLOCKS),)
        s = s + (load_ahead(scales, scale, i, 32, BLOCKS),)

    wait(tile.counter, p.X_READY)
    stages = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, 128], SHARED)
    for i in gl.static_range(STAGES - 1):
        copy_tokens(stages, i, x, row_ok, k_in_stage, 128 * i, p.K)

    # The last stage holds no tokens until the loop below fills it.
    acc = lora_alone(stages.index(STAGES - 1), p, rows, tile, program, BLOCK_M, C)
    seen = s[0]
    even = unpack_weights(w[0], s[0], A)
    read = 0
    write = STAGES - 1
    for block in range(0, BLOCKS // 2 * 2, 2):
        async_copy.wait_group(STAGES - 2)
        acc = warpgroup_mma(even, stages.index(read).slice(0, 64, dim=1).permute((1, 0)), acc, is_async=True)
        seen = seen | s[1]
        odd = unpack_weights(w[1], s[1], A)
        ahead_w = ()
        ahead_s = ()
        for i in gl.static_range(2):
            ahead_w = ahead_w + (load_ahead(words, word, block + p.AHEAD + i, 512, BLOCKS),)
            ahead_s = ahead_s + (load_ahead(scales, scale, block + p.AHEAD + i, 32, BLOCKS),)
        w = w[2:] + ahead_w
        s = s[2:] + ahead_s
        # The next operand is among what the wait is for, so that it is decoded while the product runs.
        acc, odd = warpgroup_mma_wait(num_outstanding=0, deps=[acc, odd])
        acc = warpgroup_mma(odd, stages.index(read).slice(64, 64, dim=1).permute((1, 0)), acc, is_async=True)
        copy_tokens(stages, write, x, row_ok, k_in_stage, (block + 2 * (STAGES - 1)) * 64, p.K)
        seen = seen | s[0]
        even = unpack_weights(w[0], s[0], A)
        acc, even = warpgroup_mma_wait(num_outstanding=0, deps=[acc, even])
        read = gl.where(read == STAGES - 1, 0, read + 1)
        write = gl.where(write == STAGES - 1, 0, write + 1)
    if BLOCKS % 2:
        async_copy.wait_group(STAGES - 2)
        acc = warpgroup_mma(even, stages.index(read).slice(0, 64, dim=1).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    async_copy.wait_group(0)
    if any_large(seen):
        acc = multiply_by_any_scale(stages, p, rows, tile, program, BLOCK_M, C)
    store_tile(acc, p, rows, tile, pre_activations_ptr, program, BLOCK_M)
    if p.GATE_UP:  # noqa: SIM102
        if tile.counter is not None:
            signal(tile.counter, tile.signals)


@gluon.jit
def lora_alone(stage, p, rows, tile, program, BLOCK_M: gl.constexpr, C: gl.constexpr):
    """The accumulators (128, BLOCK_M) before any weight: LoRA's part of the tile, or zeros. A stage is room for it."""
    acc = gl.zeros([128, BLOCK_M], gl.float32, C)
    if p.lora.b_ptr is not None:
        expert = in_stack(tile.expert, p.lora.layer_ptr, rows.ADAPTERS * rows.EXPERTS)
        shrunk = stage.slice(0, p.lora.BLOCK_R, dim=1)
        if rows.adapter_ids_ptr is None:
            acc = expand(acc, shrunk, p, rows.pairs, expert, tile.first, tile.end, program, BLOCK_M)
        else:
            # Half of the tile at a time: a whole second accumulator does not fit beside the first.
            HALF: gl.constexpr = BLOCK_M // 2
            part = shrunk.slice(0, HALF, dim=0)
            low = expand_mixed(part, p, rows, expert, tile.first, tile.end, program, HALF)
            high = expand_mixed(part, p, rows, expert, tile.first + HALF, tile.end, program, HALF)
            both = gl.permute(gl.join(low, high), (0, 2, 1)).reshape([128, BLOCK_M])
            acc = gl.convert_layout(both, C)
    return acc


@gluon.jit
def multiply_by_any_scale(stages, p, rows, tile, program, BLOCK_M: gl.constexpr, C: gl.constexpr):
    """The accumulators of packed_tile, whatever the scales are: NaN where a scale is. Few weights have large ones."""
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    W: gl.constexpr = words_layout(8)
    S: gl.constexpr = scales_layout(8)
    X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    BLOCKS: gl.constexpr = (p.K + 63) // 64
    # What follows is computed anew: kept for here, it would take registers from the loops before.
    tile = Tile(unknown(tile.expert), unknown(tile.first), unknown(tile.end), tile.counter, tile.signals)
    program = unknown(program)
    gl.barrier()
    acc = lora_alone(stages.index(0), p, rows, tile, program, BLOCK_M, C)
    x, row_ok, k_in_stage = rows_of_tile(p, rows, tile.first, tile.end, BLOCK_M, X)
    words, word, scales, scale = weights_of(p, rows, tile, program, W, S)
    nan = gl.zeros([8, 8], gl.int32, S)
    for block in range(BLOCKS):
        gl.barrier()
        copy_tokens(stages, 0, x, row_ok, k_in_stage, block * 64, p.K)
        w = load_ahead(words, word, block, 512, BLOCKS)
        s = load_ahead(scales, scale, block, 32, BLOCKS)
        nan = nan | nan_bits(s)
        a = unpack_weights(w, s, A, True)
        async_copy.wait_group(0)
        fence_async_shared()
        gl.barrier()
        acc = warpgroup_mma(a, stages.index(0).slice(0, 64, dim=1).permute((1, 0)), acc)
    return nan_rows(acc, nan)


@gluon.jit
def rows_of_tile(p, rows, first, end, BLOCK_M: gl.constexpr, X: gl.constexpr):
    """(pointers to the tile's rows of x, whether there are such rows, columns of a stage), by a stage's layout."""
    position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, X))
    row_ok = (position < end)[:, None]
    row = position
    if p.GATE_UP:
        row = gl.load(rows.order_ptr + position, mask=position < end, other=0) // rows.TOP_K
    k_in_stage = gl.arange(0, 128, gl.SliceLayout(0, X))[None, :]
    return p.x_ptr + row.to(gl.int64)[:, None] * p.K + k_in_stage, row_ok, k_in_stage


@gluon.jit
def weights_of(p, rows, tile, program, W: gl.constexpr, S: gl.constexpr):
    """(words' pointers, offsets, scales' pointers, offsets) of the program's first block along K."""
    BLOCKS: gl.constexpr = (p.K + 63) // 64
    COLUMN_BLOCKS: gl.constexpr = (p.N + 63) // 64
    stride = gl.where(program * 2 + 1 < COLUMN_BLOCKS, BLOCKS, 0)
    matrix = in_stack(tile.expert, p.layer_ptr, rows.EXPERTS)
    block = (matrix.to(gl.int64) * COLUMN_BLOCKS + program * 2) * BLOCKS
    word = in_column_blocks(word_offsets(8, 128, W), stride, 512)
    scale = in_column_blocks(scale_offsets(8, 8, S), stride, 32)
    return p.words_ptr + block * 512 + word, word, p.scales_ptr + block * 32 + scale, scale


@gluon.jit
def expand(acc, shared, p, pairs, matrix, first, end, program, BLOCK_M: gl.constexpr):
    """acc + B (x A^T)^T for the matrix of an adapter and expert."""
    lora = p.lora
    A: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    for rank in range(0, lora.RANK_PADDED, lora.BLOCK_R):
        shared.store(load_shrunk(lora, first, end, rank, pairs, BLOCK_M, 8))
        b = load_lora_b(lora, matrix, program * 128, rank, p.N, A, 8)
        fence_async_shared()
        gl.barrier()
        acc = warpgroup_mma(b, shared.permute((1, 0)), acc)
    return acc


@gluon.jit
def expand_mixed(shared, p, rows, expert, first, end, program, BLOCK_M: gl.constexpr):
    """(128, BLOCK_M) B (x A^T)^T of each position's own adapter; others' are selected away, not multiplied by zero."""
    C: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK_M, 16])
    acc = gl.zeros([128, BLOCK_M], gl.float32, C)
    used = load_adapters(rows, first, end, BLOCK_M, gl.SliceLayout(0, C))
    adapter = next_adapter(used, -1, rows.ADAPTERS)
    while adapter < rows.ADAPTERS:
        own = adapter * rows.EXPERTS + expert
        zero = gl.zeros([128, BLOCK_M], gl.float32, C)
        expanded = expand(zero, shared, p, rows.pairs, own, first, end, program, BLOCK_M)
        acc = gl.where((used == adapter)[None, :], expanded, acc)
        adapter = next_adapter(used, adapter, rows.ADAPTERS)
    return acc


@gluon.jit
def store_tile(acc, p, rows, tile, pre_activations_ptr, program, BLOCK_M: gl.constexpr):
    """What follows the product, and the store."""
    column = program * 128
    POSITIONS: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    position = tile.first + gl.arange(0, BLOCK_M, POSITIONS)
    pairs = gl.load(rows.order_ptr + position, mask=position < tile.end, other=0)
    # Fragment rows g and g + 8 of a warp's 16 are columns 2g and 2g + 1: gate and up, in one thread.
    even, odd = gl.split(gl.permute(acc.reshape([8, 2, 8, BLOCK_M]), (0, 2, 3, 1)))
    even = even.reshape([64, BLOCK_M])
    odd = odd.reshape([64, BLOCK_M])
    COLUMNS: gl.constexpr = gl.SliceLayout(1, even.type.layout)
    ROWS: gl.constexpr = gl.SliceLayout(0, even.type.layout)
    if p.bias_ptr is not None:
        pair_column = column + 2 * gl.arange(0, 64, COLUMNS)
        matrix = in_stack(tile.expert, p.layer_ptr, rows.EXPERTS)
        bias = p.bias_ptr + matrix.to(gl.int64) * p.N + pair_column
        even += gl.load(bias, mask=pair_column < p.N, other=0.0).to(gl.float32)[:, None]
        odd += gl.load(bias + 1, mask=pair_column < p.N, other=0.0).to(gl.float32)[:, None]
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 8], [0, 1])
    out_position = tile.first + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
    row_ok = out_position < tile.end
    if pre_activations_ptr is not None:
        kept_gate, kept_up = keep_clamped(even, odd, p.ACTIVATION)
        store_columns(pre_activations_ptr, kept_gate, kept_up, out_position, row_ok, column, p.N, BLOCK_M, OUT)
    if p.GATE_UP:
        out = gl.convert_layout(activate(even, odd, p.ACTIVATION).to(gl.bfloat16), OUT)
        out_column = column // 2 + gl.arange(0, 64, gl.SliceLayout(1, OUT))
        ok = (out_column < p.OUT_WIDTH)[:, None] & row_ok[None, :]
        gl.store(p.out_ptr + out_position.to(gl.int64)[None, :] * p.OUT_WIDTH + out_column[:, None], out, mask=ok)
    else:
        gates = gl.load(p.gates_ptr + pairs, mask=position < tile.end, other=0.0)
        gate = gl.convert_layout(gates, ROWS)[None, :]
        pair = gl.convert_layout(pairs, gl.SliceLayout(0, OUT))
        store_columns(p.out_ptr, even * gate, odd * gate, pair, row_ok, column, p.N, BLOCK_M, OUT)


@gluon.jit
def store_columns(out_ptr, even, odd, row, row_ok, column, N: gl.constexpr, BLOCK_M: gl.constexpr, OUT: gl.constexpr):
    """out[row, column + 2i] = even[i], out[row, column + 2i + 1] = odd[i], in bf16."""
    both = gl.permute(gl.join(even.to(gl.bfloat16), odd.to(gl.bfloat16)), (0, 2, 1))
    out = gl.convert_layout(both.reshape([128, BLOCK_M]), OUT)
    out_column = column + gl.arange(0, 128, gl.SliceLayout(1, OUT))
    ok = (out_column < N)[:, None] & row_ok[None, :]
    gl.store(out_ptr + row.to(gl.int64)[None, :] * N + out_column[:, None], out, mask=ok)
