"""Where sorted pairs lie: places among an expert's pairs, and the tiles that cover them."""

import triton
import triton.language as tl


@triton.jit
def count_earlier(chosen, STRIPS: tl.constexpr):
    """(earlier, count): in (STRIPS, ROWS, columns), rows before this one that chose the column; and all that did.

    STRIPS is at most 4 and the block has at most 256 rows, so one scan of ROWS rows carries each strip in a byte.
    """
    shift = 8 * tl.arange(0, STRIPS)[:, None, None]
    packed = tl.sum(chosen.to(tl.int32) << shift, axis=0)
    strips = tl.sum(packed, axis=0)
    strips_before = (strips << 8) + (strips << 16) + (strips << 24)
    before = tl.cumsum(packed, axis=0) - packed + strips_before[None, :]
    pairs_of_strips = (strips & 0x00FF00FF) + ((strips >> 8) & 0x00FF00FF)
    return (before[None, :, :] >> shift) & 0xFF, (pairs_of_strips & 0xFFFF) + (pairs_of_strips >> 16)


@triton.jit
def write_tiles(
    tiles_ptr,  # (slots, 3) int32: expert, first position, end of the expert's positions; (-1, 0, 0) where unused
    expert,  # (columns,) number to write for a column's expert
    begin,  # (columns,) first position
    count,  # (columns,) positions
    tiles_an_expert,  # the most that one expert can have
    slots,
    finished_ptr,  # (slots,) int32, to be zero; or None
    program,
    programs,
    BLOCK_M: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """The tiles of BLOCK_M positions of one expert each, in the order of the experts: this program's share of them.

    With counters experts whose tiles are no more than half full come after the others: shorter programs end a launch.
    """
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    if finished_ptr is None:
        tiles_begin = tl.cumsum(tiles, axis=0) - tiles
        used = tl.sum(tiles, axis=0)
    else:
        # One scan for both kinds: an expert has at most one half full tile, so that all of these stay below LONG.
        LONG: tl.constexpr = 2 * count.shape[0]
        long = count > BLOCK_M // 2
        both = tl.where(long, tiles * LONG, tiles)
        total = tl.sum(both, axis=0)
        before = tl.cumsum(both, axis=0) - both
        long_tiles = total // LONG
        tiles_begin = tl.where(long, before // LONG, long_tiles + before % LONG)
        used = long_tiles + total % LONG
    for start in range(program * BLOCK_TILES, tiles_an_expert, programs * BLOCK_TILES):
        nth = start + tl.arange(0, BLOCK_TILES)[:, None]
        tile = tiles_ptr + 3 * (tiles_begin[None, :] + nth)
        ok = nth < tiles[None, :]
        tl.store(tile, expert[None, :] + tl.zeros_like(nth), mask=ok)
        tl.store(tile + 1, begin[None, :] + nth * BLOCK_M, mask=ok)
        tl.store(tile + 2, (begin + count)[None, :] + tl.zeros_like(nth), mask=ok)
    for start in range(program * BLOCK_SLOTS, slots, programs * BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS)
        if finished_ptr is not None:
            tl.store(finished_ptr + slot, 0, mask=slot < slots)
        unused = (slot >= used) & (slot < slots)
        tl.store(tiles_ptr + 3 * slot, -1, mask=unused)
        tl.store(tiles_ptr + 3 * slot + 1, 0, mask=unused)
        tl.store(tiles_ptr + 3 * slot + 2, 0, mask=unused)
