"""A dense product for few rows, bound by reading the weights, which are read in place from a stack of layers."""

import triton
import triton.language as tl

from jmoe.triton_src.decode.tiles import decode_linear_tile
from jmoe.triton_src.plan import Buffer, Plan, cdiv, next_power_of_2


@triton.jit
def plus_product(acc, w, x):
    """acc + w x in float32; a single column of x needs no tensor cores."""
    if x.shape[1] == 1:
        return acc + tl.sum(w.to(tl.float32) * tl.trans(x).to(tl.float32), axis=1)[:, None]
    return tl.dot(w, x, acc)


@triton.jit(do_not_specialize=["rows"])
def decode_linear_kernel(
    x_ptr,  # (T, K) bf16
    weight_ptr,  # (L, N, K) bf16
    bias_ptr,  # (L, N) bf16
    layer_ptr,  # (1,) int32
    shrunk_ptr,  # (T, R) bf16: scale * x A^T, or None without LoRA
    lora_b_ptr,  # (L, P, R) bf16, of which the first N rows count, or None
    out_ptr,  # (T, N) bf16
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = x W[layer]^T + bias[layer] + shrunk B[layer]^T, rounded once. Grid: (cdiv(N, BLOCK_N),)."""
    layer = tl.load(layer_ptr)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < N
    row = tl.arange(0, BLOCK_M)
    row_ok = row < rows
    k = tl.arange(0, BLOCK_K)
    # Columns past N repeat the last, so that the loop's loads need no second mask.
    weights = weight_ptr + (layer * N + tl.minimum(column, N - 1)).to(tl.int64)[:, None] * K + k[None, :]
    x = x_ptr + row[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        k_ok = start + k < K
        w = tl.load(weights + start, mask=k_ok[None, :], other=0.0, eviction_policy="evict_first")
        tokens = tl.load(x + start, mask=k_ok[:, None] & row_ok[None, :], other=0.0)
        acc = plus_product(acc, w, tokens)
    if lora_b_ptr is not None:
        for start in tl.static_range(0, RANK, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            rank_ok = ranks < RANK
            b = tl.load(
                lora_b_ptr + (layer * P + column).to(tl.int64)[:, None] * RANK + ranks[None, :],
                mask=column_ok[:, None] & rank_ok[None, :],
                other=0.0,
            )
            shrunk = tl.load(
                shrunk_ptr + row[None, :] * RANK + ranks[:, None], mask=rank_ok[:, None] & row_ok[None, :], other=0.0
            )
            acc = plus_product(acc, b, shrunk)
    acc += tl.load(bias_ptr + layer * N + column, mask=column_ok, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out_ptr + row[None, :] * N + column[:, None],
        acc.to(out_ptr.dtype.element_ty),
        mask=column_ok[:, None] & row_ok[None, :],
    )


def plan_decode_linear(*, rows: int, n: int, k: int, rank: int | None = None, lora_rows: int = 0) -> list[Plan]:
    """linear [T, N] from x, weight, bias and layer and, with a rank, shrunk and lora_b.

    lora_rows: of lora_b in each layer, of which the first n count.
    """
    lora = rank is not None
    tile = decode_linear_tile(rows)
    return [
        Plan(
            kernel=decode_linear_kernel,
            grid=(cdiv(n, tile.columns),),
            operands={
                "x_ptr": "x",
                "weight_ptr": "weight",
                "bias_ptr": "bias",
                "layer_ptr": "layer",
                "shrunk_ptr": "shrunk" if lora else None,
                "lora_b_ptr": "lora_b" if lora else None,
            },
            scalars={"rows": rows},
            outputs={"out_ptr": Buffer("linear", (rows, n), "bfloat16")},
            constexprs={
                "N": n,
                "K": k,
                "P": lora_rows,
                "RANK": rank or 0,
                "BLOCK_M": 1 if rows == 1 else max(16, next_power_of_2(rows)),
                "BLOCK_N": tile.columns,
                "BLOCK_K": tile.depth,
                "BLOCK_R": 16 if rank is None else min(64, max(16, next_power_of_2(rank))),
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            flops=2 * rows * n * (k + (rank or 0)),
            bytes_accessed=2 * (n * k + rows * (n + k)),
        )
    ]
