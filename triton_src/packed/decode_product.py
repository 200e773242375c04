"""One of the experts' two products from packed MXFP4, for few rows: weights stream from memory to registers.

The four warps share their tokens through shared memory, into which copies run ahead without taking registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from jmoe.triton_src.activation_tile import activate
from jmoe.triton_src.packed.lora import load_adapters, load_shrunk, packed_column
from jmoe.triton_src.packed.operands import Tile
from jmoe.triton_src.packed.ready_counters import signal, wait
from jmoe.triton_src.packed.tokens import (
    copy_stage,
    row_pointers,
    stage_layout,
    swizzled_stage,
    tokens_layout,
    tokens_operand,
)
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
from jmoe.triton_src.routing.mma_k_order import mma_k_slot
from jmoe.triton_src.row_adapters import next_adapter
from jmoe.triton_src.stacked import in_stack


@gluon.constexpr_function
def accumulator_layout(k_parts, column_warps):
    """Of (k_parts, 16 * column_warps, tokens): a warp has 16 of the columns in one part of K."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[k_parts, column_warps, 1], instr_shape=[1, 16, 8])


@gluon.aggregate
class Stream:
    """The weights of a program's columns, in steps along K of a block of 64 for each of K_PARTS."""

    words: gl.tensor  # pointers, of the first step
    scales: gl.tensor
    word_part: gl.tensor
    scale_part: gl.tensor
    BLOCKS: gl.constexpr
    K_PARTS: gl.constexpr


