"""The packed MXFP4 layout on Hopper: a thread's 16-byte load holds its own fragments of the tensor cores' A operand.

A word holds the eight weights that a thread of an m16n8k16 product takes in one step of 16 along K: registers a0 to a3,
two weights each. jmoe.PackedMxfp4 says which weight stands where.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Sign, exponent and mantissa of two weights, in the places of two bfloat16 that are 2**-126 times as large: mask
# 0x81c081c0. a0 stands there already, a1 six bits below, a2 rotated by four, a3 rotated by six but for its mantissa.
# Multiplying by 2**126 first and by the scale after it is exact for every scale; one multiplication by their product is
# not, since it passes bfloat16's range from scale 129 on.
_WEIGHTS = gl.constexpr("""{ .reg .b32 t, u, c; mov.b32 c, 0x7E807E80;
 and.b32 t, $8, 0x81C081C0;
 mul.rn.bf16x2 t, t, c; mul.rn.bf16x2 t, t, $9; mov.b32 {$0, $4}, t;
 shl.b32 t, $8, 6; and.b32 t, t, 0x81C081C0;
 mul.rn.bf16x2 t, t, c; mul.rn.bf16x2 t, t, $10; mov.b32 {$1, $5}, t;
 shf.r.wrap.b32 t, $8, $8, 4; and.b32 t, t, 0x81C081C0;
 mul.rn.bf16x2 t, t, c; mul.rn.bf16x2 t, t, $9; mov.b32 {$2, $6}, t;
 shf.r.wrap.b32 t, $8, $8, 6; and.b32 t, t, 0x81808180; shl.b32 u, $8, 2; and.b32 u, u, 0x00400040; or.b32 t, t, u;
 mul.rn.bf16x2 t, t, c; mul.rn.bf16x2 t, t, $10; mov.b32 {$3, $7}, t; }""")

# Four scale bytes -> four pairs of equal bfloat16 2**(s - 127): the byte is the exponent.
_SCALES = gl.constexpr("""{ prmt.b32 $0, $4, 0, 0x4040; shl.b32 $0, $0, 7;
 prmt.b32 $1, $4, 0, 0x4141; shl.b32 $1, $1, 7;
 prmt.b32 $2, $4, 0, 0x4242; shl.b32 $2, $2, 7;
 prmt.b32 $3, $4, 0, 0x4343; shl.b32 $3, $3, 7; }""")


@gluon.constexpr_function
def words_layout(warps):
    """The layout of words (warps, 8, 4, 4) in which a thread holds the four of its 16-byte load."""
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2]],
        [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]],
        [[warp, 0, 0, 0] for warp in (1, 2, 4) if warp < warps],
        [],
        [warps, 8, 4, 4],
    )


@gluon.constexpr_function
def scales_layout(warps):
    """The layout of scales (warps, 8): each thread holds those of its two rows."""
    return gl.DistributedLinearLayout(
        [], [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], [[warp, 0] for warp in (1, 2, 4) if warp < warps], [], [warps, 8]
    )


@gluon.jit
def word_offset(warp, row_pair, quad, step, WARP_STRIDE: gl.constexpr):
    """Where a word is, from its program's first: warps lie WARP_STRIDE apart, the rest as jmoe.PackedMxfp4 says."""
    return warp * WARP_STRIDE + row_pair * 16 + quad * 4 + step


@gluon.jit
def scale_offset(warp, row_pair, WARP_STRIDE: gl.constexpr):
    """word_offset for scales."""
    return warp * WARP_STRIDE + row_pair


@gluon.jit
def word_offsets(warps: gl.constexpr, WARP_STRIDE: gl.constexpr, W: gl.constexpr):
    """(warps, 8, 4, 4) word_offset of a product's words."""
    warp = gl.arange(0, warps, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, W))))[:, None, None, None]
    row_pair = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, W))))[None, :, None, None]
    quad = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, W))))[None, None, :, None]
    step = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, W))))[None, None, None, :]
    return word_offset(warp, row_pair, quad, step, WARP_STRIDE)


@gluon.jit
def scale_offsets(warps: gl.constexpr, WARP_STRIDE: gl.constexpr, S: gl.constexpr):
    """(warps, 8) scale_offset of a product's scales."""
    warp = gl.arange(0, warps, gl.SliceLayout(1, S))[:, None]
    return scale_offset(warp, gl.arange(0, 8, gl.SliceLayout(0, S))[None, :], WARP_STRIDE)


@gluon.jit
def decode_words(words, scales):
    """bf16 (warps, 8 row pairs, 4, 2, 2, 2, 2 rows, 2) of words (warps, 8, 4, 4) and scales (warps, 8) int32.

    Of an index along K, high to low: axes 3, 4, 7, 2, 5.
    """
    WARPS: gl.constexpr = words.shape[0]
    even0, odd0, even1, odd1 = gl.inline_asm_elementwise(
        _SCALES, "=&r,=&r,=&r,=&r,r", [scales], dtype=(gl.int32,) * 4, is_pure=True, pack=1
    )
    w = words.reshape([WARPS, 8, 4, 2, 2])
    even = gl.convert_layout(gl.join(even0, even1).reshape([WARPS, 8, 1, 2, 1]), w.type.layout)
    odd = gl.convert_layout(gl.join(odd0, odd1).reshape([WARPS, 8, 1, 2, 1]), w.type.layout)
    w_even, even = gl.broadcast(w, even)
    w_even, odd = gl.broadcast(w, odd)
    a0, a1, a2, a3, b0, b1, b2, b3 = gl.inline_asm_elementwise(
        _WEIGHTS, "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r", [w_even, even, odd], dtype=(gl.bfloat16,) * 8, is_pure=True, pack=1
    )
    low = gl.join(gl.join(a0, b0), gl.join(a1, b1))
    high = gl.join(gl.join(a2, b2), gl.join(a3, b3))
    return gl.join(low, high)


@gluon.jit
def unpack_weights(words, scales, A: gl.constexpr):
    """bf16 weights in the operand layout A, from words (warps, 8, 4, 4) and scales (warps, 8) int32: no data moves.

    (16 * warps, 64), or (parts, 16 * warps / parts, 64) if A has three axes.
    """
    WARPS: gl.constexpr = words.shape[0]
    tile = gl.permute(decode_words(words, scales), (0, 6, 1, 3, 4, 7, 2, 5))
    PARTS: gl.constexpr = A.parent.warps_per_cta[0]
    SHAPE: gl.constexpr = [16 * WARPS, 64] if A.parent.rank == 2 else [PARTS, 16 * WARPS // PARTS, 64]
    return gl.convert_layout(tile.reshape(SHAPE), A, assert_trivial=True)


def as_int32(bits: int) -> int:
    """The int32 of these 32 bits: Triton takes no larger constant beside an int32."""
    return bits - (bits >> 31 << 32)


NAN_OF_EVEN_ROWS = gl.constexpr(0x00800080)
NAN_OF_ODD_ROWS = gl.constexpr(as_int32(0x80008000))
"""Of nan_bits: a scale's bytes are of the even and the odd row in turn, first for 32 columns and then for the next."""

NAN_OF_FIRST_GROUP = gl.constexpr(0x00008080)
NAN_OF_SECOND_GROUP = gl.constexpr(as_int32(0x80800000))
"""Of nan_bits: those of either group of 32 columns, for both rows."""


@gluon.jit
def nan_bits(scales):
    """The top bit of each byte that is the scale 255, from int32 holding four."""
    return scales & ((scales & 0x7F7F7F7F) + 0x01010101)
