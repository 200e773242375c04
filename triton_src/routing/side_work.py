"""What programs beside those that route do, in the launch that routing has anyway."""

import triton
import triton.language as tl

from jmoe.triton_src.routing.l2_prefetch import fetch_lines
from jmoe.triton_src.routing.mma_k_order import interleave_blocks


@triton.jit
def interleave_or_fetch(
    x_ptr,  # (T, K) bf16, or None
    x_interleaved_ptr,  # (T, K padded to 64) bf16, or None
    words_ptr,  # as in fetch_lines, or None
    scales_ptr,  # as in fetch_lines, or None
    layer_ptr,  # as in fetch_lines
    tokens,
    program,
    interleave_programs,
    K: tl.constexpr,
    INTERLEAVE_BLOCKS: tl.constexpr,
    MATRICES: tl.constexpr,
    BLOCKS: tl.constexpr,
    FETCHED_MATRICES: tl.constexpr,
    FETCHED_BLOCKS: tl.constexpr,
    LINES: tl.constexpr,
):
    """The first `interleave_programs` programs interleave x, the others fetch weights."""
    if program < interleave_programs:
        if x_ptr is not None:
            interleave_blocks(x_ptr, x_interleaved_ptr, tokens, program, K, INTERLEAVE_BLOCKS)
    else:
        if words_ptr is not None:
            fetch_lines(
                words_ptr, scales_ptr, layer_ptr, program - interleave_programs, MATRICES, BLOCKS, FETCHED_MATRICES,
                FETCHED_BLOCKS, LINES,
            )  # fmt: skip
