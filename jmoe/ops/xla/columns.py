"""One expert's weights as products take them.

MXFP4 bytes hold an even column in the low nibble and the odd one after it in the high one. Laying them side by side
costs a CPU ten times what decoding does, so that either half stays an array of its own, and x is split alike.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from jmoe.ops.mxfp4 import Mxfp4, PackedMxfp4, scale_values
from jmoe.ops.packed import unpack_expert

type Columns = tuple[Float[Array, "N K"]] | tuple[Float[Array, "N K/2"], Float[Array, "N K/2"]]
"""All columns of [N, K], or the even ones and the odd ones."""

_TWICE_E2M1 = 0xC8643210 - (1 << 32)  # twice the magnitude of e2m1 code c in bits 4c to 4c + 3, as an int32


def decode_columns(weight: Mxfp4 | PackedMxfp4 | Float[Array, "N K"], dtype: jnp.dtype) -> Columns:
    """One expert's weights in this dtype, exact wherever jmoe.dequantize is."""
    if isinstance(weight, PackedMxfp4):
        weight = Mxfp4(*unpack_expert(weight.words, weight.scales, n=weight.n, k=weight.k))
    if not isinstance(weight, Mxfp4):
        return (weight.astype(dtype),)
    scales = scale_values(weight.scales)[..., None]
    even, odd = (
        (e2m1_by_table(codes) * scales).astype(dtype).reshape(codes.shape[0], -1)
        for codes in (weight.blocks & 15, weight.blocks >> 4)
    )
    return even, odd


def e2m1_by_table(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """As mxfp4.e2m1_values, by shifts of one word that holds all magnitudes: half the time on a CPU."""
    code = codes.astype(jnp.int32)
    twice = lax.shift_right_logical(jnp.int32(_TWICE_E2M1), (code & 7) * 4) & 15
    magnitude = twice.astype(jnp.float32) * 0.5
    return jnp.where(code > 7, -magnitude, magnitude)


def times_transposed(x: Float[Array, "M K"], weight: Columns) -> Float[Array, "M N"]:
    """x w^T in float32."""
    if len(weight) == 1:
        return matmul(x, weight[0], 1, 1)
    return matmul(x[:, 0::2], weight[0], 1, 1) + matmul(x[:, 1::2], weight[1], 1, 1)


def times(x: Float[Array, "M N"], weight: Columns) -> Float[Array, "M K"]:
    """x w in float32."""
    parts = [matmul(x, part, 1, 0) for part in weight]
    return parts[0] if len(parts) == 1 else jnp.stack(parts, axis=-1).reshape(x.shape[0], -1)


def matmul(x: jax.Array, w: jax.Array, x_axis: int, w_axis: int) -> jax.Array:
    """The product over these axes in float32, at full precision also where float32 products default to less."""
    return lax.dot_general(
        x, w, (((x_axis,), (w_axis,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
