"""LoRA's expand on packed weights: what the tensor cores are given besides the weights and tokens."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def load_adapters(
    adapter_ids_ptr,  # (T,) int32
    order_ptr,  # (P,) int32
    first,
    end,
    TOP_K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    ROWS: gl.constexpr,
):
    """The adapters of the tile's positions, in the layout ROWS; -1 past the end."""
    position = first + gl.arange(0, BLOCK_M, ROWS)
    pair = gl.load(order_ptr + position, mask=position < end, other=0)
    return gl.load(adapter_ids_ptr + pair // TOP_K, mask=position < end, other=-1)


@gluon.jit
def load_shrunk(
    shrunk_ptr,  # (SPLITS, P, RANK_PADDED) float32 by position
    first,
    end,
    rank,
    pairs,
    RANK_PADDED: gl.constexpr,
    SPLITS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_R: gl.constexpr,
    WARPS: gl.constexpr,
):
    """(BLOCK_M, BLOCK_R) bf16: x A^T of the tile's positions from `rank` on, summed over its parts."""
    THREADS: gl.constexpr = BLOCK_R // 4 if BLOCK_R < 64 else 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [32 // THREADS, THREADS], [WARPS, 1], [1, 0])
    position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    ok = (position < end)[:, None]
    ranks = rank + gl.arange(0, BLOCK_R, gl.SliceLayout(0, LAYOUT))
    at = shrunk_ptr + position.to(gl.int64)[:, None] * RANK_PADDED + ranks[None, :]
    total = gl.load(at, mask=ok, other=0.0)
    for split in gl.static_range(1, SPLITS):
        total += gl.load(at + split * pairs.to(gl.int64) * RANK_PADDED, mask=ok, other=0.0)
    return total.to(gl.bfloat16)


@gluon.jit
def packed_column(fragment_row):
    """The column, of those packed together, that stands in a row of the products' operand A."""
    return fragment_row // 16 * 16 + fragment_row % 8 * 2 + fragment_row % 16 // 8


@gluon.jit
def load_lora_b(
    lora_b_ptr,  # (A, E, N, R) bf16 or float32
    rows,
    column,
    rank,
    N: gl.constexpr,
    RANK: gl.constexpr,
    BLOCK_R: gl.constexpr,
    A: gl.constexpr,
    WARPS: gl.constexpr,
):
    """(16 * WARPS, BLOCK_R) bf16: B from `column` and `rank` on in the order of packed rows; rows = (a E + e) N."""
    fragment_row = gl.arange(0, 16 * WARPS, gl.SliceLayout(1, A))
    columns = column + packed_column(fragment_row)
    ranks = rank + gl.arange(0, BLOCK_R, gl.SliceLayout(0, A))
    ok = (columns < N)[:, None] & (ranks < RANK)[None, :]
    at = lora_b_ptr + (rows + columns)[:, None] * RANK + ranks[None, :]
    return gl.load(at, mask=ok, other=0.0).to(gl.bfloat16)
