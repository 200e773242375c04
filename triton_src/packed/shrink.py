"""LoRA's shrink of rows in mma K order, a role of the programs that multiply by packed weights."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from jmoe.triton_src.packed.decode_product import accumulator_layout
from jmoe.triton_src.packed.lora import load_adapters
from jmoe.triton_src.packed.ready_counters import signal, wait
from jmoe.triton_src.packed.tokens import row_pointers, tokens_layout, tokens_operand
from jmoe.triton_src.row_adapters import next_adapter
from jmoe.triton_src.stacked import in_stack


@gluon.jit
def shrink(p, rows, work, PROGRAMS: gl.constexpr):
    """As shrink_kernel, of p's rows: each of a tile's PROGRAMS for a part of K and BLOCK_R ranks.

    A program takes the adapters of the tile's rows one after another, so that it counts for as much to those who wait
    whatever adapters there are.
    """
    lora = p.lora
    OUT: gl.constexpr = shrunk_layout()
    tile = work // PROGRAMS
    part_of_tile = work % PROGRAMS
    expert = gl.load(rows.tiles_ptr + tile * 3)
    if expert >= 0:
        first = gl.load(rows.tiles_ptr + tile * 3 + 1)
        end = gl.load(rows.tiles_ptr + tile * 3 + 2)
        split = part_of_tile % lora.SPLITS
        rank = part_of_tile // lora.SPLITS * lora.BLOCK_R
        position = first + gl.arange(0, rows.BLOCK_M, gl.SliceLayout(0, OUT))
        if rows.adapter_ids_ptr is None:
            mine = position < end
            wait(rows.ready_counters_ptr + tile, p.X_READY)
            if gl.max(mine.to(gl.int32), axis=0) > 0:
                shrink_rows(p, rows, expert, first, end, split, rank, 0, mine)
        else:
            used = load_adapters(rows, first, end, rows.BLOCK_M, gl.SliceLayout(0, OUT))
            wait(rows.ready_counters_ptr + tile, p.X_READY)
            ranks = rank + gl.arange(0, lora.BLOCK_R, gl.SliceLayout(1, OUT))
            at = shrunk_pointers(lora, rows, split, position, ranks)
            nobodys = ((used < 0) & (position < end))[None, :] & (ranks < lora.RANK_PADDED)[:, None]
            gl.store(at, gl.zeros([lora.BLOCK_R, rows.BLOCK_M], gl.float32, OUT), mask=nobodys)
            adapter = next_adapter(used, -1, rows.ADAPTERS)
            # As many adapters as rows at most. What LLVM could take out of a loop would need registers, so it may not.
            for _ in tl.range(0, gl.minimum(end - first, rows.BLOCK_M), disable_licm=True):
                if adapter < rows.ADAPTERS:
                    shrink_rows(p, rows, expert, first, end, split, rank, adapter, used == adapter)
                    adapter = next_adapter(used, adapter, rows.ADAPTERS)
        signal(rows.ready_counters_ptr + tile, 1)


@gluon.constexpr_function
def shrunk_layout():
    """Of (ranks, tokens), as they are stored."""
    return gl.BlockedLayout([4, 1], [4, 8], [1, 4], [0, 1])


@gluon.jit
def shrunk_pointers(lora, rows, split, position, ranks):
    """Where the positions' ranks of a part of K lie."""
    out = lora.shrunk_ptr + split.to(gl.int64) * rows.pairs * lora.RANK_PADDED
    return out + position.to(gl.int64)[None, :] * lora.RANK_PADDED + ranks[:, None]


@gluon.jit
def shrink_rows(p, rows, expert, first, end, split, rank, adapter, mine):
    """One adapter's part of K and BLOCK_R ranks of the rows that are its own."""
    lora = p.lora
    BLOCK_M: gl.constexpr = rows.BLOCK_M
    BLOCK_R: gl.constexpr = lora.BLOCK_R
    K_PARTS: gl.constexpr = 4
    C: gl.constexpr = accumulator_layout(K_PARTS, 1)
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, C, 2)
    X: gl.constexpr = tokens_layout(BLOCK_M, K_PARTS, 1)
    OUT: gl.constexpr = shrunk_layout()
    BLOCKS: gl.constexpr = (p.K + 63) // 64
    STEPS: gl.constexpr = (BLOCKS + lora.SPLITS * K_PARTS - 1) // (lora.SPLITS * K_PARTS)
    x, row_ok = row_pointers(p, rows, first, end, BLOCK_M, X)
    slot = gl.arange(0, 64 * K_PARTS, gl.SliceLayout(0, X))[None, :]
    part = gl.arange(0, K_PARTS, gl.SliceLayout(1, gl.SliceLayout(2, A)))[:, None, None]
    ranks = rank + gl.arange(0, BLOCK_R, gl.SliceLayout(0, gl.SliceLayout(2, A)))[None, :, None]
    k = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, None, :]
    matrix = in_stack(adapter * rows.EXPERTS + expert, lora.layer_ptr, rows.ADAPTERS * rows.EXPERTS).to(gl.int64)
    a = lora.a_ptr + matrix * (lora.RANK * p.K) + ranks * p.K + part * 64 + k
    scale = gl.load(lora.scale_ptr + in_stack(adapter, lora.layer_ptr, rows.ADAPTERS))
    acc = gl.zeros([K_PARTS, BLOCK_R, BLOCK_M], gl.float32, C)
    for i in gl.static_range(STEPS):
        step = split * STEPS + i
        at = step * (64 * K_PARTS) + slot
        tokens = gl.load(x + at, mask=row_ok & (at < BLOCKS * 64), other=0.0)
        there = (ranks < lora.RANK) & ((step * K_PARTS + part) * 64 + k < p.K)
        values = gl.load(a + step * (K_PARTS * 64), mask=there, other=0.0).to(gl.bfloat16)
        acc = mma_v2(values, tokens_operand(tokens, K_PARTS, B), acc)
    total = gl.convert_layout(gl.sum(acc, axis=0), OUT)
    # Padded ranks are set to zero, not multiplied by it: x may hold infinities.
    ranks = rank + gl.arange(0, BLOCK_R, gl.SliceLayout(1, OUT))
    position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
    shrunk = gl.where((ranks < lora.RANK)[:, None] & mine[None, :], total * scale, 0.0)
    at = shrunk_pointers(lora, rows, split, position, ranks)
    gl.store(at, shrunk, mask=mine[None, :] & (ranks < lora.RANK_PADDED)[:, None])