@gluon.jit
def first_fragment(program, COLUMN_WARPS: gl.constexpr, N: gl.constexpr):
    """(block of 64 columns, quarter of it) where a program's columns begin: 16 are a quarter of a block, and a warp's.

    gate_up's last programs may lie past N, where they write the zeros that pad the activations.
    """
    COLUMN_BLOCKS: gl.constexpr = (N + 63) // 64
    return gl.minimum(program * COLUMN_WARPS // 4, COLUMN_BLOCKS - 1), program * COLUMN_WARPS % 4


@gluon.jit
def to_k_part(warp, COLUMN_WARPS: gl.constexpr, FRAGMENT: gl.constexpr, BLOCK: gl.constexpr):
    """How much further than warp * FRAGMENT a warp's weights lie: each COLUMN_WARPS of them share a block along K."""
    return warp // COLUMN_WARPS * (BLOCK - COLUMN_WARPS * FRAGMENT)


@gluon.jit
def weights_of(p, rows, tile, program, K_PARTS: gl.constexpr, COLUMN_WARPS: gl.constexpr):
    """The Stream of columns `program` * 16 * COLUMN_WARPS and on; a warp has 16 of them in one part of K."""
    WARPS: gl.constexpr = K_PARTS * COLUMN_WARPS
    W: gl.constexpr = words_layout(WARPS)
    S: gl.constexpr = scales_layout(WARPS)
    BLOCKS: gl.constexpr = (p.K + 63) // 64
    COLUMN_BLOCKS: gl.constexpr = (p.N + 63) // 64
    column_block, quarter = first_fragment(program, COLUMN_WARPS, p.N)
    matrix = in_stack(tile.expert, p.layer_ptr, rows.EXPERTS).to(gl.int64)
    block = (matrix * COLUMN_BLOCKS + column_block) * BLOCKS
    word_warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, W))))[:, None, None, None]
    words = (
        p.words_ptr + block * 512 + quarter * 128 + word_offsets(WARPS, 128, W)
        + to_k_part(word_warp, COLUMN_WARPS, 128, 512)
    )  # fmt: skip
    scale_warp = gl.arange(0, WARPS, gl.SliceLayout(1, S))[:, None]
    scales = (
        p.scales_ptr + block * 32 + quarter * 8 + scale_offsets(WARPS, 8, S)
        + to_k_part(scale_warp, COLUMN_WARPS, 8, 32)
    )  # fmt: skip
    return Stream(words, scales, word_warp // COLUMN_WARPS, scale_warp // COLUMN_WARPS, BLOCKS, K_PARTS)


@gluon.jit
def load_weights(stream, step, MASK: gl.constexpr):
    """(words, scales) of a step, which nobody reads again soon; zero past the last block, if MASK."""
    block = step * stream.K_PARTS
    words = stream.words + block * 512
    scales = stream.scales + block * 32
    if MASK:
        word_ok = block + stream.word_part < stream.BLOCKS
        scale_ok = block + stream.scale_part < stream.BLOCKS
        w = gl.load(words, mask=word_ok, other=0, eviction_policy="evict_first")
        s = gl.load(scales, mask=scale_ok, other=0, eviction_policy="evict_first")
    else:
        w = gl.load(words, eviction_policy="evict_first")
        s = gl.load(scales, eviction_policy="evict_first")
    return w, s


@gluon.jit
def multiply(acc, seen, weights, stage, step: gl.constexpr, A: gl.constexpr, B: gl.constexpr, X: gl.constexpr):
    """acc with one block a warp more, the stage's step-th, if its scales are small; | of all scales so far."""
    WIDTH: gl.constexpr = X.shape[1]
    x = tokens_operand(stage.slice(step * WIDTH, WIDTH, dim=1).load(X), WIDTH // 64, B)
    return mma_v2(unpack_weights(weights[0], weights[1], A), x, acc), seen | weights[1]


@gluon.jit
def multiply_by_any_scale(p, rows, tile, program, BLOCK_M: gl.constexpr, COLUMN_WARPS: gl.constexpr):
    """The accumulators of `product`, whatever the scales are: NaN where a scale is. Few weights have large ones."""
    K_PARTS: gl.constexpr = 4 // COLUMN_WARPS
    C: gl.constexpr = accumulator_layout(K_PARTS, COLUMN_WARPS)
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, C, 2)
    X: gl.constexpr = tokens_layout(BLOCK_M, K_PARTS, COLUMN_WARPS)
    BLOCKS: gl.constexpr = (p.K + 63) // 64
    # What follows is computed anew: kept for here, it would take registers from the loops before.
    tile = Tile(unknown(tile.expert), unknown(tile.first), unknown(tile.end), tile.counter, tile.signals)
    stream = weights_of(p, rows, tile, unknown(program), K_PARTS, COLUMN_WARPS)
    x, there = row_pointers(p, rows, tile.first, tile.end, BLOCK_M, X)
    slot = gl.arange(0, 64 * K_PARTS, gl.SliceLayout(0, X))[None, :]
    acc = gl.zeros([K_PARTS, 16 * COLUMN_WARPS, BLOCK_M], gl.float32, C)
    nan = gl.zeros([K_PARTS * COLUMN_WARPS, 8], gl.int32, scales_layout(K_PARTS * COLUMN_WARPS))
    for step in range((BLOCKS + K_PARTS - 1) // K_PARTS):
        words, scales = load_weights(stream, step, True)
        at = step * (64 * K_PARTS) + slot
        tokens = gl.load(x + at, mask=there & (at < BLOCKS * 64), other=0.0)
        acc = mma_v2(unpack_weights(words, scales, A, True), tokens_operand(tokens, K_PARTS, B), acc)
        nan = nan | nan_bits(scales)
    return nan_rows(acc, nan)


@gluon.jit
def load_shrunk_blocks(lora, rows, tile, BLOCK_M: gl.constexpr, K_PARTS: gl.constexpr, COLUMN_WARPS: gl.constexpr):
    """(x A^T)^T of the tile's rows, each by its own adapter, as the products take it: a block for each BLOCK_R ranks.

    Of the parts of K the first has it and the others zeros.
    """
    B: gl.constexpr = gl.DotOperandLayout(1, accumulator_layout(K_PARTS, COLUMN_WARPS), 2)
    blocks = ()
    for rank in gl.static_range(0, lora.RANK_PADDED, lora.BLOCK_R):
        shrunk = load_shrunk(lora, tile.first, tile.end, rank, rows.pairs, BLOCK_M, K_PARTS * COLUMN_WARPS)
        shrunk = shrunk.permute((1, 0)).reshape([1, lora.BLOCK_R, BLOCK_M])
        zeros = gl.zeros([K_PARTS, lora.BLOCK_R, BLOCK_M], gl.bfloat16, shrunk.type.layout)
        part = gl.arange(0, K_PARTS, gl.SliceLayout(1, gl.SliceLayout(2, shrunk.type.layout)))[:, None, None]
        blocks = blocks + (gl.convert_layout(gl.where(part == 0, shrunk, zeros), B),)
    return blocks


@gluon.jit
def load_lora_b(
    lora, matrix, there, program, N: gl.constexpr, K_PARTS: gl.constexpr, COLUMN_WARPS: gl.constexpr
):  # fmt: skip
    """B of an adapter and expert for the first part of K, by blocks of BLOCK_R ranks; zeros if not `there`."""
    A: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(K_PARTS, COLUMN_WARPS), 2)
    part = gl.arange(0, K_PARTS, gl.SliceLayout(1, gl.SliceLayout(2, A)))[:, None, None]
    fragment_row = gl.arange(0, 16 * COLUMN_WARPS, gl.SliceLayout(0, gl.SliceLayout(2, A)))[None, :, None]
    column = program * (16 * COLUMN_WARPS) + packed_column(fragment_row)
    ranks = gl.arange(0, lora.BLOCK_R, gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, None, :]
    blocks = ()
    for rank in gl.static_range(0, lora.RANK_PADDED, lora.BLOCK_R):
        at = lora.b_ptr + (matrix.to(gl.int64) * N + column) * lora.RANK + (rank + ranks)
        ok = (part == 0) & (column < N) & (rank + ranks < lora.RANK) & there
        blocks = blocks + (gl.load(at, mask=ok, other=0.0).to(gl.bfloat16),)
    return blocks


@gluon.jit
def expand(acc, shrunk, lora, matrix, program, N: gl.constexpr, K_PARTS: gl.constexpr, COLUMN_WARPS: gl.constexpr):
    """acc + B (x A^T)^T for the matrix of an adapter and expert: the first part's work."""
    A: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(K_PARTS, COLUMN_WARPS), 2)
    part = gl.arange(0, K_PARTS, gl.SliceLayout(1, gl.SliceLayout(2, A)))[:, None, None]
    fragment_row = gl.arange(0, 16 * COLUMN_WARPS, gl.SliceLayout(0, gl.SliceLayout(2, A)))[None, :, None]
    column = program * (16 * COLUMN_WARPS) + packed_column(fragment_row)
    ranks = gl.arange(0, lora.BLOCK_R, gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, None, :]
    for i in gl.static_range(len(shrunk)):
        rank = i * lora.BLOCK_R + ranks
        at = lora.b_ptr + (matrix.to(gl.int64) * N + column) * lora.RANK + rank
        b = gl.load(at, mask=(part == 0) & (column < N) & (rank < lora.RANK), other=0.0).to(gl.bfloat16)
        acc = mma_v2(b, shrunk[i], acc)
    return acc


