"""MXFP4 weights: the container, and conversion from and to ordinary arrays.

Format: OCP Microscaling Formats (MX) v1.0, element e2m1, shared scale e8m0, block of 32 along the last axis.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, UInt8

from jmoe.ops.exportable import exportable

BLOCK = 32
"""Consecutive values along K that share one scale byte."""

TILE = 64
"""Rows and columns of PackedMxfp4's blocks; N and K are padded with zeros to multiples of it."""

NAN_SCALE = 255
"""The e8m0 byte that is not a number; every value of its block is NaN."""

_TWICE_E2M1 = 0xC8643210 - (1 << 32)  # twice the magnitude of e2m1 code c in bits 4c to 4c + 3, as an int32
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between e2m1 magnitudes i and i + 1
_E2M1_LARGEST_EXPONENT = 2  # 6 = 1.5 * 2**2


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mxfp4:
    """4-bit weights [E, N, K] in the order of gpt-oss checkpoints; a pytree.

    blocks: uint8 [E, N, K/32, 16]; byte j of a block holds element 2j in its low nibble and 2j + 1 in its high one.
    scales: uint8 [E, N, K/32]; byte s multiplies its block by 2**(s - 127), and 255 is NaN.
    """

    blocks: UInt8[Array, "E N G 16"]
    scales: UInt8[Array, "E N G"]

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, N, K) of the weights that the bytes stand for, after the layers of a stack of them."""
        *leading, n, groups = self.scales.shape
        return *leading, n, groups * BLOCK


@exportable
@functools.partial(jax.tree_util.register_dataclass, data_fields=("words", "scales"), meta_fields=("n", "k"))
@dataclasses.dataclass(frozen=True)
class PackedMxfp4:
    """4-bit weights [E, N, K] as the Hopper kernels read them; a pytree. Made by jmoe.pack.

    words: int32 [E, N/64, K/64, 512]. The last axis counts warps (4), rows g (8), quads q (4) and steps (4). A word
      holds the weights at rows 16 * warp + 2g + h and columns 16 * step + 8c + 2q + p of its block of 64 by 64, for
      h, c and p in (0, 1), in registers h + 2c and halves p; jmoe.ops.packed has their bits. Even rows
      (gpt-oss's gates) lie beside odd ones (up) in one thread.
    scales: int32 [E, N/64, K/64, 32], four scale bytes each; byte 2j + h is that of row 16 * warp + 2g + h and columns
      32j to 32j + 31.
    n, k: N and K before padding; static.
    """

    words: Int32[Array, "E NB KB 512"]
    scales: Int32[Array, "E NB KB 32"]
    n: int
    k: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, N, K) of the weights that the bytes stand for, after the layers of a stack of them."""
        return *self.words.shape[:-3], self.n, self.k


def quantize(w: Float[Array, "E N K"]) -> Mxfp4:
    """Rounds weights to MXFP4, block by block, as section 6.3 of the OCP MX specification says.

    A block's scale is 2**(floor(log2(largest magnitude)) - 2); its values are rounded to the nearest e2m1, ties to
    even, and saturate at 6 scales. A block with a NaN or an infinity becomes all NaN (scale byte 255).

    Raises:
      ValueError: w is not a floating array of rank 3, or K is not a multiple of 32.
    """
    if w.ndim != 3:
        raise ValueError(f"w must have rank 3 [E, N, K], got shape {w.shape}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w must be a floating-point array, got {w.dtype}")
    experts, n, k = w.shape
    if k % BLOCK:
        raise ValueError(f"K must be a multiple of {BLOCK} for MXFP4, got {k} (w has shape {w.shape})")
    grouped = w.astype(jnp.float32).reshape(experts, n, k // BLOCK, BLOCK)
    largest = jnp.max(jnp.abs(grouped), axis=-1)
    _, exponent = jnp.frexp(largest)  # largest = m * 2**exponent with m in [0.5, 1)
    shared = jnp.clip(exponent - 1 - _E2M1_LARGEST_EXPONENT, -127, 127)
    shared = jnp.where(largest > 0, shared, -127)
    # 2**-shared passes float32's range at either end, so it is applied in two halves.
    half = shared // 2
    magnitude = jnp.ldexp(jnp.ldexp(jnp.abs(grouped), -half[..., None]), -(shared - half)[..., None])
    code = jnp.zeros(grouped.shape, jnp.uint8)
    for i, midpoint in enumerate(_MIDPOINTS):
        above = magnitude >= midpoint if i % 2 else magnitude > midpoint  # a tie goes to the even code
        code += above.astype(jnp.uint8)
    code |= jnp.signbit(grouped).astype(jnp.uint8) << 3
    blocks = code[..., 0::2] | (code[..., 1::2] << 4)
    scales = jnp.where(jnp.isfinite(largest), shared + 127, NAN_SCALE).astype(jnp.uint8)
    return Mxfp4(blocks, scales)


def dequantize(q: Mxfp4, dtype: DTypeLike = jnp.bfloat16) -> Float[Array, "E N K"]:
    """The weights that MXFP4 bytes stand for, [E, N, K].

    Exact in bfloat16 and float32 for scale bytes 2 to 252. At the ends: 0 and 1 may flush subnormals to zero, 253 and
    254 overflow to infinity where the format's value passes the dtype's range, 255 gives NaN for its whole block.

    Raises:
      ValueError: q is not an Mxfp4.
    """
    if not isinstance(q, Mxfp4):
        raise ValueError(f"dequantize takes Mxfp4, and jmoe.unpack makes it of a PackedMxfp4; got {type(q).__name__}")
    nibbles = jnp.stack([q.blocks & 15, q.blocks >> 4], axis=-1).reshape(*q.scales.shape, BLOCK)
    values = e2m1_values(nibbles) * scale_values(q.scales)[..., None]
    return values.reshape(q.shape).astype(dtype)


def e2m1_values(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """e2m1 codes, 0 to 15, as float32, by shifts of one word that holds all magnitudes.

    A CPU takes half the time that putting exponent and mantissa in their places does.
    """
    code = codes.astype(jnp.int32)
    twice = lax.shift_right_logical(jnp.int32(_TWICE_E2M1), (code & 7) * 4) & 15
    magnitude = twice.astype(jnp.float32) * 0.5
    return jnp.where(code > 7, -magnitude, magnitude)


def scale_values(scales: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """e8m0 bytes as float32: 2**(s - 127), NaN for 255."""
    exponent = scales.astype(jnp.uint32) << 23
    bits = jnp.where(scales == 0, jnp.uint32(1 << 22), exponent)  # 2**-127 is subnormal in float32
    return jnp.where(scales == NAN_SCALE, jnp.nan, lax.bitcast_convert_type(bits, jnp.float32))
