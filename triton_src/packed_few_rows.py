"""One of the experts' two products from packed MXFP4, for few rows: weights stream from memory to registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from jmoe.triton_src.activation import swiglu_tile
from jmoe.triton_src.finished import finish, wait_for
from jmoe.triton_src.packed_lora import load_adapters, load_shrunk, packed_column
from jmoe.triton_src.packed_weight import (
    nan_bits,
    scale_offsets,
    scales_layout,
    unpack_weights,
    word_offsets,
    words_layout,
)
from jmoe.triton_src.stacked import in_stack


@gluon.constexpr_function
def accumulator_layout(parts, rows):
    """Of (parts, 16 * rows, tokens): a warp has 16 rows of one part."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[parts, rows, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def tokens_layout(tokens, parts, rows):
    """Of blocks of interleaved tokens (parts, tokens, 4, 16), as the products take them; `rows` warps read the same."""
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 0, 8]]
        + [[0, token, 0, 0] for token in (8, 16, 32) if token < tokens],
        [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]],
        [[0, 0, 0, 0] for row in (1, 2) if row < rows] + [[part, 0, 0, 0] for part in (1, 2) if part < parts],
        [],
        [parts, tokens, 4, 16],
    )


@gluon.jit
def token_parts(PARTS: gl.constexpr, X: gl.constexpr):
    """Each part's number, to compare with tokens of the layout X."""
    return gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, X))))[:, None, None, None]


@gluon.jit
def token_pointers(
    x_ptr, order_ptr, first, end,
    GATHER: gl.constexpr,
    TOP_K: gl.constexpr,
    WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    PARTS: gl.constexpr,
    X: gl.constexpr,
):  # fmt: skip
    """Of the tile's first PARTS blocks of 64 interleaved values; x by token if GATHER, else by position."""
    # Positions past the end repeat the last one: what comes of them is not stored.
    position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, X))))
    row = gl.minimum(position, end - 1)
    if GATHER:
        row = gl.load(order_ptr + row) // TOP_K
    return (
        x_ptr
        + row.to(gl.int64)[None, :, None, None] * WIDTH
        + token_parts(PARTS, X) * 64
        + gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, X))))[None, None, :, None] * 16
        + gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, X))))[None, None, None, :]
    )


@gluon.jit
def load_tokens(pointers, step, part, BLOCKS: gl.constexpr, PARTS: gl.constexpr, MASK: gl.constexpr):
    """The blocks of a step, one for each part; zero past the last, for which MASK stands."""
    block = step * PARTS
    if MASK:
        return gl.load(pointers + block * 64, mask=block + part < BLOCKS, other=0.0)
    else:
        return gl.load(pointers + block * 64)


@gluon.jit
def tokens_operand(x, BLOCK_M: gl.constexpr, PARTS: gl.constexpr, B: gl.constexpr):
    """Interleaved tokens as the products' operand (PARTS, 64, BLOCK_M), in the natural order: no data moves."""
    tokens = gl.permute(x.reshape([PARTS, BLOCK_M, 4, 4, 2, 2]), (0, 3, 4, 2, 5, 1))
    return gl.convert_layout(tokens.reshape([PARTS, 64, BLOCK_M]), B)


@gluon.jit
def load_weights(
    pointers, step, part, STRIDE: gl.constexpr, BLOCKS: gl.constexpr, PARTS: gl.constexpr, MASK: gl.constexpr
):
    """load_tokens for words or scales, which nobody reads again soon."""
    block = step * PARTS
    if MASK:
        return gl.load(pointers + block * STRIDE, mask=block + part < BLOCKS, other=0, eviction_policy="evict_first")
    else:
        return gl.load(pointers + block * STRIDE, eviction_policy="evict_first")


@gluon.jit
def keep_order(program):
    """Loads stay on their side of this: ptxas moves tokens' up, into more registers, and weights' to the loop's end."""
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [program], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def multiply(acc, nan, w, s, x, A: gl.constexpr, B: gl.constexpr, BLOCK_M: gl.constexpr, PARTS: gl.constexpr):
    """(acc and nan) with one block a warp more."""
    return mma_v2(unpack_weights(w, s, A), tokens_operand(x, BLOCK_M, PARTS, B), acc), nan | nan_bits(s)


@gluon.jit
def load_shrunk_blocks(lora, rows, tile, BLOCK_M: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr):
    """(x A^T)^T of the tile's rows, each by its own adapter, as the products take it: a block for each BLOCK_R ranks.

    Of the parts of K the first has it and the others zeros.
    """
    B: gl.constexpr = gl.DotOperandLayout(1, accumulator_layout(PARTS, ROWS), 2)
    RANK_PADDED: gl.constexpr = (lora.RANK + lora.BLOCK_R - 1) // lora.BLOCK_R * lora.BLOCK_R
    blocks = ()
    for rank in gl.static_range(0, RANK_PADDED, lora.BLOCK_R):
        shrunk = load_shrunk(
            lora.shrunk_ptr, tile.first, tile.end, rank, rows.pairs, RANK_PADDED, lora.SPLITS, BLOCK_M, lora.BLOCK_R,
            PARTS * ROWS,
        )  # fmt: skip
        shrunk = shrunk.permute((1, 0)).reshape([1, lora.BLOCK_R, BLOCK_M])
        zeros = gl.zeros([PARTS, lora.BLOCK_R, BLOCK_M], gl.bfloat16, shrunk.type.layout)
        part = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, shrunk.type.layout)))[:, None, None]
        blocks = blocks + (gl.convert_layout(gl.where(part == 0, shrunk, zeros), B),)
    return blocks