@gluon.jit
def add_lora(
    acc, p, rows, tile, program, BLOCK_M: gl.constexpr, K_PARTS: gl.constexpr, COLUMN_WARPS: gl.constexpr
):  # fmt: skip
    """acc with the first adapter for all rows."""
    wait(tile.counter, p.SHRUNK_READY)
    expert = in_stack(tile.expert, p.lora.layer_ptr, rows.ADAPTERS * rows.EXPERTS)
    shrunk = load_shrunk_blocks(p.lora, rows, tile, BLOCK_M, K_PARTS, COLUMN_WARPS)
    return expand(acc, shrunk, p.lora, expert, program, p.N, K_PARTS, COLUMN_WARPS)


@gluon.jit
def add_mixed_lora(
    acc, p, rows, tile, used, program, BLOCK_M: gl.constexpr, K_PARTS: gl.constexpr, COLUMN_WARPS: gl.constexpr
):  # fmt: skip
    """acc with each row's own adapter, if it has one; others' are selected away, not multiplied by zero.

    The first adapter's B is on its way before the wait.
    """
    lora = p.lora
    expert = in_stack(tile.expert, lora.layer_ptr, rows.ADAPTERS * rows.EXPERTS)
    adapter = next_adapter(used, -1, rows.ADAPTERS)
    if adapter < rows.ADAPTERS:
        b = load_lora_b(lora, adapter * rows.EXPERTS + expert, True, program, p.N, K_PARTS, COLUMN_WARPS)
        wait(tile.counter, p.SHRUNK_READY)
        shrunk = load_shrunk_blocks(lora, rows, tile, BLOCK_M, K_PARTS, COLUMN_WARPS)
        while adapter < rows.ADAPTERS:
            expanded = acc
            for i in gl.static_range(len(shrunk)):
                expanded = mma_v2(b[i], shrunk[i], expanded)
            acc = gl.where((used == adapter)[None, None, :], expanded, acc)
            adapter = next_adapter(used, adapter, rows.ADAPTERS)
            there = adapter < rows.ADAPTERS
            b = load_lora_b(lora, adapter * rows.EXPERTS + expert, there, program, p.N, K_PARTS, COLUMN_WARPS)
    return acc


