"""A dense product for few rows, bound by reading the weights, which are read in place from a stack of layers."""

import dataclasses

import triton
import triton.language as tl

from jmoe.triton_src.plan import Buffer, Plan, cdiv, next_power_of_2
from jmoe.triton_src.row_adapters import known_adapters, next_adapter
from jmoe.triton_src.tiles import DecodeLinearTile

ADAPTERS_AT_ONCE = 4
"""Of which B is loaded together: a wait for memory for each would take longer than the product."""


@triton.jit
def plus_product(acc, w, x):
    """acc + w x in float32; a single column of x needs no tensor cores."""
    if x.shape[1] == 1:
        return acc + tl.sum(w.to(tl.float32) * tl.trans(x).to(tl.float32), axis=1)[:, None]
    return tl.dot(w, x, acc)


@triton.jit
def load_lora_b(
    lora_b_ptr,
    layer,
    adapter,
    column,
    column_ok,
    ranks,
    N: tl.constexpr,
    P: tl.constexpr,
    RANK: tl.constexpr,
):
    """(columns, ranks) of an adapter's B; nothing is read for one that there is not."""
    rows = (layer * P + adapter * N + column).to(tl.int64)[:, None]
    ok = (column_ok & (adapter < P // N))[:, None] & (ranks < RANK)[None, :]
    return tl.load(lora_b_ptr + rows * RANK + ranks[None, :], mask=ok, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def decode_linear_kernel(
    x_ptr,  # (T, K) bf16
    weight_ptr,  # (L, N, K) bf16
    bias_ptr,  # (L, N) bf16
    layer_ptr,  # (1,) int32
    shrunk_ptr,  # (T, R) bf16: scale * x A^T, or None without LoRA
    lora_b_ptr,  # (L, P, R) bf16: N rows of each adapter, or None
    adapter_ids_ptr,  # (T,) int32, -1 for none; None: adapter 0 for all
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
    AT_ONCE: tl.constexpr,
):
    """out = x W[layer]^T + bias[layer] + shrunk B[layer]^T, by each row's own adapter, rounded once.

    B of AT_ONCE adapters is on its way at a time, where rows have adapters of their own. Rows of others are selected
    away, not multiplied by zero: an adapter may hold NaN. Grid: (cdiv(N, BLOCK_N),).
    """
    layer = tl.load(layer_ptr)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < N
    row = tl.arange(0, BLOCK_M)
    row_ok = row < rows
    k = tl.arange(0, BLOCK_K)
    # Columns past N repeat the last, so that the loop's loads need no second mask.
    weights = weight_ptr + (layer * N + tl.minimum(column, N - 1)).to(tl.int64)[:, None] * K + k[None, :]
    x = x_ptr + row[None, :] * K + k[:, None]
    if adapter_ids_ptr is not None:
        used = known_adapters(tl.load(adapter_ids_ptr + row, mask=row_ok, other=-1), P // N)
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
            if adapter_ids_ptr is None:
                b = tl.load(
                    lora_b_ptr + (layer * P + column).to(tl.int64)[:, None] * RANK + ranks[None, :],
                    mask=column_ok[:, None] & rank_ok[None, :],
                    other=0.0,
                )
            shrunk = tl.load(
                shrunk_ptr + row[None, :] * RANK + ranks[:, None], mask=rank_ok[:, None] & row_ok[None, :], other=0.0
            )
            if adapter_ids_ptr is None:
                acc = plus_product(acc, b, shrunk)
            else:
                adapter = next_adapter(used, -1, P // N)
                while adapter < P // N:
                    adapters = ()
                    loaded = ()
                    for _ in tl.static_range(AT_ONCE):
                        b = load_lora_b(lora_b_ptr, layer, adapter, column, column_ok, ranks, N, P, RANK)
                        adapters = adapters + (adapter,)
                        loaded = loaded + (b,)
                        adapter = next_adapter(used, adapter, P // N)
                    for i in tl.static_range(AT_ONCE):
                        mine = (used == adapters[i])[None, :]
                        acc = tl.where(mine, plus_product(acc, loaded[i], shrunk), acc)
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
    lora_rows: int = 0  # of lora_b in each layer, n of each adapter
    adapter_ids: bool = False  # each row has an adapter of its own, where the first is all rows' otherwise


def plan_decode_linear(problem: DecodeLinearProblem, tile: DecodeLinearTile) -> list[Plan]:
    """linear [T, N] from x, weight, bias and layer and, with a rank, shrunk, lora_b and, if asked for, adapter_ids."""
    p = problem
    rank = p.rank or 0
    block_m = 1 if p.rows == 1 else max(16, next_power_of_2(p.rows))
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
                "adapter_ids_ptr": "adapter_ids" if rank and p.adapter_ids else None,
            },
            scalars={"rows": p.rows},
            outputs={"out_ptr": Buffer("linear", (p.rows, p.n), "bfloat16")},
            constexprs={
                "N": p.n,
                "K": p.k,
                "P": p.lora_rows,
                "RANK": rank,
                "BLOCK_M": block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "BLOCK_R": min(64, max(16, next_power_of_2(rank))) if rank else 16,
                "AT_ONCE": min(block_m, p.lora_rows // p.n, ADAPTERS_AT_ONCE) if p.adapter_ids else 1,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            flops=2 * p.rows * p.n * (p.k + rank),
            bytes_accessed=2 * (p.n * p.k + p.rows * (p.n + p.k)),
        )
    ]
