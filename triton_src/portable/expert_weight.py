"""One tile of x @ W[expert]^T, for MXFP4 and for dense weights."""

import triton
import triton.language as tl


@triton.jit
def mxfp4_product(
    x_rows,  # (BLOCK_M,) pointers to rows of K bf16
    row_ok,  # (BLOCK_M,)
    blocks_ptr,  # the expert's (N, K / 2) uint8, low nibble first
    scales_ptr,  # the expert's (N, K / 32) uint8
    columns,  # (BLOCK_N,)
    column_ok,  # (BLOCK_N,)
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 (BLOCK_M, BLOCK_N). Nothing past K or N is read: such bytes could be the scale 255, which is NaN."""
    tl.static_assert(BLOCK_K % 32 == 0, "BLOCK_K must cover whole MXFP4 blocks")
    tl.static_assert(K % 32 == 0, "K must be a multiple of the MXFP4 block")
    bytes_ = tl.arange(0, BLOCK_K // 2)
    groups = tl.arange(0, BLOCK_K // 32)
    k_in_tile = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    largest_scale = tl.zeros((BLOCK_N, BLOCK_K // 32), tl.uint8)
    for k in range(0, K, BLOCK_K):
        blocks = tl.load(
            blocks_ptr + columns[:, None] * (K // 2) + (k // 2 + bytes_)[None, :],
            mask=column_ok[:, None] & (k // 2 + bytes_ < K // 2)[None, :],
            other=0,
        )
        scales = tl.load(
            scales_ptr + columns[:, None] * (K // 32) + (k // 32 + groups)[None, :],
            mask=column_ok[:, None] & (k // 32 + groups < K // 32)[None, :],
            other=0,
        )
        x = tl.load(
            x_rows[:, None] + (k + k_in_tile)[None, :],
            mask=row_ok[:, None] & (k + k_in_tile < K)[None, :],
            other=0.0,
        )
        # fast_math leaves out the test of each weight for scale 255, a ninth of the kernel's time on an H100; the test
        # is made on scales instead, of which there are 32 times fewer.
        acc = tl.dot_scaled(x, None, "bf16", blocks.T, scales, "e2m1", acc, fast_math=True)
        largest_scale = tl.maximum(largest_scale, scales)
    has_nan = tl.max(largest_scale.to(tl.int32), axis=1) == 255
    return tl.where(has_nan[None, :], float("nan"), acc)


@triton.jit
def dense_product(
    x_rows,  # (BLOCK_M,) pointers to rows of K bf16
    row_ok,  # (BLOCK_M,)
    weight_ptr,  # the expert's (N, K) bf16
    columns,  # (BLOCK_N,)
    column_ok,  # (BLOCK_N,)
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 (BLOCK_M, BLOCK_N)."""
    k_in_tile = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        k_ok = k + k_in_tile < K
        weight = tl.load(
            weight_ptr + columns[:, None] * K + (k + k_in_tile)[None, :],
            mask=column_ok[:, None] & k_ok[None, :],
            other=0.0,
        )
        x = tl.load(x_rows[:, None] + (k + k_in_tile)[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        acc = tl.dot(x, weight.to(x.dtype).T, acc)
    return acc
