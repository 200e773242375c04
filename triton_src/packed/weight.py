"""The packed MXFP4 layout on Hopper: a thread's 16-byte load holds its own fragments of the tensor cores' A operand.

A word holds the eight weights that a thread of an m16n8k16 product takes in one step of 16 along K: registers a0 to a3,
two weights each. jmoe.PackedMxfp4 says which weight stands where.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Sign, exponent and mantissa of two weights, in the places of two bfloat16 that are 2**-126 times as large: mask
# 0x81c081c0. a0 stands there already, a1 six bits below, a2 rotated by four, a3 rotated by six but for its mantissa.
# The scales $9 are those of the even and the odd row, which an instruction takes for both of its halves as they stand.
_WEIGHTS = """{{ .reg .b32 t, u, e, o; .reg .b16 l, h; mov.b32 {{l, h}}, $9; mov.b32 e, {{l, l}}; mov.b32 o, {{h, h}};
 and.b32 t, $8, 0x81C081C0;
 {raise} mul.rn.bf16x2 t, t, e; mov.b32 {{$0, $4}}, t;
 shl.b32 t, $8, 6; and.b32 t, t, 0x81C081C0;
 {raise} mul.rn.bf16x2 t, t, o; mov.b32 {{$1, $5}}, t;
 shf.r.wrap.b32 t, $8, $8, 4; and.b32 t, t, 0x81C081C0;
 {raise} mul.rn.bf16x2 t, t, e; mov.b32 {{$2, $6}}, t;
 shf.r.wrap.b32 t, $8, $8, 6; and.b32 t, t, 0x81808180; shl.b32 u, $8, 2; and.b32 u, u, 0x00400040; or.b32 t, t, u;
 {raise} mul.rn.bf16x2 t, t, o; mov.b32 {{$3, $7}}, t; }}"""

# 2**126 times a small scale 2**(s - 127) is a bfloat16 whose exponent's bits are s + 126, and a weight by it is exact:
# the least, half of 2**-127, is a subnormal. Times a scale of 129 and more it passes bfloat16's range, so that two
# products take its place; 128 is counted with these, since its bit tells.
_BY_SMALL_SCALE = gl.constexpr(_WEIGHTS.format(**{"raise": ""}))
_BY_ANY_SCALE = gl.constexpr(_WEIGHTS.format(**{"raise": "mov.b32 u, 0x7E807E80; mul.rn.bf16x2 t, t, u;"}))

# Four scale bytes -> two pairs of bfloat16, for either group of 32 columns those of the even and the odd row.
_SMALL_SCALES = gl.constexpr("""{ prmt.b32 $0, $2, 0, 0x4140; mad.lo.u32 $0, $0, 128, 0x3F003F00;
 prmt.b32 $1, $2, 0, 0x4342; mad.lo.u32 $1, $1, 128, 0x3F003F00; }""")
# 2**(s - 127): the byte is the exponent, but that 0 is a subnormal's.
_ANY_SCALES = gl.constexpr("""{ .reg .b32 c; mov.b32 c, 0x00400040;
 prmt.b32 $0, $2, 0, 0x4140; shl.b32 $0, $0, 7; max.u16x2 $0, $0, c;
 prmt.b32 $1, $2, 0, 0x4342; shl.b32 $1, $1, 7; max.u16x2 $1, $1, c; }""")


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
def decode_words(words, scales, ANY_SCALE: gl.constexpr):
    """bf16 (warps, 8 row pairs, 4, 2, 2, 2, 2 rows, 2) of words (warps, 8, 4, 4) and scales (warps, 8) int32.

    Of an index along K, high to low: axes 3, 4, 7, 2, 5. Without ANY_SCALE scales of 128 and more give other numbers.
    """
    WARPS: gl.constexpr = words.shape[0]
    SCALES: gl.constexpr = _ANY_SCALES if ANY_SCALE else _SMALL_SCALES
    WEIGHTS: gl.constexpr = _BY_ANY_SCALE if ANY_SCALE else _BY_SMALL_SCALE
    first, second = gl.inline_asm_elementwise(
        SCALES, "=&r,=&r,r", [scales], dtype=(gl.int32,) * 2, is_pure=True, pack=1
    )
    w = words.reshape([WARPS, 8, 4, 2, 2])
    factors = gl.convert_layout(gl.join(first, second).reshape([WARPS, 8, 1, 2, 1]), w.type.layout)
    w, factors = gl.broadcast(w, factors)
    a0, a1, a2, a3, b0, b1, b2, b3 = gl.inline_asm_elementwise(
        WEIGHTS, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [w, factors], dtype=(gl.bfloat16,) * 8, is_pure=True, pack=1
    )
    low = gl.join(gl.join(a0, b0), gl.join(a1, b1))
    high = gl.join(gl.join(a2, b2), gl.join(a3, b3))
    return gl.join(low, high)


@gluon.jit
def unpack_weights(words, scales, A: gl.constexpr, ANY_SCALE: gl.constexpr = False):
    """bf16 weights in the operand layout A, from words (warps, 8, 4, 4) and scales (warps, 8) int32: no data moves.

    (16 * warps, 64), or (parts, 16 * warps / parts, 64) if A has three axes. ANY_SCALE as in decode_words.
    """
    WARPS: gl.constexpr = words.shape[0]
    tile = gl.permute(decode_words(words, scales, ANY_SCALE), (0, 6, 1, 3, 4, 7, 2, 5))
    PARTS: gl.constexpr = A.parent.warps_per_cta[0]
    SHAPE: gl.constexpr = [16 * WARPS, 64] if A.parent.rank == 2 else [PARTS, 16 * WARPS // PARTS, 64]
    return gl.convert_layout(tile.reshape(SHAPE), A, assert_trivial=True)


@gluon.jit
def any_large(scales):
    """Whether one of a program's scales is 128 or more, of int32 holding four, in layout (warps, 8) or (warps, 8, 4).

    Of several by | of them. The answer is a scalar.
    """
    large = (scales & TOP_BITS) != 0
    return gl.max(large.to(gl.int32).reshape([scales.numel]), axis=0) != 0


def as_int32(bits: int) -> int:
    """The int32 of these 32 bits: Triton takes no larger constant beside an int32."""
    return bits - (bits >> 31 << 32)


NAN_OF_EVEN_ROWS = gl.constexpr(0x00800080)
NAN_OF_ODD_ROWS = gl.constexpr(as_int32(0x80008000))
"""Of nan_bits: a scale's bytes are of the even and the odd row in turn, first for 32 columns and then for the next."""

