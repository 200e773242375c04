"""Products with one expert's weights, which are decoded a piece at a time: a piece stays in a CPU's cache.

MXFP4 bytes hold an even column in the low nibble and the odd one after it in the high one. Laying them side by side
costs a CPU ten times what decoding does, so that either half stays an array of its own, and x is split alike.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jmoe.ops.mxfp4 import Mxfp4, PackedMxfp4, e2m1_values, scale_values
from jmoe.ops.packed import unpack_expert

type ExpertWeight = Mxfp4 | Float[Array, "N K"]
type Columns = tuple[Float[Array, "N K"]] | tuple[Float[Array, "N K/2"], Float[Array, "N K/2"]]
"""All columns of [N, K], or the even ones and the odd ones."""

PIECE = 576 * 2880
"""The most weights that are decoded at once, for a CPU's cache."""


def unpacked(weight: Mxfp4 | PackedMxfp4 | Float[Array, "N K"]) -> ExpertWeight:
    """One expert's weights in the checkpoint's order."""
    if not isinstance(weight, PackedMxfp4):
        return weight
    # Without a barrier either half of the columns would unpack the words for itself.
    return Mxfp4(*lax.optimization_barrier(unpack_expert(weight.words, weight.scales, n=weight.n, k=weight.k)))


def times_transposed(x: Float[Array, "M K"], weight: ExpertWeight) -> Float[Array, "M N"]:
    """x w^T in float32."""
    rows = x.shape[0]
    columns_of_x = (x[:, 0::2], x[:, 1::2]) if isinstance(weight, Mxfp4) else (x,)
    # With a power of two of rows a CPU takes up to a fifth less time for w x^T than for x w^T, with others more.
    is_swapped = rows & (rows - 1) == 0

    def product(piece: ExpertWeight) -> Float[Array, "..."]:
        pairs = zip(columns_of_x, decode_columns(piece, x.dtype), strict=True)
        products = [matmul(w, x, 1, 1) if is_swapped else matmul(x, w, 1, 1) for x, w in pairs]
        return products[0] if len(products) == 1 else products[0] + products[1]

    products = lax.map(product, _pieces(weight))
    return products.reshape(-1, rows).T if is_swapped else jnp.moveaxis(products, 0, 1).reshape(rows, -1)


def times(x: Float[Array, "M N"], weight: ExpertWeight) -> Float[Array, "M K"]:
    """x w in float32."""
    pieces = _pieces(weight)
    count = jax.tree.leaves(pieces)[0].shape[0]
    by_piece = jnp.moveaxis(x.reshape(x.shape[0], count, -1), 1, 0), pieces

    def product(piece: tuple[Float[Array, "M n"], ExpertWeight]) -> list[Float[Array, "M k"]]:
        return [matmul(piece[0], columns, 1, 0) for columns in decode_columns(piece[1], x.dtype)]

    sums = product(jax.tree.map(lambda leaf: leaf[0], by_piece))
    rest = jax.tree.map(lambda leaf: leaf[1:], by_piece)
    sums, _ = lax.scan(lambda sums, piece: (jax.tree.map(jnp.add, sums, product(piece)), None), sums, rest)
    return sums[0] if len(sums) == 1 else jnp.stack(sums, axis=-1).reshape(x.shape[0], -1)


def _pieces(weight: ExpertWeight) -> Mxfp4 | Float[Array, "pieces n K"]:
    """The weights with their rows [N] as [pieces, rows]."""
    n, k = weight.shape
    count = next(count for count in range(-(-n * k // PIECE), n + 1) if n % count == 0)
    return jax.tree.map(lambda leaf: leaf.reshape(count, n // count, *leaf.shape[1:]), weight)


def decode_columns(weight: ExpertWeight, dtype: jnp.dtype) -> Columns:
    """Weights in this dtype, exact wherever jmoe.dequantize is."""
    if not isinstance(weight, Mxfp4):
        return (weight.astype(dtype),)
    scales = scale_values(weight.scales)[..., None]
    even, odd = (
        exact_cast(e2m1_values(codes) * scales, dtype).reshape(codes.shape[0], -1)
        for codes in (weight.blocks & 15, weight.blocks >> 4)
    )
    return even, odd


def exact_cast(values: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """As astype for float32 values that bfloat16 can hold, by cutting them, in a third of the time on a CPU."""
    if dtype != jnp.bfloat16:
        return values.astype(dtype)
    upper = lax.bitcast_convert_type(values, jnp.uint32) >> 16
    return lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def matmul(x: jax.Array, w: jax.Array, x_axis: int, w_axis: int) -> jax.Array:
    """The product over these axes in float32, at full precision also where float32 products default to less."""
    return lax.dot_general(
        x, w, (((x_axis,), (w_axis,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
