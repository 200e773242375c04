"""Where pairs lie when they are sorted by expert, and the tiles that cover these positions.

Three tokens that choose the experts 1 and 3, 3 and 0, and 1 and 0, say:

    expert           0  1  3
    token 0          .  0  0     earlier: of the tokens before, how many chose the expert
    token 1          0  .  1
    token 2          1  1  .
    count            2  2  2
    begin            0  2  4     the expert's first position

Token 2's best expert is 1: its pair, number 2 * 2 + 0, has position begin[1] + earlier = 3, so that order[3] = 4.
"""

import triton
import triton.language as tl


@triton.jit
def count_earlier(chosen, STRIPS: tl.constexpr):
    """(earlier, count): (STRIPS, ROWS, columns) rows before this one that chose the column; (columns,) all that did.

    STRIPS is at most 4 and the block has at most 256 rows, so that one scan of ROWS rows carries each strip in a byte.
    Of a column that the rows 0, 3 and 5 of 4 strips of 2 rows chose, from the lowest byte on:

        strip              0  1  2  3
        packed, row 0      1  0  0  0
        packed, row 1      0  1  1  0
        strips             1  1  1  0     in the whole strip
        strips_before      0  1  2  3     in the strips before
        before, row 1      1  1  2  3     of row 3, in strip 1: 1; of row 5, in strip 2: 2
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
    tiles_ptr,  # (max_tiles, 3) int32: expert, first position, end of the expert's positions; (-1, 0, 0) where unused
    expert,  # (columns,) number to write for a column's expert
    begin,  # (columns,) first position
    count,  # (columns,) positions
    tiles_an_expert,  # the most that one expert can have
    max_tiles,
    ready_counters_ptr,  # (max_tiles + 1,) int32, to be zero; or None
    program,
    programs,
    BLOCK_M: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_UNUSED: tl.constexpr,
):
    """A program's share of the tiles, of BLOCK_M positions of one expert each, in the order of the experts.

    With counters, experts of which no tile is more than half full come after the others: shorter programs end a launch.
    """
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    if ready_counters_ptr is None:
        tiles_begin = tl.cumsum(tiles, axis=0) - tiles
        used = tl.sum(tiles, axis=0)
    else:
        # One scan for both kinds, the others' tiles counted in LONGs: a short expert has one tile, so that all of these
        # stay below LONG. 3 long tiles and 2 short experts before come to 3 * LONG + 2.
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
    if ready_counters_ptr is not None and program == 0:
        tl.store(ready_counters_ptr + max_tiles, 0)
    for start in range(program * BLOCK_UNUSED, max_tiles, programs * BLOCK_UNUSED):
        index = start + tl.arange(0, BLOCK_UNUSED)
        if ready_counters_ptr is not None:
            tl.store(ready_counters_ptr + index, 0, mask=index < max_tiles)
        unused = (index >= used) & (index < max_tiles)
        tl.store(tiles_ptr + 3 * index, -1, mask=unused)
        tl.store(tiles_ptr + 3 * index + 1, 0, mask=unused)
        tl.store(tiles_ptr + 3 * index + 2, 0, mask=unused)