@gluon.jit
def expand(acc, shrunk, lora, matrix, program, N: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr):
    """acc + B (x A^T)^T for the matrix of an adapter and expert: the first part's work."""
    A: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(PARTS, ROWS), 2)
    part = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, A)))[:, None, None]
    fragment_row = gl.arange(0, 16 * ROWS, gl.SliceLayout(0, gl.SliceLayout(2, A)))[None, :, None]
    column = program * (16 * ROWS) + packed_column(fragment_row)
    ranks = gl.arange(0, lora.BLOCK_R, gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, None, :]
    for i in gl.static_range(len(shrunk)):
        rank = i * lora.BLOCK_R + ranks
        at = lora.b_ptr + (matrix.to(gl.int64) * N + column) * lora.RANK + rank
        b = gl.load(at, mask=(part == 0) & (column < N) & (rank < lora.RANK), other=0.0).to(gl.bfloat16)
        acc = mma_v2(b, shrunk[i], acc)
    return acc


@gluon.jit
def add_lora(
    acc, p, rows, tile, program, BLOCK_M: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr
):  # fmt: skip
    """acc with each row's own adapter, if it has one."""
    expert = in_stack(tile.expert, p.lora.layer_ptr, rows.ADAPTERS * rows.EXPERTS)
    shrunk = load_shrunk_blocks(p.lora, rows, tile, BLOCK_M, PARTS, ROWS)
    if rows.adapter_ids_ptr is None:
        acc = expand(acc, shrunk, p.lora, expert, program, p.N, PARTS, ROWS)
    else:
        COLUMN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, accumulator_layout(PARTS, ROWS)))
        used = load_adapters(rows.adapter_ids_ptr, rows.order_ptr, tile.first, tile.end, rows.TOP_K, BLOCK_M, COLUMN)
        for adapter in range(rows.ADAPTERS):
            mine = used == adapter
            if gl.max(mine.to(gl.int32), axis=0) > 0:
                own = adapter * rows.EXPERTS + expert
                expanded = expand(acc, shrunk, p.lora, own, program, p.N, PARTS, ROWS)
                acc = gl.where(mine[None, None, :], expanded, acc)
    return acc


@gluon.jit
def even_and_odd(acc, nan, BLOCK_M: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr, OUT: gl.constexpr):
    """The even and the odd columns of the products, (8 * ROWS, BLOCK_M) each: gate and up. NaN where a scale is."""
    # Fragment rows g and g + 8 are columns 2g and 2g + 1.
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
    return even, odd


