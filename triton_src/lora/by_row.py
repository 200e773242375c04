"""LoRA of many rows, each by its own adapter, on top of a dense product: no adapter is computed that a tile lacks.

Rows of one sequence follow each other, so that a tile of them mostly has one or two adapters. The factors are read in
place from stacks of layers.
"""

import dataclasses

import triton
import triton.language as tl

from jmoe.triton_src.plan import Buffer, Plan, cdiv, next_power_of_2
from jmoe.triton_src.row_adapters import known_adapters, next_adapter
from jmoe.triton_src.tiles import LoraByRowTile


@triton.jit(do_not_specialize=["rows"])
def shrink_by_row_kernel(
    x_ptr,  # (T, K) bf16
    a_ptr,  # (L, A, R, K) bf16
    scale_ptr,  # (L, A, R) float32
    adapter_ids_ptr,  # (T,) int32, -1 for none
    layer_ptr,  # (1,) int32
    shrunk_ptr,  # (SPLITS, T, R) float32
    rows,
    K: tl.constexpr,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Parts, over K, of shrunk[t] = scale[a] * x[t] A[a]^T for each row's adapter a; rows without one stay unwritten.

    Grid: (cdiv(T, BLOCK_M), cdiv(R, BLOCK_R), SPLITS * LANES). A program has every LANES-th of its rows' adapters.
    """
    layer = tl.load(layer_ptr)
    split = tl.program_id(2) % SPLITS
    lane = tl.program_id(2) // SPLITS
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank_ok = ranks < RANK
    used = known_adapters(tl.load(adapter_ids_ptr + row, mask=row_ok, other=-1), ADAPTERS)
    x_rows = x_ptr + row.to(tl.int64)[:, None] * K
    out = shrunk_ptr + (split.to(tl.int64) * rows + row)[:, None] * RANK + ranks[None, :]
    STEPS: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    adapter = next_adapter(used, -1, ADAPTERS)
    nth = 0
    while adapter < ADAPTERS:
        if nth % LANES == lane:
            matrix = layer * ADAPTERS + adapter
            a_rows = a_ptr + (matrix.to(tl.int64) * RANK + ranks)[:, None] * K
            acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for step in range(0, STEPS):
                k = (split * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
                k_ok = (k < K)[None, :]
                x = tl.load(x_rows + k[None, :], mask=row_ok[:, None] & k_ok, other=0.0)
                a = tl.load(a_rows + k[None, :], mask=rank_ok[:, None] & k_ok, other=0.0)
                acc = tl.dot(x, a.T, acc)
            scale = tl.load(scale_ptr + matrix * RANK + ranks, mask=rank_ok, other=0.0)
            tl.store(out, acc * scale[None, :], mask=(used == adapter)[:, None] & rank_ok[None, :])
        adapter = next_adapter(used, adapter, ADAPTERS)
        nth += 1


@triton.jit(do_not_specialize=["rows"])
def expand_by_row_kernel(
    y_ptr,  # (T, N) float32
    bias_ptr,  # (N,) bf16
    shrunk_ptr,  # (SPLITS, T, R) float32
    b_ptr,  # (L, A, N, R) bf16
    adapter_ids_ptr,  # (T,) int32, -1 for none
    layer_ptr,  # (1,) int32
    out_ptr,  # (T, N) bf16
    rows,
    N: tl.constexpr,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = y + bias + shrunk B[a]^T for each row's adapter a, rounded once.

    Rows of others are selected away, not multiplied by zero: an adapter may hold NaN. Grid: (cdiv(N, BLOCK_N),
    cdiv(T, BLOCK_M)).
    """
    layer = tl.load(layer_ptr)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < N
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    used = known_adapters(tl.load(adapter_ids_ptr + row, mask=row_ok, other=-1), ADAPTERS)
    at = row.to(tl.int64)[:, None] * N + column[None, :]
    ok = row_ok[:, None] & column_ok[None, :]
    acc = tl.load(y_ptr + at, mask=ok, other=0.0)
    acc += tl.load(bias_ptr + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    adapter = next_adapter(used, -1, ADAPTERS)
    while adapter < ADAPTERS:
        mine = (used == adapter)[:, None]
        b_rows = b_ptr + ((layer * ADAPTERS + adapter).to(tl.int64) * N + column)[:, None] * RANK
        expanded = acc
        for start in tl.static_range(0, RANK, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            rank_ok = (ranks < RANK)[None, :]
            parts = shrunk_ptr + row.to(tl.int64)[:, None] * RANK + ranks[None, :]
            total = tl.load(parts, mask=mine & rank_ok, other=0.0)
            for split in tl.static_range(1, SPLITS):
                total += tl.load(parts + tl.cast(split * RANK, tl.int64) * rows, mask=mine & rank_ok, other=0.0)
            b = tl.load(b_rows + ranks[None, :], mask=column_ok[:, None] & rank_ok, other=0.0)
            expanded = tl.dot(total.to(b.dtype), b.T, expanded)
        acc = tl.where(mine, expanded, acc)
        adapter = next_adapter(used, adapter, ADAPTERS)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=ok)


@dataclasses.dataclass(frozen=True)
class LoraByRowProblem:
    """LoRA of adapters [rank, k] and [n, rank] on a product of rows, [rows, k] by [n, k]."""

    rows: int
    n: int
    k: int
    rank: int
    adapters: int


def plan_lora_by_row(problem: LoraByRowProblem, tile: LoraByRowTile) -> list[Plan]:
    """with_lora [T, N] from x, product [T, N] in float32, bias [N], a, scale, b, adapter_ids and layer [1]."""
    p = problem
    tiles = cdiv(p.rows, tile.block_m)
    lanes = min(p.adapters, tile.most_lanes)
    # Few rows are few tiles: then programs have few ranks each.
    block_r = max(16, min(64 if tiles * lanes >= tile.programs // 8 else 16, next_power_of_2(p.rank)))
    rank_blocks = cdiv(p.rank, block_r)
    splits = max(1, min(tile.most_splits, tile.programs // (tiles * lanes * rank_blocks)))
    shrunk = Buffer("shrunk", (splits, p.rows, p.rank), "float32")
    common = {"adapter_ids_ptr": "adapter_ids", "layer_ptr": "layer"}
    sizes = {"RANK": p.rank, "ADAPTERS": p.adapters, "SPLITS": splits, "BLOCK_M": tile.block_m}
    return [
        Plan(
            kernel=shrink_by_row_kernel,
            grid=(tiles, rank_blocks, splits * lanes),
            operands={"x_ptr": "x", "a_ptr": "a", "scale_ptr": "scale", **common},
            scalars={"rows": p.rows},
            outputs={"shrunk_ptr": shrunk},
            constexprs={**sizes, "K": p.k, "LANES": lanes, "BLOCK_K": tile.block_k, "BLOCK_R": block_r},
            num_warps=tile.num_warps,
            num_stages=tile.shrink_num_stages,
            flops=2 * p.rows * p.k * p.rank,
            bytes_accessed=2 * p.k * (p.rows + p.rank) + 4 * splits * p.rows * p.rank,
        ),
        Plan(
            kernel=expand_by_row_kernel,
            grid=(cdiv(p.n, tile.block_n), tiles),
            operands={"y_ptr": "product", "bias_ptr": "bias", "shrunk_ptr": "shrunk", "b_ptr": "b", **common},
            scalars={"rows": p.rows},
            outputs={"out_ptr": Buffer("with_lora", (p.rows, p.n), "bfloat16")},
            constexprs={
                **sizes,
                "N": p.n,
                "BLOCK_N": tile.block_n,
                "BLOCK_R": min(64, max(16, next_power_of_2(p.rank))),
            },
            num_warps=tile.num_warps,
            num_stages=tile.expand_num_stages,
            flops=2 * p.rows * p.n * p.rank,
            bytes_accessed=6 * p.rows * p.n + 2 * p.n * p.rank + 4 * splits * p.rows * p.rank,
        ),
    ]
