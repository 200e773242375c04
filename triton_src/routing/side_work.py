"""What programs beside those that route do, in the launch that routing has anyway."""

import triton
import triton.language as tl

from jmoe.triton_src.routing.l2_prefetch import prefetch_lines
from jmoe.triton_src.routing.mma_k_order import reorder_blocks


@triton.jit
def do_side_work(
    x_ptr,  # (T, K) bf16, or None
    x_in_mma_order_ptr,  # (T, K padded to 64) bf16, or None
    words_ptr,  # as in prefetch_lines, or None
    scales_ptr,  # as in prefetch_lines, or None
    layer_ptr,  # as in prefetch_lines
    tokens,
    program,
    reorder_programs,
    K: tl.constexpr,
    REORDER_BLOCKS: tl.constexpr,
    MATRICES: tl.constexpr,
    BLOCKS: tl.constexpr,
    PREFETCHED_MATRICES: tl.constexpr,
    PREFETCHED_BLOCKS: tl.constexpr,
    LINES: tl.constexpr,
):
    """The first `reorder_programs` programs write x in mma K order, the others prefetch weights."""
    if program < reorder_programs:
        if x_ptr is not None:
            reorder_blocks(x_ptr, x_in_mma_order_ptr, tokens, program, K, REORDER_BLOCKS)
    else:
        if words_ptr is not None:
            prefetch_lines(
                words_ptr, scales_ptr, layer_ptr, program - reorder_programs, MATRICES, BLOCKS, PREFETCHED_MATRICES,
                PREFETCHED_BLOCKS, LINES,
            )  # fmt: skip
