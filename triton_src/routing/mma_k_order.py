"""The order along K in which tokens lie for mma.sync: a thread's values of a block of 64 stand side by side.

A block of 64 values is four products m16n8k16. Of the 16 along K of each a lane takes four, 2q, 2q + 1, 8 + 2q and
8 + 2q + 1, q being the lane's number modulo 4. In this order a lane reads what it needs of a block in two loads of 16
bytes, of two products each:

    slot      0  1  2  3  4  5  6  7 |  8  9 10 11 12 13 14 15 | 16 to 23 | 24 to 31 | 32 to 63
    k         0  1  8  9 16 17 24 25 |  2  3 10 11 18 19 26 27 |  4 to 29 |  6 to 31 | 32 to 63
    q         0                      |  1                      |  2       |  3       |  0 to 3
    product   0           1          |  0           1          |  0, 1    |  0, 1    |  2, 3

By the bits of an index in a block, high to low: k is abcdde and its slot addbce, ab being the product, dd q, and c and
e the place among the lane's four.
"""

import triton
import triton.language as tl

from jmoe.triton_src.plan import cdiv


@triton.jit
def mma_k_slot(k):
    """Where the value k of a token stands in this order."""
    return k - k % 32 + k % 8 // 2 * 8 + k // 16 % 2 * 4 + k // 8 % 2 * 2 + k % 2


@triton.jit
def to_mma_k_order(blocks):
    """(blocks, 64) in the natural order -> in this one."""
    bits = tl.permute(tl.reshape(blocks, (blocks.shape[0], 2, 2, 2, 4, 2)), (0, 1, 4, 2, 3, 5))
    return tl.reshape(bits, (blocks.shape[0], 64))


@triton.jit
def from_mma_k_order(blocks):
    """The inverse of to_mma_k_order."""
    bits = tl.permute(tl.reshape(blocks, (blocks.shape[0], 2, 4, 2, 2, 2)), (0, 1, 3, 4, 2, 5))
    return tl.reshape(bits, (blocks.shape[0], 64))


@triton.jit
def reorder_blocks(
    x_ptr,  # (T, K) bf16
    out_ptr,  # (T, KP) bf16, KP being K in whole blocks of 64
    tokens,
    program,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """out[t] = x[t] in this order, zero past K: the program's BLOCKS blocks of 64 values."""
    ROW_BLOCKS: tl.constexpr = (K + 63) // 64
    block = program.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    token = block // ROW_BLOCKS
    lane = tl.arange(0, 64)
    k = (block % ROW_BLOCKS)[:, None] * 64 + lane[None, :]
    x = tl.load(x_ptr + token[:, None] * K + k, mask=(token < tokens)[:, None] & (k < K), other=0.0)
    tl.store(out_ptr + block[:, None] * 64 + lane[None, :], to_mma_k_order(x), mask=(token < tokens)[:, None])


def mma_k_width(hidden: int) -> int:
    """Values of a token in this order: whole blocks of 64."""
    return cdiv(hidden, 64) * 64
