"""Every code by every scale, as the kernels' instructions decode them: bit by bit what the format says."""

import ml_dtypes
import numpy as np
import pytest

from jmoe.ops.mxfp4 import Mxfp4
from jmoe.ops.packed import pack_weight
from jmoe.triton_src.packed.transposed import STEP, decode_transposed, spread_scales, transposed_column, transposed_word
from jmoe.triton_src.packed.weight import any_large, decode_words, nan_bits
from tests.triton_src.packed.gluon_on_numpy import python_body
from tests.triton_src.packed.packed_layers import dequantize

BLOCKS = 8
# Integers wrap around, and products overflow, as on a GPU.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ROWS, COLUMNS = np.ix_(range(64 * BLOCKS), range(64))


def weights_of_every_scale() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(words [BLOCKS, 512], scales [BLOCKS, 32], values [512, 64]): two rows have a scale, and of it all codes.

    Of 64 columns the 16 that stand in the same register and half have one code each.
    """
    codes = np.broadcast_to(COLUMNS // 16 * 4 + COLUMNS // 2 % 4, (64 * BLOCKS, 64)).astype(np.uint8)
    blocks = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(1, 64 * BLOCKS, 2, 16)
    scales = np.broadcast_to(ROWS // 2, (64 * BLOCKS, 2)).astype(np.uint8)[None]
    packed = pack_weight(Mxfp4(blocks, scales))
    words, packed_scales = (np.asarray(array).reshape(BLOCKS, -1) for array in (packed.words, packed.scales))
    return words, packed_scales, dequantize(blocks, scales)[0]


def assert_same_bits(got: np.ndarray, want: np.ndarray, any_scale: bool) -> None:
    """[512, 64] bfloat16 and float64, for the scales that are decoded so. What is NaN is not looked at."""
    here = np.broadcast_to((255 if any_scale else 128) > ROWS // 2, want.shape)
    exact = want.astype(np.float32).astype(ml_dtypes.bfloat16)
    small = here & (ROWS // 2 < 253)
    np.testing.assert_array_equal(exact.astype(np.float64)[small], want[small])
    np.testing.assert_array_equal(got.view(np.uint16)[here], exact.view(np.uint16)[here])


@pytest.mark.parametrize("any_scale", [False, True])
def test_weights_in_their_own_order(any_scale: bool) -> None:
    words, scales, values = weights_of_every_scale()
    decode = python_body(decode_words)
    decoded = decode(words.reshape(4 * BLOCKS, 8, 4, 4), scales.reshape(4 * BLOCKS, 8), any_scale)
    # Warp, row pair, row of it, then the bits of a column.
    assert_same_bits(decoded.transpose(0, 1, 6, 3, 4, 7, 2, 5).reshape(values.shape), values, any_scale)


@pytest.mark.parametrize("any_scale", [False, True])
def test_weights_transposed(any_scale: bool) -> None:
    words, scales, values = weights_of_every_scale()
    warp, column, row_pair = np.ix_(range(2 * BLOCKS), range(8), range(4))
    first = transposed_word.fn(warp // 2 * 512, warp, column, row_pair)
    of_lanes = scales[warp // 2, column * 4 + row_pair]
    factors = python_body(spread_scales)(of_lanes, np.broadcast_to(warp % 2, of_lanes.shape), any_scale)
    own = tuple(words.reshape(-1)[first + 64 * i] for i in range(8))
    decode = python_body(decode_transposed)
    columns = transposed_column.fn(np.arange(64 * BLOCKS), 2 * BLOCKS)
    got = np.zeros(values.shape, ml_dtypes.bfloat16)
    for part in range(64 // STEP.value):
        decoded = decode(own, factors, part, None, any_scale)
        rows = columns[:, None] // 64 * 64 + part * STEP.value + np.arange(STEP.value)
        got[rows, columns[:, None] % 64] = decoded
    assert_same_bits(got, values, any_scale)


def test_a_scale_that_is_large_or_not_a_number_is_seen() -> None:
    scales = np.full((4, 8, 4), 127, np.uint8)
    for scale in (0, 127, 128, 254, 255):
        scales[2, 5, 3] = scale
        words = scales.view(np.int32)[..., 0]
        assert python_body(any_large)(words) == (scale >= 128)
        nan = np.ascontiguousarray(python_body(nan_bits)(words)).view(np.uint8).reshape(scales.shape)
        np.testing.assert_array_equal(nan >> 7, scales == 255)
