"""jmoe.quantize beside two public MXFP4 encoders: gguf's, of llama.cpp's files, and compressed-tensors', of vLLM's.

docs/mxfp4.md says on which values they agree and on which they do not; both are held here.
"""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe import dequantize, quantize

BLOCK = 32
MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
"""Between neighbouring magnitudes of e2m1, where ties are."""


def of_jmoe(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scale bytes [B], values [B, 32]) of float32 blocks [B, 32]."""
    q = quantize(jnp.asarray(blocks)[None])
    return np.asarray(q.scales)[0, :, 0], np.asarray(dequantize(q, jnp.float32))[0]


def of_gguf(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same by gguf: a block is its scale byte and 16 bytes, element j low and element j + 16 high."""
    kind = gguf.GGMLQuantizationType.MXFP4
    encoded = gguf.quantize(blocks, kind)
    return encoded[:, 0], gguf.dequantize(encoded, kind)


def of_compressed_tensors(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same by compressed-tensors: elements 2j low and 2j + 1 high, as OpenAI has them; scales apart."""
    arguments = QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=BLOCK, symmetric=True, scale_dtype=torch.uint8
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    weight = torch.from_numpy(blocks)
    scale, _ = calculate_qparams(weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True), arguments)
    encoded = MXFP4PackedCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    values = MXFP4PackedCompressor.decompress(encoded, scheme)["weight"]
    return encoded["weight_scale"].numpy()[:, 0], values.float().numpy()


@st.composite
def agreed(draw: st.DrawFn) -> np.ndarray:
    """A block on which all agree: its largest magnitude is 1 to 1.75 times a power of two, and no value is near a tie.

    In units of its scale the largest is in [4, 7) then, and values beyond 6 saturate.
    """

    def off_ties(value: float) -> bool:
        return bool((np.abs(abs(value) - MIDPOINTS) > 2.0**-16).all())

    largest = draw(st.floats(4, 7, width=32, exclude_max=True).filter(off_ties))
    others = st.floats(-largest, largest, width=32).filter(off_ties)
    values = draw(st.lists(others, min_size=BLOCK - 1, max_size=BLOCK - 1))
    values.insert(draw(st.integers(0, BLOCK - 1)), draw(st.sampled_from([largest, -largest])))
    return np.ldexp(np.float32(values), draw(st.integers(-100, 100))).astype(np.float32)[None]


@settings(max_examples=60)
@given(agreed())
def test_encoders_agree_away_from_ties_where_the_largest_is_below_seven_scales(block: np.ndarray) -> None:
    scales, values = of_jmoe(block)
    for other in (of_gguf, of_compressed_tensors):
        other_scales, other_values = other(block)
        np.testing.assert_array_equal(other_scales, scales)
        np.testing.assert_array_equal(other_values, values)


def block_of(*values: float) -> np.ndarray:
    """These and zeros."""
    return np.float32([[*values, *[0.0] * (BLOCK - len(values))]])


def test_zeros_have_scale_byte_zero() -> None:
    for encode in (of_jmoe, of_gguf, of_compressed_tensors):
        scales, values = encode(block_of(0.0))
        assert scales.tolist() == [0]
        assert not values.any()


def test_ties_go_to_the_even_code_but_towards_zero_in_gguf() -> None:
    block = block_of(4.0, *MIDPOINTS, *-MIDPOINTS)
    even, down = [0, 1, 1, 2, 2, 4, 4], [0, 0.5, 1, 1.5, 2, 3, 4]
    for encode, want in ((of_jmoe, even), (of_compressed_tensors, even), (of_gguf, down)):
        scales, values = encode(block)
        assert scales.tolist() == [127]
        assert values[0, 1:8].tolist() == want
        assert np.abs(values[0, 8:15]).tolist() == want


@pytest.mark.parametrize(
    ("largest", "bytes_of"),
    [
        (6.9, {"jmoe": 127, "gguf": 127, "compressed-tensors": 127}),
        (7.0, {"jmoe": 127, "gguf": 127, "compressed-tensors": 128}),
        (7.5, {"jmoe": 127, "gguf": 127, "compressed-tensors": 128}),
        # gguf takes the logarithm in float32, which is 3 here.
        (float(np.nextafter(np.float32(8), np.float32(0))), {"jmoe": 127, "gguf": 128, "compressed-tensors": 128}),
        (8.0, {"jmoe": 128, "gguf": 128, "compressed-tensors": 128}),
    ],
)
def test_a_large_value_saturates_or_has_a_coarser_scale(largest: float, bytes_of: dict[str, int]) -> None:
    encoders = {"jmoe": of_jmoe, "gguf": of_gguf, "compressed-tensors": of_compressed_tensors}
    for name, encode in encoders.items():
        scales, values = encode(block_of(largest, 0.5))
        assert scales.tolist() == [bytes_of[name]]
        # 6 scales of 1, or 4 scales of 2; and what that does to a small value of the same block.
        assert values[0, :2].tolist() == ([6.0, 0.5] if bytes_of[name] == 127 else [8.0, 0.0])
