"""A dense product for few rows, bound by reading the weights, which are read in place from a stack of layers."""

import dataclasses

import triton
import triton.language as tl

from jmoe.triton_src.plan import Buffer, Plan, cdiv, next_power_of_2
from jmoe.triton_src.tiles import DecodeLinearTile


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


@dataclasses.dataclass(frozen=True)
class DecodeLinearProblem:
    """A product of few rows, [rows, k] by [n, k]."""

    rows: int
    n: int
    k: int
    rank: int | None = None  # of LoRA, if there is any
    lora_rows: int = 0  # of lora_b in each layer, of which the first n count


def plan_decode_linear(problem: DecodeLinearProblem, tile: DecodeLinearTile) -> list[Plan]:
    """linear [T, N] from x, weight, bias and layer and, with a rank, shrunk and lora_b."""
    p = problem
    rank = p.rank or 0
    return [
        Plan(
            kernel=decode_linear_kernel,
            grid=(cdiv(p.n, tile.block_n),),
            operands={
                "x_ptr": "x",
                "weight_ptr": "weight",
                "bias_ptr": "bias",
                "layer_ptr": "layer",
                "shrunk_ptr": "shrunk" if rank else None,
                "lora_b_ptr": "lora_b" if rank else None,
            },
            scalars={"rows": p.rows},
            outputs={"out_ptr": Buffer("linear", (p.rows, p.n), "bfloat16")},
            constexprs={
                "N": p.n,
                "K": p.k,
                "P": p.lora_rows,
                "RANK": rank,
                "BLOCK_M": 1 if p.rows == 1 else max(16, next_power_of_2(p.rows)),
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "BLOCK_R": min(64, max(16, next_power_of_2(rank))) if rank else 16,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            flops=2 * p.rows * p.n * (p.k + rank),
            bytes_accessed=2 * (p.n * p.k + p.rows * (p.n + p.k)),
        )
    ]
