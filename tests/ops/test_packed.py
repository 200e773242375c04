"""Packing: exact, invertible, and the layout that its docstring promises."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.ops.packed import pack_weight, unpack_weight
from jmoe.ops.random_layer import LayerShape, random_layer


def random_weight(experts: int, n: int, k: int, seed: int = 0) -> jmoe.Mxfp4:
    """MXFP4 of uniform bytes, every scale among them."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (experts, n, k // 32, 16), np.uint8)
    return jmoe.Mxfp4(jnp.asarray(blocks), jnp.asarray(rng.integers(0, 256, (experts, n, k // 32), np.uint8)))


def weight_in_word(word: int, register: int, half: int) -> int:
    """The e2m1 code in a word, read as the kernel reads it: rotate, mask, and take a bfloat16's bits."""

    def rotated(by: int) -> int:
        return (word >> by | word << (32 - by)) & 0xFFFFFFFF

    moved = (word, word << 6, rotated(4), rotated(6) & ~0x00400040 | word << 2 & 0x00400040)[register]
    bits = moved >> 16 * half & 0xFFFF
    return (bits >> 15 & 1) << 3 | bits >> 6 & 7


@hypothesis.settings(max_examples=25)
@hypothesis.given(experts=st.integers(0, 3), n=st.integers(1, 150), groups=st.integers(1, 5), seed=st.integers(0, 99))
def test_unpacking_restores_every_byte(experts: int, n: int, groups: int, seed: int) -> None:
    weight = random_weight(experts, n, 32 * groups, seed)
    packed = pack_weight(weight)
    assert packed.shape == weight.shape
    unpacked = unpack_weight(packed)
    assert unpacked.blocks.dtype == unpacked.scales.dtype == jnp.uint8
    np.testing.assert_array_equal(unpacked.blocks, weight.blocks)
    np.testing.assert_array_equal(unpacked.scales, weight.scales)


def test_words_and_scales_lie_where_the_docstring_says() -> None:
    n, k = 128, 192
    weight = random_weight(2, n, k)
    packed = pack_weight(weight)
    codes = np.stack([weight.blocks & 15, weight.blocks >> 4], -1).reshape(2, n, k)
    words = np.asarray(packed.words).view(np.uint32).reshape(2, n // 64, k // 64, 4, 8, 4, 4)
    scales = np.asarray(packed.scales).view(np.uint8).reshape(2, n // 64, k // 64, 4, 8, 4)
    rng = np.random.default_rng(1)
    for _ in range(300):
        expert, row, column = rng.integers(2), rng.integers(n), rng.integers(k)
        warp, g, h = row % 64 // 16, row % 16 // 2, row % 2
        step, c, quad, p = column % 64 // 16, column % 16 // 8, column % 8 // 2, column % 2
        word = int(words[expert, row // 64, column // 64, warp, g, quad, step])
        assert weight_in_word(word, h + 2 * c, p) == codes[expert, row, column]
        byte = scales[expert, row // 64, column // 64, warp, g, 2 * (column % 64 // 32) + h]
        assert byte == weight.scales[expert, row, column // 32]


def test_padding_is_zero_weights_of_scale_one() -> None:
    packed = pack_weight(random_weight(1, 1, 32))
    codes = unpack_weight(dataclasses.replace(packed, n=64, k=64))
    assert not codes.blocks[0, 1:].any()
    assert not codes.blocks[0, 0, 1].any()
    assert (codes.scales[0, 1:] == 127).all()


def test_pack_changes_mxfp4_alone_and_unpack_inverts() -> None:
    layer = random_layer(LayerShape(1, hidden=96, intermediate=64, experts=2))
    packed = jmoe.pack(layer.experts)
    assert isinstance(packed.gate_up, jmoe.PackedMxfp4)
    assert packed.down_bias is layer.experts.down_bias
    assert jmoe.pack(packed).gate_up is packed.gate_up
    for got, want in zip(jax.tree.leaves(jmoe.unpack(packed)), jax.tree.leaves(layer.experts), strict=True):
        np.testing.assert_array_equal(got, want)
    dense = random_layer(LayerShape(1, hidden=96, intermediate=64, experts=2, mxfp4=False)).experts
    assert jmoe.pack(dense).gate_up is dense.gate_up


def test_numpy_weights_are_packed_alike() -> None:
    weight = random_weight(2, 70, 96)
    host = jmoe.Mxfp4(np.asarray(weight.blocks), np.asarray(weight.scales))
    np.testing.assert_array_equal(pack_weight(host).words, pack_weight(weight).words)


@pytest.mark.parametrize("part", ["both", "gate_up", "down"])
def test_the_layer_on_packed_decode_has_the_same_bits(part: str) -> None:
    layer = random_layer(LayerShape(9, hidden=96, intermediate=160, experts=3, top_k=2, adapters=2, rank=3, mixed=True))
    packed = jmoe.pack(layer.experts)
    if part != "both":
        packed = dataclasses.replace(layer.experts, **{part: getattr(packed, part)})

    @jax.jit
    def call(experts: jmoe.Experts) -> jax.Array:
        return jmoe.moe(layer.x, layer.router_logits, experts, top_k=2, lora=layer.lora, adapter_ids=layer.adapter_ids)

    np.testing.assert_array_equal(call(packed), call(layer.experts))


def test_weights_that_cannot_be_packed_are_refused() -> None:
    experts = random_layer(LayerShape(1, hidden=64, intermediate=64, experts=4, top_k=1)).experts
    few = jmoe.Mxfp4(experts.down.blocks[:3], experts.down.scales)
    with pytest.raises(
        ValueError, match=r"^experts.down.blocks must have shape \(4, 64, 2, 16\), got \(3, 64, 2, 16\)$"
    ):
        jmoe.pack(dataclasses.replace(experts, down=few))
    wide = jmoe.Mxfp4(experts.down.blocks.astype(jnp.int32), experts.down.scales)
    with pytest.raises(ValueError, match=r"^experts.down.blocks must be uint8, got int32$"):
        jmoe.pack(dataclasses.replace(experts, down=wide))
    with pytest.raises(
        ValueError, match=r"^experts.gate_up.scales must have rank 3 \[E, N, K/32\], got shape \(1, 4, "
    ):
        jmoe.pack(jax.tree.map(lambda leaf: leaf[None], experts))
    with pytest.raises(
        ValueError, match=r"^experts.gate_up.words must have rank 4 \[E, N/64, K/64, 512\], got shape \(1, "
    ):
        jmoe.unpack(jax.tree.map(lambda leaf: leaf[None], jmoe.pack(experts)))
    odd = dataclasses.replace(jmoe.pack(experts).down, k=50)
    with pytest.raises(ValueError, match=r"^experts.down.k must be a multiple of 32, got 50$"):
        jmoe.unpack(dataclasses.replace(experts, down=odd))


def test_malformed_packed_weights_are_refused() -> None:
    layer = random_layer(LayerShape(2, hidden=64, intermediate=64, experts=2, top_k=1))
    packed = jmoe.pack(layer.experts)

    def call(**parts: object) -> None:
        gate_up = dataclasses.replace(packed.gate_up, **parts)
        jmoe.moe(layer.x, layer.router_logits, dataclasses.replace(packed, gate_up=gate_up), top_k=1)

    with pytest.raises(ValueError, match=r"gate_up.words must have shape \(2, 2, 1, 512\), got \(2, 1, 1, 512\)"):
        call(words=packed.gate_up.words[:, :1])
    with pytest.raises(ValueError, match=r"experts.gate_up.scales must be int32, got float32"):
        call(scales=packed.gate_up.scales.astype(jnp.float32))