@gluon.jit
def product(p, rows, tile, program, BLOCK_M: gl.constexpr, ROWS: gl.constexpr):
    """Columns `program` * 16 * ROWS and on, of a tile of at most BLOCK_M rows, with four warps.

    A warp has 16 columns and takes turns along K with the others of the same. gate_up's N is padded to 128.
    """
    PARTS: gl.constexpr = 4 // ROWS
    # Layouts of the accumulators, the product's two operands, words, scales and tokens.
    C: gl.constexpr = accumulator_layout(PARTS, ROWS)
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, C, 2)
    WARPS: gl.constexpr = 4
    W: gl.constexpr = words_layout(WARPS)
    S: gl.constexpr = scales_layout(WARPS)
    X: gl.constexpr = tokens_layout(BLOCK_M, PARTS, ROWS)
    BLOCKS: gl.constexpr = (p.K + 63) // 64
    COLUMN_BLOCKS: gl.constexpr = (p.N + 63) // 64
    STEPS: gl.constexpr = (BLOCKS + PARTS - 1) // PARTS
    # Steps whose blocks are all there, and those of the loop, which loads for such steps alone.
    WHOLE: gl.constexpr = BLOCKS // PARTS
    LOOP: gl.constexpr = max(0, (WHOLE - p.AHEAD) // p.AHEAD * p.AHEAD)
    # gate_up's last programs may lie past N, where they write the zeros that pad the activations.
    column_block = gl.minimum(program * ROWS // 4, COLUMN_BLOCKS - 1)
    row_of_block = program * ROWS % 4
    matrix = in_stack(tile.expert, p.layer_ptr, rows.EXPERTS).to(gl.int64)
    block = (matrix * COLUMN_BLOCKS + column_block) * BLOCKS
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, W))))[:, None, None, None]
    word_part = warp // ROWS
    words = (
        p.words_ptr + block * 512 + row_of_block * 128 + word_offsets(WARPS, 128, W) + word_part * (512 - ROWS * 128)
    )
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, S))[:, None]
    scale_part = warp // ROWS
    scales = p.scales_ptr + block * 32 + row_of_block * 8 + scale_offsets(WARPS, 8, S) + scale_part * (32 - ROWS * 8)
    w = ()
    s = ()
    for i in gl.static_range(min(p.AHEAD, STEPS)):
        w = w + (load_weights(words, i, word_part, 512, BLOCKS, PARTS, i >= WHOLE),)
        s = s + (load_weights(scales, i, scale_part, 32, BLOCKS, PARTS, i >= WHOLE),)
    x = token_pointers(
        p.x_ptr, rows.order_ptr, tile.first, tile.end, p.GATE_UP, rows.TOP_K, BLOCKS * 64, BLOCK_M, PARTS, X
    )
    x_part = token_parts(PARTS, X)

    wait_for(tile.counter, p.X_READY)
    acc = gl.zeros([PARTS, 16 * ROWS, BLOCK_M], gl.float32, C)
    nan = gl.zeros([WARPS, 8], gl.int32, S)
    xs = ()
    for i in gl.static_range(min(p.TOKENS_AHEAD, STEPS)):
        xs = xs + (load_tokens(x, i, x_part, BLOCKS, PARTS, i >= WHOLE),)
    for start in range(0, LOOP, p.AHEAD):
        for i in gl.static_range(p.AHEAD):
            xs = xs + (load_tokens(x, start + i + p.TOKENS_AHEAD, x_part, BLOCKS, PARTS, False),)
            acc, nan = multiply(acc, nan, w[0], s[0], xs[0], A, B, BLOCK_M, PARTS)
            xs = xs[1:]
            w = w[1:] + (load_weights(words, start + i + p.AHEAD, word_part, 512, BLOCKS, PARTS, False),)
            s = s[1:] + (load_weights(scales, start + i + p.AHEAD, scale_part, 32, BLOCKS, PARTS, False),)
            keep_order(program)

    # What the end needs is loaded now, behind the last weights.
    OUT: gl.constexpr = gl.BlockedLayout([1, 1], [8 * ROWS, 4 // ROWS], [1, WARPS], [0, 1])
    column = program * (8 * ROWS) + gl.arange(0, 8 * ROWS, gl.SliceLayout(1, OUT))
    column_ok = 2 * column < p.N
    out_position = tile.first + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
    row_ok = out_position < tile.end
    if p.bias_ptr is not None:
        bias = p.bias_ptr + matrix * p.N + 2 * column
        bias_even = gl.load(bias, mask=column_ok, other=0.0)
        bias_odd = gl.load(bias + 1, mask=column_ok, other=0.0)
    if not p.GATE_UP:
        pair = gl.load(rows.order_ptr + out_position, mask=row_ok, other=0)
        gate = gl.load(p.gates_ptr + pair, mask=row_ok, other=0.0)

    for i in gl.static_range(LOOP, STEPS):
        if i + p.TOKENS_AHEAD < STEPS:
            xs = xs + (load_tokens(x, i + p.TOKENS_AHEAD, x_part, BLOCKS, PARTS, i + p.TOKENS_AHEAD >= WHOLE),)
        acc, nan = multiply(acc, nan, w[0], s[0], xs[0], A, B, BLOCK_M, PARTS)
        xs = xs[1:]
        w = w[1:]
        s = s[1:]
        if i + p.AHEAD < STEPS:
            w = w + (load_weights(words, i + p.AHEAD, word_part, 512, BLOCKS, PARTS, i + p.AHEAD >= WHOLE),)
            s = s + (load_weights(scales, i + p.AHEAD, scale_part, 32, BLOCKS, PARTS, i + p.AHEAD >= WHOLE),)
        keep_order(program)

    if p.lora.b_ptr is not None:
        wait_for(tile.counter, p.SHRUNK_READY)
        acc = add_lora(acc, p, rows, tile, program, BLOCK_M, PARTS, ROWS)
    even, odd = even_and_odd(acc, nan, BLOCK_M, PARTS, ROWS, OUT)
    if p.bias_ptr is not None:
        even += bias_even.to(gl.float32)[:, None]
        odd += bias_odd.to(gl.float32)[:, None]
    ok = column_ok[:, None] & row_ok[None, :]
    if p.GATE_UP:
        out = swiglu_tile(even, odd, p.ALPHA, p.LIMIT).to(gl.bfloat16)
        in_block = column % 64
        slot = column - in_block + in_block % 8 // 2 * 16 + in_block // 16 * 4 + in_block % 16 // 8 * 2 + in_block % 2
        # Columns that pad the width are written too, as zero: the next product reads them.
        out = gl.where(column_ok[:, None], out, 0.0)
        padded_ok = (column < p.OUT_WIDTH)[:, None] & row_ok[None, :]
        at = p.out_ptr + out_position.to(gl.int64)[None, :] * p.OUT_WIDTH + slot[:, None]
        gl.store(at, out, mask=padded_ok)
        finish(tile.counter)
    else:
        at = p.out_ptr + pair.to(gl.int64)[None, :] * p.N + 2 * column[:, None]
        gl.store(at, (even * gate[None, :]).to(gl.bfloat16), mask=ok)
        gl.store(at + 1, (odd * gate[None, :]).to(gl.bfloat16), mask=ok)
