"""MXFP4 weights in the order that Hopper's tensor cores take them: packing, exact and invertible, on any device."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Sharding
from jaxtyping import Array, Int32, UInt8

from jmoe.ops.check import check_weight
from jmoe.ops.experts import Experts
from jmoe.ops.gate_up import interleave
from jmoe.ops.mxfp4 import BLOCK, TILE, Mxfp4, PackedMxfp4
from jmoe.ops.weight_on_mesh import by_device

UNIT_SCALE = 127
"""The scale byte of padding: 2**0."""

# Of the eight weights in a word, the lowest bit of each field when the weight stands in a register's low half; in the
# high half all are 16 places on, around the word's end: (register, sign, two bits of exponent, mantissa).
_FIELDS = ((0, 15, 7, 6), (1, 9, 1, 0), (2, 19, 11, 10), (3, 21, 13, 4))


def pack(experts: Experts, *, interleaved: bool = True) -> Experts:
    """The same experts with their MXFP4 weights packed for Hopper; other leaves as they are.

    interleaved: gate and up alternate in gate_up's rows. If not, all of gate comes first, and they are made to
      alternate here, as by jmoe.interleave: the activation of what is returned is interleaved, as LoRA's B must be.

    On compute capability 9.0 jmoe.moe is fastest on packed experts, whatever the number of tokens and with or without
    LoRA. No other GPU has kernels that read them, so that there jmoe.moe unpacks them at each call: keep the
    checkpoint's layout there. One expert is packed at a time: numpy arrays or host-resident ones stay off the device
    but for it and the result. Experts that a mesh splits stay where they are, and each device packs its own.

    Raises:
      ValueError: a weight's arrays do not fit together, are of several layers, or are split along rows or columns.
    """
    experts = experts if interleaved else interleave(experts)
    return map_weights(experts, lambda weight: by_device(pack_weight, _pack_each, _pack_all, weight), Mxfp4)


def unpack(experts: Experts) -> Experts:
    """The inverse of pack.

    Raises:
      ValueError: a weight's arrays do not fit together, are of several layers, or are split along rows or columns.
    """
    return map_weights(
        experts, lambda weight: by_device(unpack_weight, unpack_weight, _unpack_all, weight), PackedMxfp4
    )


def map_weights(experts: Experts, change: Callable[[Any], Any], kind: type[Any]) -> Experts:
    """The experts with `change` applied to the weights of this kind."""
    changed = {}
    for projection in ("gate_up", "down"):
        weight = getattr(experts, projection)
        if isinstance(weight, kind):
            check_weight(f"experts.{projection}", weight)
            changed[projection] = change(weight)
    return dataclasses.replace(experts, **changed)


def pack_weight(weight: Mxfp4) -> PackedMxfp4:
    """One projection's weights, packed."""
    experts, n, k = weight.shape
    return pack_into(empty_packed(experts, n=n, k=k), weight)


def _pack_each(weight: Mxfp4) -> PackedMxfp4:
    """As pack_weight, in a program that may be compiled with others: one loop over experts."""
    words, scales = lax.map(lambda expert: _pack_expert(*expert), (weight.blocks, weight.scales))
    return PackedMxfp4(words, scales, *weight.shape[1:])


def _pack_all(weight: Mxfp4) -> PackedMxfp4:
    """As pack_weight, of all experts at once."""
    words, scales = jax.vmap(_pack_expert)(weight.blocks, weight.scales)
    return PackedMxfp4(words, scales, *weight.shape[1:])


def _unpack_all(packed: PackedMxfp4) -> Mxfp4:
    """As unpack_weight, of all experts at once."""
    return Mxfp4(*jax.vmap(functools.partial(unpack_expert, n=packed.n, k=packed.k))(packed.words, packed.scales))


