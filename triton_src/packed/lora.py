"""LoRA's expand on packed weights: what the tensor cores are given besides the weights and tokens."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from jmoe.triton_src.row_adapters import known_adapters


@gluon.jit
def load_adapters(rows, first, end, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    """The adapters of the positions from `first` on; -1 past the end, and for one that does not exist."""
    position = first + gl.arange(0, BLOCK_M, LAYOUT)
    pair = gl.load(rows.order_ptr + position, mask=position < end, other=0)
    used = gl.load(rows.adapter_ids_ptr + pair // rows.TOP_K, mask=position < end, other=-1)
    return known_adapters(used, rows.ADAPTERS)


@gluon.jit
def load_shrunk(lora, first, end, rank, pairs, BLOCK_M: gl.constexpr, WARPS: gl.constexpr):
    """(BLOCK_M, BLOCK_R) bf16: what is shrunk of the positions, from `first` and `rank` on, summed over its parts."""
    BLOCK_R: gl.constexpr = lora.BLOCK_R
    THREADS: gl.constexpr = BLOCK_R // 4 if BLOCK_R < 64 else 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [32 // THREADS, THREADS], [WARPS, 1], [1, 0])
    position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    ok = (position < end)[:, None]
    ranks = rank + gl.arange(0, BLOCK_R, gl.SliceLayout(0, LAYOUT))
    at = lora.shrunk_ptr + position.to(gl.int64)[:, None] * lora.RANK_PADDED + ranks[None, :]
    total = gl.load(at, mask=ok, other=0.0)
    for split in gl.static_range(1, lora.SPLITS):
        total += gl.load(at + split * pairs.to(gl.int64) * lora.RANK_PADDED, mask=ok, other=0.0)
    return total.to(gl.bfloat16)


@gluon.jit
def packed_column(fragment_row):
    """The column, of those packed together, that stands in a row of the products' operand A."""
    return fragment_row // 16 * 16 + fragment_row % 8 * 2 + fragment_row % 16 // 8


@gluon.jit
def load_lora_b(lora, matrix, column, rank, N: gl.constexpr, A: gl.constexpr, WARPS: gl.constexpr):
    """(16 * WARPS, BLOCK_R) bf16: B of an adapter and expert, from `column` and `rank` on, in packed order."""
    columns = column + packed_column(gl.arange(0, 16 * WARPS, gl.SliceLayout(1, A)))
    ranks = rank + gl.arange(0, lora.BLOCK_R, gl.SliceLayout(0, A))
    ok = (columns < N)[:, None] & (ranks < lora.RANK)[None, :]
    at = lora.b_ptr + (matrix.to(gl.int64) * N + columns)[:, None] * lora.RANK + ranks[None, :]
    return gl.load(at, mask=ok, other=0.0).to(gl.bfloat16)
