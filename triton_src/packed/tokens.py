"""Tokens in mma K order on their way to the tensor cores, which take them as operand B."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from jmoe.triton_src.routing.mma_k_order import from_mma_k_order


@gluon.constexpr_function
def tokens_layout(tokens, k_parts, column_warps):
    """Of k_parts * 64 values of tokens in mma K order, as the products take them; column_warps warps read the same."""
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32]] + [[token, 0] for token in (8, 16, 32) if token < tokens],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[0, 0] for warp in (1, 2) if warp < column_warps] + [[0, 64 * part] for part in (1, 2) if part < k_parts],
        [],
        [tokens, 64 * k_parts],
    )


@gluon.jit
def tokens_operand(x, K_PARTS: gl.constexpr, B: gl.constexpr):
    """Tokens (tokens, K_PARTS * 64) in mma K order as operand (K_PARTS, 64, tokens) in natural order: no data moves."""
    TOKENS: gl.constexpr = x.shape[0]
    natural = from_mma_k_order(x.reshape([TOKENS * K_PARTS, 64]))
    return gl.convert_layout(gl.permute(natural.reshape([TOKENS, K_PARTS, 64]), (1, 2, 0)), B, assert_trivial=True)


@gluon.jit
def row_pointers(p, rows, first, end, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    """(pointers, whether there are such rows), both (BLOCK_M, 1): of p's x, by token for gate_up, else by position.

    LAYOUT is of blocks of two axes.
    """
    WIDTH: gl.constexpr = (p.K + 63) // 64 * 64
    row = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    row_ok = row < end
    if p.GATE_UP:
        row = gl.load(rows.order_ptr + row, mask=row_ok, other=0) // rows.TOP_K
    return (p.x_ptr + row.to(gl.int64) * WIDTH)[:, None], row_ok[:, None]


@gluon.constexpr_function
def stage_layout(width):
    """In which the program's 128 threads copy a stage: 16 bytes each at once, those of a row side by side."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def swizzled_stage():
    """How a stage lies in shared memory: two rows that are read in one cycle have different halves of the banks."""
    return gl.SwizzledSharedLayout(vec=32, per_phase=1, max_phase=2, order=[1, 0])


@gluon.jit
def copy_stage(stage, pointers, row_ok, n, K: gl.constexpr, WIDTH: gl.constexpr):
    """Starts the copy of the n-th WIDTH values of the rows into a stage; zeros past the rows and past K in blocks."""
    k = n * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, stage_layout(WIDTH)))[None, :]
    async_copy.async_load(stage, pointers + k, mask=row_ok & (k < (K + 63) // 64 * 64))
    async_copy.commit_group()