@gluon.jit
def even_and_odd(acc, BLOCK_M: gl.constexpr, COLUMN_WARPS: gl.constexpr, OUT: gl.constexpr):
    """The products' even and odd columns, gate and up, (8 * COLUMN_WARPS, BLOCK_M) each."""
    # Fragment rows g and g + 8 are columns 2g and 2g + 1.
    total = gl.sum(acc, axis=0).reshape([COLUMN_WARPS, 2, 8, BLOCK_M])
    even, odd = gl.split(gl.permute(total, (0, 2, 3, 1)))
    even = gl.convert_layout(even.reshape([8 * COLUMN_WARPS, BLOCK_M]), OUT)
    odd = gl.convert_layout(odd.reshape([8 * COLUMN_WARPS, BLOCK_M]), OUT)
    return even, odd


@gluon.jit
def product(p, rows, tile, program, BLOCK_M: gl.constexpr, COLUMN_WARPS: gl.constexpr):
    """Columns `program` * 16 * COLUMN_WARPS and on, of a tile of at most BLOCK_M rows, with four warps.

    A warp has 16 columns and takes turns along K with the others of the same. gate_up's N is padded to 128.
    """
    K_PARTS: gl.constexpr = 4 // COLUMN_WARPS
    # Layouts of the accumulators, of the product's two operands, and of tokens in registers and on their way.
    C: gl.constexpr = accumulator_layout(K_PARTS, COLUMN_WARPS)
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, C, 2)
    X: gl.constexpr = tokens_layout(BLOCK_M, K_PARTS, COLUMN_WARPS)
    BLOCKS: gl.constexpr = (p.K + 63) // 64
    STEPS: gl.constexpr = (BLOCKS + K_PARTS - 1) // K_PARTS
    WHOLE: gl.constexpr = BLOCKS // K_PARTS  # steps whose blocks are all there
    # A stage has a row's blocks for one step, or two where a step takes one block.
    STAGE_STEPS: gl.constexpr = max(1, 2 // K_PARTS)
    STAGE_WIDTH: gl.constexpr = STAGE_STEPS * K_PARTS * 64
    # Stages of the loop, which loads weights for whole steps alone.
    LOOP: gl.constexpr = max(0, (WHOLE - p.AHEAD) // STAGE_STEPS) // p.STAGES * p.STAGES
    stream = weights_of(p, rows, tile, program, K_PARTS, COLUMN_WARPS)
    weights = ()
    for i in gl.static_range(min(p.AHEAD, STEPS)):
        weights = weights + (load_weights(stream, i, i >= WHOLE),)
    x, there = row_pointers(p, rows, tile.first, tile.end, BLOCK_M, stage_layout(STAGE_WIDTH))
    # Buffers of their own: a copy into one of them waits for nothing but those who read that one.
    stages = ()
    for _ in gl.static_range(p.STAGES):
        stages = stages + (gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, STAGE_WIDTH], swizzled_stage()),)

    wait(tile.counter, p.X_READY)
    for i in gl.static_range(p.STAGES - 1):
        copy_stage(stages[i], x, there, i, p.K, STAGE_WIDTH)
    acc = gl.zeros([K_PARTS, 16 * COLUMN_WARPS, BLOCK_M], gl.float32, C)
    seen = gl.zeros([K_PARTS * COLUMN_WARPS, 8], gl.int32, scales_layout(K_PARTS * COLUMN_WARPS))
    for start in range(0, LOOP, p.STAGES):
        for i in gl.static_range(p.STAGES):
            async_copy.wait_group(p.STAGES - 2)
            free = stages[(i + p.STAGES - 1) % p.STAGES]
            copy_stage(free, x, there, start + (i + p.STAGES - 1), p.K, STAGE_WIDTH)
            for j in gl.static_range(STAGE_STEPS):
                acc, seen = multiply(acc, seen, weights[0], stages[i], j, A, B, X)
                step = start * STAGE_STEPS + (i * STAGE_STEPS + j + p.AHEAD)
                weights = weights[1:] + (load_weights(stream, step, False),)

    # What the end needs is loaded now, behind the last weights.
    OUT: gl.constexpr = gl.BlockedLayout([1, 1], [8 * COLUMN_WARPS, 4 // COLUMN_WARPS], [1, 4], [0, 1])
    column = program * (8 * COLUMN_WARPS) + gl.arange(0, 8 * COLUMN_WARPS, gl.SliceLayout(1, OUT))
    column_ok = 2 * column < p.N
    out_position = tile.first + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
    row_ok = out_position < tile.end
    if p.bias_ptr is not None:
        matrix = in_stack(tile.expert, p.layer_ptr, rows.EXPERTS).to(gl.int64)
        bias = p.bias_ptr + matrix * p.N + 2 * column
        bias_even = gl.load(bias, mask=column_ok, other=0.0)
        bias_odd = gl.load(bias + 1, mask=column_ok, other=0.0)
    if not p.GATE_UP:
        pair = gl.load(rows.order_ptr + out_position, mask=row_ok, other=0)
        gate = gl.load(p.gates_ptr + pair, mask=row_ok, other=0.0)

    if p.lora.b_ptr is not None:  # noqa: SIM102
        if rows.adapter_ids_ptr is not None:
            used = load_adapters(rows, tile.first, tile.end, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(1, C)))

    for i in gl.static_range(LOOP * STAGE_STEPS, STEPS):
        if i % STAGE_STEPS == 0:
            async_copy.wait_group(p.STAGES - 2)
            free = stages[(i // STAGE_STEPS + p.STAGES - 1) % p.STAGES]
            copy_stage(free, x, there, i // STAGE_STEPS + p.STAGES - 1, p.K, STAGE_WIDTH)
        stage = stages[i // STAGE_STEPS % p.STAGES]
        acc, seen = multiply(acc, seen, weights[0], stage, i % STAGE_STEPS, A, B, X)
        weights = weights[1:]
        if i + p.AHEAD < STEPS:
            weights = weights + (load_weights(stream, i + p.AHEAD, i + p.AHEAD >= WHOLE),)
    async_copy.wait_group(0)
    if any_large(seen):
        acc = multiply_by_any_scale(p, rows, tile, program, BLOCK_M, COLUMN_WARPS)

    if p.lora.b_ptr is not None:
        if rows.adapter_ids_ptr is None:
            acc = add_lora(acc, p, rows, tile, program, BLOCK_M, K_PARTS, COLUMN_WARPS)
        else:
            acc = add_mixed_lora(acc, p, rows, tile, used, program, BLOCK_M, K_PARTS, COLUMN_WARPS)
    even, odd = even_and_odd(acc, BLOCK_M, COLUMN_WARPS, OUT)
    if p.bias_ptr is not None:
        even += bias_even.to(gl.float32)[:, None]
        odd += bias_odd.to(gl.float32)[:, None]
    ok = column_ok[:, None] & row_ok[None, :]
    if p.GATE_UP:
        out = activate(even, odd, p.ACTIVATION).to(gl.bfloat16)
        slot = mma_k_slot(column)
        # Columns that pad the width are written too, as zero: the next product reads them.
        out = gl.where(column_ok[:, None], out, 0.0)
        padded_ok = (column < p.OUT_WIDTH)[:, None] & row_ok[None, :]
        at = p.out_ptr + out_position.to(gl.int64)[None, :] * p.OUT_WIDTH + slot[:, None]
        gl.store(at, out, mask=padded_ok)
        signal(tile.counter, tile.signals)
    else:
        at = p.out_ptr + pair.to(gl.int64)[None, :] * p.N + 2 * column[:, None]
        gl.store(at, (even * gate[None, :]).to(gl.bfloat16), mask=ok)
        gl.store(at + 1, (odd * gate[None, :]).to(gl.bfloat16), mask=ok)
