"""MXFP4 conversion against ml_dtypes' own e2m1 and e8m0 types."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe import Experts, Mxfp4, dequantize, pack, quantize, unpack


def every_code(scale: int) -> Mxfp4:
    """One row of one block that holds each of the sixteen codes twice."""
    return Mxfp4(
        jnp.array([*range(0x00, 0x100, 0x11)], jnp.uint8).reshape(1, 1, 1, 16), jnp.full((1, 1, 1), scale, jnp.uint8)
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("scale", [2, 100, 127, 128, 252])
def test_dequantized_values_are_exact(scale: int, dtype: jnp.dtype) -> None:
    codes = np.repeat(np.arange(16, dtype=np.uint8), 2).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    factor = np.uint8([scale]).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    got = np.asarray(dequantize(every_code(scale), dtype))[0, 0]
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(np.float64), codes * factor)


def test_low_nibble_comes_first() -> None:
    q = Mxfp4(jnp.full((1, 1, 1, 16), 0x72, jnp.uint8), jnp.full((1, 1, 1), 127, jnp.uint8))
    assert dequantize(q)[0, 0, :4].tolist() == [1.0, 6.0, 1.0, 6.0]


def test_packed_weights_are_dequantized_after_unpacking() -> None:
    experts = Experts(quantize(jnp.ones((1, 64, 32))), None, quantize(jnp.ones((1, 32, 32))), None)
    packed = pack(experts)
    with pytest.raises(ValueError, match=r"dequantize takes Mxfp4, and jmoe.unpack makes it .* got PackedMxfp4"):
        dequantize(packed.gate_up)
    assert (dequantize(unpack(packed).gate_up) == 1).all()


def test_scale_255_is_nan_for_zeros_too() -> None:
    assert jnp.isnan(dequantize(every_code(255))).all()


def test_scale_254_overflows_to_infinity() -> None:
    values = dequantize(every_code(254), jnp.float32)[0, 0]
    assert jnp.isinf(values[8:16]).all()  # codes 4 to 7: 2 to 6
    assert jnp.isfinite(values[:8]).all()


@pytest.mark.parametrize("scale", [0, 1])
def test_subnormal_scales_give_nothing_but_subnormals(scale: int) -> None:
    assert float(jnp.abs(dequantize(every_code(scale), jnp.float32)).max()) <= 6 * 2.0**-126


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(-100, 100))
def test_quantized_values_are_the_nearest(seed: int, exponent: int) -> None:
    w = (np.random.default_rng(seed).standard_normal((2, 3, 64)) * 2.0**exponent).astype(np.float32)
    q = quantize(jnp.asarray(w))
    # The scale by its definition, then the nearest of the sixteen values, ties to the even code as ml_dtypes rounds.
    shared = np.floor(np.log2(np.abs(w).reshape(2, 3, 2, 32).max(-1))).astype(np.int32) - 2
    np.testing.assert_array_equal(np.asarray(q.scales), shared + 127)
    scaled = w.reshape(2, 3, 2, 32) * np.exp2(-shared.astype(np.float64))[..., None]
    want = np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    got = np.asarray(dequantize(q, jnp.float32)).reshape(2, 3, 2, 32) * np.exp2(-shared.astype(np.float64))[..., None]
    np.testing.assert_array_equal(got, want)


def test_ties_go_to_the_even_code() -> None:
    w = jnp.array([4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75] + [0.0] * 22).reshape(1, 1, 32)
    want = [4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -1.0]
    assert dequantize(quantize(w))[0, 0, :10].tolist() == want


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_bytes_survive_a_round_trip_when_a_block_uses_its_range(seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (2, 3, 4, 16), dtype=np.uint8)
    blocks[..., 0] |= 0x07  # a 6 in every block, so that its scale is the one quantize would choose
    q = Mxfp4(jnp.asarray(blocks), jnp.asarray(rng.integers(3, 250, (2, 3, 4), dtype=np.uint8)))
    again = quantize(dequantize(q, jnp.float32))
    assert jnp.array_equal(again.blocks, q.blocks)
    assert jnp.array_equal(again.scales, q.scales)


def test_zero_blocks_stay_zero_and_non_finite_ones_become_nan() -> None:
    w = jnp.zeros((1, 3, 32)).at[0, 1, 5].set(jnp.inf).at[0, 2, 7].set(jnp.nan)
    q = quantize(w)
    assert q.scales[0, :, 0].tolist() == [0, 255, 255]
    values = dequantize(q)
    assert (values[0, 0] == 0).all()
    assert jnp.isnan(values[0, 1:]).all()


def test_quantize_works_under_jit_and_in_bfloat16() -> None:
    w = jax.random.normal(jax.random.key(0), (2, 4, 64), jnp.bfloat16)
    eager, jitted = quantize(w), jax.jit(quantize)(w)
    assert jnp.array_equal(eager.blocks, jitted.blocks)
    assert eager.shape == (2, 4, 64)


def test_quantize_refuses_what_has_no_blocks() -> None:
    with pytest.raises(ValueError, match=r"K must be a multiple of 32 for MXFP4, got 40 \(w has shape \(1, 2, 40\)\)"):
        quantize(jnp.zeros((1, 2, 40)))
    with pytest.raises(ValueError, match=r"w must have rank 3 \[E, N, K\], got shape \(2, 32\)"):
        quantize(jnp.zeros((2, 32)))
    with pytest.raises(ValueError, match="w must be a floating-point array, got int32"):
        quantize(jnp.zeros((1, 2, 32), jnp.int32))
