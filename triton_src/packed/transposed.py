"""Packed MXFP4 weights transposed: what a thread loads so that it holds its own fragments of W^T, and their decoding.

A word holds the weights of rows 2g and 2g + 1 at four columns (see jmoe.PackedMxfp4). In W^T these are rows of two
fragments by a pair along the contraction, and which words a lane takes is free.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

STEP = gl.constexpr(32)
"""Rows of the weights that are decoded at once: one product's length."""

# As in packed/weight.py, but that both rows of a column meet in one register before they are multiplied; so a pair of
# scales is as they are.
_TRANSPOSED = """{{ .reg .b32 t, u, v, c; mov.b32 c, 0x7E807E80;
 shl.b32 u, $8, 6;
 prmt.b32 t, $8, u, 0x5410; and.b32 t, t, 0x81C081C0;
 {raise} mul.rn.bf16x2 t, t, $9; mov.b32 {{$0, $1}}, t;
 prmt.b32 t, $8, u, 0x7632; and.b32 t, t, 0x81C081C0;
 {raise} mul.rn.bf16x2 t, t, $9; mov.b32 {{$2, $3}}, t;
 shf.r.wrap.b32 u, $8, $8, 4;
 shf.r.wrap.b32 v, $8, $8, 6; shl.b32 t, $8, 2; lop3.b32 v, t, 0x00400040, v, 0xE2;
 prmt.b32 t, u, v, 0x5410; and.b32 t, t, 0x81C081C0;
 {raise} mul.rn.bf16x2 t, t, $9; mov.b32 {{$4, $5}}, t;
 prmt.b32 t, u, v, 0x7632; and.b32 t, t, 0x81C081C0;
 {raise} mul.rn.bf16x2 t, t, $9; mov.b32 {{$6, $7}}, t; }}"""
_BY_SMALL_SCALE = gl.constexpr(_TRANSPOSED.format(**{"raise": ""}))
_BY_ANY_SCALE = gl.constexpr(_TRANSPOSED.format(**{"raise": "mul.rn.bf16x2 t, t, c;"}))

# A lane's word of scales is of the row pair of its own number; for its words a lane needs those of row pairs
# 4i + lane % 4, and of their bytes the two of one group of 32 columns. 0x31F keeps the low two bits of the lane.
_SPREAD = """{{ .reg .b32 t, c; mov.b32 c, 0x00400040; prmt.b32 t, $8, 0, $9; {exponents}
 shfl.sync.idx.b32 $0, t, 0, 0x31F, 0xFFFFFFFF; shfl.sync.idx.b32 $1, t, 4, 0x31F, 0xFFFFFFFF;
 shfl.sync.idx.b32 $2, t, 8, 0x31F, 0xFFFFFFFF; shfl.sync.idx.b32 $3, t, 12, 0x31F, 0xFFFFFFFF;
 shfl.sync.idx.b32 $4, t, 16, 0x31F, 0xFFFFFFFF; shfl.sync.idx.b32 $5, t, 20, 0x31F, 0xFFFFFFFF;
 shfl.sync.idx.b32 $6, t, 24, 0x31F, 0xFFFFFFFF; shfl.sync.idx.b32 $7, t, 28, 0x31F, 0xFFFFFFFF; }}"""
_SPREAD_SMALL = gl.constexpr(_SPREAD.format(exponents="mad.lo.u32 t, t, 128, 0x3F003F00;"))
_SPREAD_ANY = gl.constexpr(_SPREAD.format(exponents="shl.b32 t, t, 7; max.u16x2 t, t, c;"))


@gluon.constexpr_function
def part_layout(warps):
    """The layout (warps, 8 columns, 4 row pairs) in which each thread holds one word."""
    return gl.DistributedLinearLayout(
        [],
        [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[warp, 0, 0] for warp in (1, 2, 4) if warp < warps],
        [],
        [warps, 8, 4],
    )


@gluon.jit
def transposed_word(block, warp, column, row_pair):
    """Where a lane's first word is, from where its block of 64 by 64 begins; its eight are 64 apart, each of 8 rows.

    A warp has 32 of the block's columns, in two fragments of rows c = 0 and 1. `column` is a fragment's row without c:
    the bit 4 a step of 16, the others the quad.
    """
    return block + row_pair * 16 + column % 4 * 4 + warp % 2 * 2 + column // 4


@gluon.jit
def transposed_column(row, WARPS: gl.constexpr):
    """The column of the weights, of 32 * WARPS, that stands in a row of the products' operand A.

    Of a row, high to low: c, block of 64, group of 32, p, step of 16, quad.
    """
    PART: gl.constexpr = 16 * WARPS
    return row % PART // 16 * 32 + row % 8 // 4 * 16 + row // PART * 8 + row % 4 * 2 + row % 16 // 8


@gluon.jit
def spread_scales(scales, group, ANY_SCALE: gl.constexpr):
    """For each of a thread's eight words its two rows' scales in group 0 or 1 of 32 columns, for decode_transposed.

    scales: int32, in each lane of a warp those of the row pair of the lane's number.
    """
    SPREAD: gl.constexpr = _SPREAD_ANY if ANY_SCALE else _SPREAD_SMALL
    selector, scales = gl.broadcast(0x4140 + group * 0x0202, scales)
    return gl.inline_asm_elementwise(
        SPREAD, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r", [scales, selector], dtype=(gl.int32,) * 8, is_pure=True, pack=1
    )


@gluon.jit
def decode_transposed(words, scales, part: gl.constexpr, A: gl.constexpr, ANY_SCALE: gl.constexpr):
    """bf16 (32 * WARPS columns, STEP rows) in the operand layout A: no data moves.

    words, scales: a thread's eight, each for 8 rows; of these part `part`. Without ANY_SCALE scales of 128 and more
    give other numbers.
    """
    WEIGHTS: gl.constexpr = _BY_ANY_SCALE if ANY_SCALE else _BY_SMALL_SCALE
    WARPS: gl.constexpr = words[0].shape[0]
    PER_STEP: gl.constexpr = STEP // 8
    tiles = ()
    for i in gl.static_range(PER_STEP):
        a0, a1, b0, b1, c0, c1, d0, d1 = gl.inline_asm_elementwise(
            WEIGHTS, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [words[part * PER_STEP + i], scales[part * PER_STEP + i]],
            dtype=(gl.bfloat16,) * 8, is_pure=True, pack=1,
        )  # fmt: skip
        low = gl.join(gl.join(a0, a1), gl.join(b0, b1))
        high = gl.join(gl.join(c0, c1), gl.join(d0, d1))
        tiles = tiles + (gl.join(low, high),)
    # warp, column, row pair, h, p, c, then the bits of the word's number
    pairs = ()
    for i in gl.static_range(PER_STEP // 2):
        pairs = pairs + (gl.join(tiles[2 * i], tiles[2 * i + 1]),)
    tile = gl.permute(gl.join(pairs[0], pairs[1]), (5, 0, 4, 1, 7, 6, 2, 3))
    return gl.convert_layout(tile.reshape([32 * WARPS, STEP]), A, assert_trivial=True)
