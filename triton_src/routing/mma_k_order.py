"""The order of tokens' values in which a thread of the packed product reads them."""

import triton
import triton.language as tl

from jmoe.triton_src.plan import cdiv


@triton.jit
def interleave_blocks(
    x_ptr,  # (T, K) bf16
    out_ptr,  # (T, KP) bf16, KP being K in whole blocks of 64
    tokens,
    program,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """out[t] = x[t] in interleaved order, zero past K: the program's BLOCKS blocks of 64 values.

    Bits of an index in a block, high to low: abcdde in x, addbce in out.
    """
    ROW_BLOCKS: tl.constexpr = (K + 63) // 64
    block = program.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    token = block // ROW_BLOCKS
    lane = tl.arange(0, 64)
    k = (block % ROW_BLOCKS)[:, None] * 64 + lane[None, :]
    x = tl.load(x_ptr + token[:, None] * K + k, mask=(token < tokens)[:, None] & (k < K), other=0.0)
    x = tl.permute(tl.reshape(x, (BLOCKS, 2, 2, 2, 4, 2)), (0, 1, 4, 2, 3, 5))
    tl.store(out_ptr + block[:, None] * 64 + lane[None, :], tl.reshape(x, (BLOCKS, 64)), mask=(token < tokens)[:, None])


def interleaved_width(hidden: int) -> int:
    """Values of an interleaved token: whole blocks of 64."""
    return cdiv(hidden, 64) * 64