def empty_packed(*leading: int, n: int, k: int, device: Sharding | None = None) -> PackedMxfp4:
    """Room for packed [N, K] of each index of the leading axes: [E], or [L, E] for several layers."""
    tiles = (*leading, -(-n // TILE), -(-k // TILE))
    words, scales = (jnp.zeros((*tiles, width), jnp.int32, device=device) for width in (512, 32))
    return PackedMxfp4(words, scales, n, k)


def pack_into(
    packed: PackedMxfp4, weight: Mxfp4, *layer: int | Int32[Array, ""], first: int | Int32[Array, ""] = 0
) -> PackedMxfp4:
    """`packed` with this weight's experts in their place, in its own memory, so that the one given is used up.

    Args:
      layer: which one, if `packed` is of several.
      first: the place of the weight's first expert.
    """
    words, scales = packed.words, packed.scales
    for expert in range(weight.shape[0]):
        index = *layer, first + expert
        words, scales = _pack_into(words, scales, index, weight.blocks[expert], weight.scales[expert])
    return dataclasses.replace(packed, words=words, scales=scales)


def unpack_weight(packed: PackedMxfp4) -> Mxfp4:
    """One projection's weights in the checkpoint's order."""
    blocks, scales = lax.map(
        lambda expert: unpack_expert(*expert, n=packed.n, k=packed.k), (packed.words, packed.scales)
    )
    return Mxfp4(blocks, scales)


@functools.partial(jax.jit, donate_argnames=("words", "packed_scales"))
def _pack_into(
    words: Int32[Array, "*E NB KB 512"],
    packed_scales: Int32[Array, "*E NB KB 32"],
    index: tuple[int | Int32[Array, ""], ...],
    blocks: UInt8[Array, "N G 16"],
    scales: UInt8[Array, "N G"],
) -> tuple[Int32[Array, "*E NB KB 512"], Int32[Array, "*E NB KB 32"]]:
    first = *index, 0, 0, 0
    one = (array.reshape((1,) * len(index) + array.shape) for array in _pack_expert(blocks, scales))
    return lax.dynamic_update_slice(words, next(one), first), lax.dynamic_update_slice(packed_scales, next(one), first)


def _pack_expert(
    blocks: UInt8[Array, "N G 16"], scales: UInt8[Array, "N G"]
) -> tuple[Int32[Array, "NB KB 512"], Int32[Array, "NB KB 32"]]:
    n, groups = scales.shape
    pad = -n % TILE, -groups % (TILE // BLOCK)
    codes = jnp.stack([blocks & 15, blocks >> 4], axis=-1).reshape(n, groups * BLOCK)
    codes = jnp.pad(codes, ((0, pad[0]), (0, pad[1] * BLOCK))).astype(jnp.uint32)
    scales = jnp.pad(scales, ((0, pad[0]), (0, pad[1])), constant_values=UNIT_SCALE)
    tiles = codes.shape[0] // TILE, codes.shape[1] // TILE
    # tile row, warp, g, h, tile column, step, c, quad, p -> tile row, tile column, warp, g, quad, step, c, h, p
    codes = codes.reshape(tiles[0], 4, 8, 2, tiles[1], 4, 2, 4, 2).transpose(0, 4, 1, 2, 7, 5, 6, 3, 8)
    codes = codes.reshape(*tiles, 512, 4, 2)
    words = jnp.zeros((*tiles, 512), jnp.uint32)
    for register, sign, exponent, mantissa in _FIELDS:
        for half in range(2):
            code = codes[..., register, half]
            words |= (code >> 3) << ((sign + 16 * half) % 32)
            words |= ((code >> 1) & 3) << (exponent + 16 * half)
            words |= (code & 1) << (mantissa + 16 * half)
    # tile row, warp, g, h, tile column, j -> tile row, tile column, warp, g, j, h
    scales = scales.reshape(tiles[0], 4, 8, 2, tiles[1], 2).transpose(0, 4, 1, 2, 5, 3).reshape(*tiles, 32, 4)
    return lax.bitcast_convert_type(words, jnp.int32), lax.bitcast_convert_type(scales, jnp.int32)


def unpack_expert(
    words: Int32[Array, "NB KB 512"], scales: Int32[Array, "NB KB 32"], *, n: int, k: int
) -> tuple[UInt8[Array, "N G 16"], UInt8[Array, "N G"]]:
    """One expert's blocks and scales in the checkpoint's order."""
    tiles = words.shape[:2]
    bits = lax.bitcast_convert_type(words, jnp.uint32)
    registers = [
        jnp.stack(
            [
                ((bits >> ((sign + 16 * half) % 32)) & 1) << 3
                | ((bits >> (exponent + 16 * half)) & 3) << 1
                | ((bits >> (mantissa + 16 * half)) & 1)
                for half in range(2)
            ],
            axis=-1,
        )
        for _, sign, exponent, mantissa in _FIELDS
    ]
    codes = jnp.stack(registers, axis=-2).astype(jnp.uint8).reshape(*tiles, 4, 8, 4, 4, 2, 2, 2)
    codes = codes.transpose(0, 2, 3, 7, 1, 5, 6, 4, 8).reshape(tiles[0] * TILE, tiles[1] * TILE)[:n, :k]
    blocks = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(n, k // BLOCK, BLOCK // 2)
    bytes_ = lax.bitcast_convert_type(scales, jnp.uint8).reshape(*tiles, 4, 8, 2, 2)
    rows = bytes_.transpose(0, 2, 3, 5, 1, 4).reshape(tiles[0] * TILE, tiles[1] * TILE // BLOCK)
    return blocks, rows[:n, : k // BLOCK]
