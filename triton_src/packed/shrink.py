"""LoRA's shrink of rows in mma K order, a role of the programs that multiply by packed weights."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from jmoe.triton_src.packed.decode_product import accumulator_layout
from jmoe.triton_src.packed.ready_counters import signal, wait
from jmoe.triton_src.packed.tokens import row_pointers, tokens_layout, tokens_operand
from jmoe.triton_src.stacked import in_stack


@gluon.jit
def shrink(p, rows, work, PROGRAMS: gl.constexpr):
    """As shrink_kernel, of p's rows: each of a tile's PROGRAMS for a part of K, an adapter and BLOCK_R ranks."""
    lora = p.lora
    BLOCK_M: gl.constexpr = rows.BLOCK_M
    BLOCK_R: gl.constexpr = lora.BLOCK_R
    SPLITS: gl.constexpr = lora.SPLITS
    ADAPTERS: gl.constexpr = rows.ADAPTERS
    K_PARTS: gl.constexpr = 4
    C: gl.constexpr = accumulator_layout(K_PARTS, 1)
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, C, 2)
    X: gl.constexpr = tokens_layout(BLOCK_M, K_PARTS, 1)
    BLOCKS: gl.constexpr = (p.K + 63) // 64
    RANK_PADDED: gl.constexpr = lora.RANK_PADDED
    OUT: gl.constexpr = gl.BlockedLayout([4, 1], [4, 8], [1, 4], [0, 1])
    STEPS: gl.constexpr = (BLOCKS + SPLITS * K_PARTS - 1) // (SPLITS * K_PARTS)
    tile = work // PROGRAMS
    part_of_tile = work % PROGRAMS
    expert = gl.load(rows.tiles_ptr + tile * 3)
    if expert >= 0:
        first = gl.load(rows.tiles_ptr + tile * 3 + 1)
        end = gl.load(rows.tiles_ptr + tile * 3 + 2)
        split = part_of_tile % SPLITS
        adapter = part_of_tile // SPLITS % ADAPTERS
        rank = part_of_tile // (SPLITS * ADAPTERS) * BLOCK_R

        position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
        mine = position < end
        written = mine
        if rows.adapter_ids_ptr is not None:
            pair = gl.load(rows.order_ptr + position, mask=written, other=0)
            used = gl.load(rows.adapter_ids_ptr + pair // rows.TOP_K, mask=written, other=-1)
            mine = written & (used == adapter)
            # Rows without an adapter are the first adapter's to write.
            written = mine | (written & (adapter == 0) & ((used < 0) | (used >= ADAPTERS)))
        # Programs with nothing to write wait as well: what finishes early would count for what others wait for.
        wait(rows.ready_counters_ptr + tile, p.X_READY)
        if gl.max(written.to(gl.int32), axis=0) > 0:
            x, row_ok = row_pointers(p, rows, first, end, BLOCK_M, X)
            slot = gl.arange(0, 64 * K_PARTS, gl.SliceLayout(0, X))[None, :]
            part = gl.arange(0, K_PARTS, gl.SliceLayout(1, gl.SliceLayout(2, A)))[:, None, None]
            ranks = rank + gl.arange(0, BLOCK_R, gl.SliceLayout(0, gl.SliceLayout(2, A)))[None, :, None]
            k = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, None, :]
            matrix = in_stack(adapter * rows.EXPERTS + expert, lora.layer_ptr, ADAPTERS * rows.EXPERTS).to(gl.int64)
            a = lora.a_ptr + matrix * (lora.RANK * p.K) + ranks * p.K + part * 64 + k
            scale = gl.load(lora.scale_ptr + in_stack(adapter, lora.layer_ptr, ADAPTERS))
            acc = gl.zeros([K_PARTS, BLOCK_R, BLOCK_M], gl.float32, C)
            for i in gl.static_range(STEPS):
                step = split * STEPS + i
                at = step * (64 * K_PARTS) + slot
                tokens = gl.load(x + at, mask=row_ok & (at < BLOCKS * 64), other=0.0)
                there = (ranks < lora.RANK) & ((step * K_PARTS + part) * 64 + k < p.K)
                values = gl.load(a + step * (K_PARTS * 64), mask=there, other=0.0).to(gl.bfloat16)
                acc = mma_v2(values, tokens_operand(tokens, K_PARTS, B), acc)
            total = gl.convert_layout(gl.sum(acc, axis=0), OUT)
            # Rows of no adapter and padded ranks are set to zero, not multiplied by it: x may hold infinities.
            ranks = rank + gl.arange(0, BLOCK_R, gl.SliceLayout(1, OUT))
            shrunk = gl.where((ranks < lora.RANK)[:, None] & mine[None, :], total * scale, 0.0)
            out = lora.shrunk_ptr + split.to(gl.int64) * rows.pairs * RANK_PADDED
            at = out + position.to(gl.int64)[None, :] * RANK_PADDED + ranks[:, None]
            gl.store(at, shrunk, mask=written[None, :] & (ranks < RANK_PADDED)[:, None])
        signal(rows.ready_counters_ptr + tile)
