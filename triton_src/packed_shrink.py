"""LoRA's shrink of interleaved rows, a role of the programs that multiply by packed weights."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from jmoe.triton_src.finished import finish, wait_for
from jmoe.triton_src.packed_few_rows import (
    accumulator_layout,
    load_tokens,
    token_parts,
    token_pointers,
    tokens_layout,
    tokens_operand,
)
from jmoe.triton_src.stacked import in_stack


@gluon.jit
def shrink(
    x_ptr,  # (T, KP) bf16 by token if GATHER, or (P, KP) by position; interleaved
    a_ptr,  # (A, E, R, K) bf16 or float32
    scale_ptr,  # (A,) float32
    adapter_ids_ptr,  # (T,) int32, -1 for none; None: adapter 0 for all
    order_ptr,  # (P,) int32, position -> pair
    tiles_ptr,  # (slots, 3) int32: expert or -1, first position, end position
    lora_layer_ptr,  # (1,) int32: which layer's LoRA, of several; None: there is one layer's
    finished_ptr,  # (slots,) int32
    shrunk_ptr,  # (SPLITS, P, rank padded to BLOCK_R) float32 by position
    program,
    pairs,
    K: gl.constexpr,
    EXPERTS: gl.constexpr,
    TOP_K: gl.constexpr,
    ADAPTERS: gl.constexpr,
    RANK: gl.constexpr,
    BLOCK_R: gl.constexpr,
    SPLITS: gl.constexpr,
    GATHER: gl.constexpr,
    BLOCK_M: gl.constexpr,
    X_READY: gl.constexpr,
    PROGRAMS: gl.constexpr,
):
    """As shrink_kernel, each of a tile's PROGRAMS for a part of K, an adapter and BLOCK_R ranks.

    x can be read when X_READY of the tile's programs have finished.
    """
    PARTS: gl.constexpr = 4
    C: gl.constexpr = accumulator_layout(PARTS, 1)
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, C, 2)
    X: gl.constexpr = tokens_layout(BLOCK_M, PARTS, 1)
    BLOCKS: gl.constexpr = (K + 63) // 64
    RANK_PADDED: gl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R * BLOCK_R
    OUT: gl.constexpr = gl.BlockedLayout([4, 1], [4, 8], [1, 4], [0, 1])
    STEPS: gl.constexpr = (BLOCKS + SPLITS * PARTS - 1) // (SPLITS * PARTS)
    tile = program // PROGRAMS
    part_of_tile = program % PROGRAMS
    expert = gl.load(tiles_ptr + tile * 3)
    if expert >= 0:
        first = gl.load(tiles_ptr + tile * 3 + 1)
        end = gl.load(tiles_ptr + tile * 3 + 2)
        split = part_of_tile % SPLITS
        adapter = part_of_tile // SPLITS % ADAPTERS
        rank = part_of_tile // (SPLITS * ADAPTERS) * BLOCK_R

        position = first + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
        mine = position < end
        written = mine
        if adapter_ids_ptr is not None:
            pair = gl.load(order_ptr + position, mask=written, other=0)
            used = gl.load(adapter_ids_ptr + pair // TOP_K, mask=written, other=-1)
            mine = written & (used == adapter)
            # Rows without an adapter are the first adapter's to write.
            written = mine | (written & (adapter == 0) & ((used < 0) | (used >= ADAPTERS)))
        # Programs with nothing to write wait as well: what finishes early would count for what others wait for.
        wait_for(finished_ptr + tile, X_READY)
        if gl.max(written.to(gl.int32), axis=0) > 0:
            x = token_pointers(x_ptr, order_ptr, first, end, GATHER, TOP_K, BLOCKS * 64, BLOCK_M, PARTS, X)
            part = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, A)))[:, None, None]
            ranks = rank + gl.arange(0, BLOCK_R, gl.SliceLayout(0, gl.SliceLayout(2, A)))[None, :, None]
            k = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, None, :]
            matrix = in_stack(adapter * EXPERTS + expert, lora_layer_ptr, ADAPTERS * EXPERTS).to(gl.int64)
            a = a_ptr + matrix * (RANK * K) + ranks * K + part * 64 + k
            scale = gl.load(scale_ptr + in_stack(adapter, lora_layer_ptr, ADAPTERS))
            acc = gl.zeros([PARTS, BLOCK_R, BLOCK_M], gl.float32, C)
            for i in gl.static_range(STEPS):
                step = split * STEPS + i
                tokens = load_tokens(x, step, token_parts(PARTS, X), BLOCKS, PARTS, True)
                there = (ranks < RANK) & ((step * PARTS + part) * 64 + k < K)
                values = gl.load(a + step * (PARTS * 64), mask=there, other=0.0).to(gl.bfloat16)
                acc = mma_v2(values, tokens_operand(tokens, BLOCK_M, PARTS, B), acc)
            total = gl.convert_layout(gl.sum(acc, axis=0), OUT)
            # Rows of no adapter and padded ranks are set to zero, not multiplied by it: x may hold infinities.
            ranks = rank + gl.arange(0, BLOCK_R, gl.SliceLayout(1, OUT))
            shrunk = gl.where((ranks < RANK)[:, None] & mine[None, :], total * scale, 0.0)
            out = shrunk_ptr + split.to(gl.int64) * pairs * RANK_PADDED
            at = out + position.to(gl.int64)[None, :] * RANK_PADDED + ranks[:, None]
            gl.store(at, shrunk, mask=written[None, :] & (ranks < RANK_PADDED)[:, None])
        finish(finished_ptr + tile)