NAN_OF_FIRST_GROUP = gl.constexpr(0x00008080)
NAN_OF_SECOND_GROUP = gl.constexpr(as_int32(0x80800000))
"""Of nan_bits: those of either group of 32 columns, for both rows."""


TOP_BITS = gl.constexpr(as_int32(0x80808080))


@gluon.jit
def nan_bits(scales):
    """The top bit of each byte that is the scale 255, from int32 holding four."""
    return scales & ((scales & 0x7F7F7F7F) + 0x01010101)


@gluon.jit
def nan_rows(acc, nan):
    """acc (parts, 16 * warps / parts, tokens) or (16 * warps, tokens), NaN in the rows of which a scale is.

    nan: nan_bits of all of their scales, (warps, 8).
    """
    even = ((nan & NAN_OF_EVEN_ROWS) != 0).to(gl.int32)
    odd = ((nan & NAN_OF_ODD_ROWS) != 0).to(gl.int32)
    # Fragment rows g and g + 8 are columns 2g and 2g + 1.
    rows = gl.permute(gl.join(even, odd), (0, 2, 1)).reshape(acc.shape[:-1])
    rows = gl.convert_layout(rows, gl.SliceLayout(len(acc.shape) - 1, acc.type.layout))
    return gl.where(gl.expand_dims(rows, len(acc.shape) - 1) != 0, float("nan"), acc)


@gluon.jit
def unknown(number):
    """The number, of which the compiler knows nothing."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)
