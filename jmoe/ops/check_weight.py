"""What is refused of one weight, wherever it comes in."""

import jax
import jax.numpy as jnp

from jmoe.ops.mxfp4 import BLOCK, TILE, Mxfp4, PackedMxfp4

FLOATS = (jnp.bfloat16, jnp.float32)


def check_float(name: str, array: jax.Array) -> None:
    """Raises ValueError unless the array is bfloat16 or float32."""
    if array.dtype not in FLOATS:
        raise ValueError(f"{name} must be bfloat16 or float32, got {array.dtype}")


def check_shape(name: str, array: jax.Array, want: tuple[int, ...]) -> None:
    """Raises ValueError unless the array has this shape."""
    if array.shape != want:
        raise ValueError(f"{name} must have shape {want}, got {array.shape}")


def check_weight(name: str, weight: Mxfp4 | PackedMxfp4 | jax.Array) -> None:
    """Raises ValueError unless the weight is well-formed MXFP4, packed or not, or a floating array of rank 3."""
    if isinstance(weight, PackedMxfp4):
        if weight.words.ndim != 4:
            raise ValueError(f"{name}.words must have rank 4 [E, N/64, K/64, 512], got shape {weight.words.shape}")
        tiles = (weight.words.shape[0], -(-weight.n // TILE), -(-weight.k // TILE))
        for part, array, last in (("words", weight.words, 512), ("scales", weight.scales, 32)):
            check_shape(f"{name}.{part}", array, (*tiles, last))
            if array.dtype != jnp.int32:
                raise ValueError(f"{name}.{part} must be int32, got {array.dtype}")
        if weight.k % BLOCK:
            raise ValueError(f"{name}.k must be a multiple of {BLOCK}, got {weight.k}")
        return None
    if not isinstance(weight, Mxfp4):
        if weight.ndim != 3:
            raise ValueError(f"{name} must have rank 3 [E, N, K], got shape {weight.shape}")
        return check_float(name, weight)
    for part, array in (("blocks", weight.blocks), ("scales", weight.scales)):
        if array.dtype != jnp.uint8:
            raise ValueError(f"{name}.{part} must be uint8, got {array.dtype}")
    if weight.scales.ndim != 3:
        raise ValueError(f"{name}.scales must have rank 3 [E, N, K/{BLOCK}], got shape {weight.scales.shape}")
    check_shape(f"{name}.blocks", weight.blocks, (*weight.scales.shape, BLOCK // 2))
