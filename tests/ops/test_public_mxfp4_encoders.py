"""jmoe.quantize beside two public MXFP4 encoders: gguf's, and compressed-tensors', which vLLM's tools write with.

docs/mxfp4.md says where they agree and where they do not; both are held here.
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
SCHEME = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=BLOCK, symmetric=True, dynamic=False, scale_dtype=torch.uint8
    ),
)
