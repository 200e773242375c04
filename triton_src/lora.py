"""LoRA on grouped rows: shrink (x A^T) as a launch of its own, expand (B) as extra K inside the main product."""

import triton
import triton.language as tl

from jmoe.triton_src.plan import Buffer, Plan, cdiv, next_power_of_2
from jmoe.triton_src.tiles import Tile


@triton.jit
def shrink_kernel(
    x_ptr,  # gate_up: (T, K) bf16; down: (P, K) bf16 by position
    a_ptr,  # (A, E, R, K) bf16 or float32
    scale_ptr,  # (A,) float32
    adapter_ids_ptr,  # (T,) int32, -1 for none; None: adapter 0 for all
    order_ptr,  # (P,) int32, position -> pair
    tiles_ptr,  # (slots, 3) int32: expert or -1, first position, end position
    shrunk_ptr,  # (P, RANK_PADDED) bf16 by position
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """shrunk[p] = scale[a] * x[p] A[a, e]^T for the pair's adapter a and expert e, zero without adapter and past R.

    Grid: (RANK_PADDED / BLOCK_R, slots); one program = one expert's tile of positions.
    """
    expert = tl.load(tiles_ptr + tl.program_id(1) * 3)
    if expert < 0:
        return
    first = tl.load(tiles_ptr + tl.program_id(1) * 3 + 1)
    end = tl.load(tiles_ptr + tl.program_id(1) * 3 + 2)
    rows = first + tl.arange(0, BLOCK_M)
    row_ok = rows < end
    tokens = tl.load(order_ptr + rows, mask=row_ok, other=0) // TOP_K
    # rows * K passes 2^31 at 131,072 tokens.
    x_rows = x_ptr + (tokens if GATHER else rows).to(tl.int64) * K
    ranks = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank_ok = ranks < RANK
    k_in_tile = tl.arange(0, BLOCK_K)
    shrunk = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for adapter in range(ADAPTERS):
        mine = (
            row_ok if adapter_ids_ptr is None else tl.load(adapter_ids_ptr + tokens, mask=row_ok, other=-1) == adapter
        )
        if tl.max(mine.to(tl.int32), axis=0) > 0:
            a_base = a_ptr + (adapter * EXPERTS + expert).to(tl.int64) * (RANK * K)
            acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for k in range(0, K, BLOCK_K):
                k_ok = k + k_in_tile < K
                x = tl.load(x_rows[:, None] + (k + k_in_tile)[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
                a = tl.load(
                    a_base + ranks[:, None] * K + (k + k_in_tile)[None, :],
                    mask=rank_ok[:, None] & k_ok[None, :],
                    other=0.0,
                )
                acc = tl.dot(x, a.to(x.dtype).T, acc)
            # Rows of other adapters and padded ranks are set to zero, not multiplied by it: x may hold infinities.
            shrunk = tl.where(mine[:, None] & rank_ok[None, :], acc * tl.load(scale_ptr + adapter), shrunk)
    tl.store(
        shrunk_ptr + rows.to(tl.int64)[:, None] * RANK_PADDED + ranks[None, :],
        shrunk.to(shrunk_ptr.dtype.element_ty),
        mask=row_ok[:, None],
    )


@triton.jit
def expand_tile(
    acc,  # (BLOCK_M, BLOCK_N) float32
    shrunk_ptr,  # (P, RANK_PADDED) bf16 by position
    b_ptr,  # (A, E, N, R) bf16 or float32
    adapter_ids_ptr,  # (T,) int32, or None
    tokens,  # (BLOCK_M,)
    rows,  # (BLOCK_M,) positions
    row_ok,  # (BLOCK_M,)
    columns,  # (BLOCK_N,)
    column_ok,  # (BLOCK_N,)
    expert,
    N: tl.constexpr,
    EXPERTS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + shrunk B[a, e]^T for each row's adapter a. Rows of others are selected away, not multiplied by zero."""
    for adapter in range(ADAPTERS):
        mine = (
            row_ok if adapter_ids_ptr is None else tl.load(adapter_ids_ptr + tokens, mask=row_ok, other=-1) == adapter
        )
        if tl.max(mine.to(tl.int32), axis=0) > 0:
            b_base = b_ptr + (adapter * EXPERTS + expert).to(tl.int64) * (N * RANK)
            expanded = acc
            for r in tl.range(0, RANK_PADDED, BLOCK_R, num_stages=1):
                ranks = r + tl.arange(0, BLOCK_R)
                shrunk = tl.load(
                    shrunk_ptr + rows.to(tl.int64)[:, None] * RANK_PADDED + ranks[None, :],
                    mask=row_ok[:, None],
                    other=0.0,
                )
                b = tl.load(
                    b_base + columns[:, None] * RANK + ranks[None, :],
                    mask=column_ok[:, None] & (ranks < RANK)[None, :],
                    other=0.0,
                )
                expanded = tl.dot(shrunk, b.to(shrunk.dtype).T, expanded)
            acc = tl.where(mine[:, None], expanded, acc)
    return acc


def rank_blocks(rank: int) -> tuple[int, int]:
    """(BLOCK_R, RANK_PADDED) of a rank: a tensor-core product needs 16, and longer ranks go in steps of up to 64."""
    block = min(64, max(16, next_power_of_2(rank)))
    return block, cdiv(rank, block) * block


def plan_shrink(
    projection: str,
    *,
    x: str,
    gather: bool,
    slots: int,
    pairs: int,
    top_k: int,
    experts: int,
    adapters: int,
    rank: int,
    k: int,
    adapter_ids: bool,
    tile: Tile,
) -> Plan:
    """shrunk[P, RANK_PADDED] of `projection` ("gate_up" or "down") from buffer x."""
    block_r, rank_padded = rank_blocks(rank)
    return Plan(
        kernel=shrink_kernel,
        grid=(rank_padded // block_r, slots),
        operands={
            "x_ptr": x,
            "a_ptr": f"{projection}_a",
            "scale_ptr": f"{projection}_scale",
            "adapter_ids_ptr": "adapter_ids" if adapter_ids else None,
            "order_ptr": "order",
            "tiles_ptr": "tiles",
        },
        outputs={"shrunk_ptr": Buffer(f"{projection}_shrunk", (pairs, rank_padded), "bfloat16")},
        constexprs={
            "K": k,
            "EXPERTS": experts,
            "TOP_K": top_k,
            "ADAPTERS": adapters,
            "RANK": rank,
            "RANK_PADDED": rank_padded,
            "GATHER": gather,
            "BLOCK_M": tile.block_m,
            "BLOCK_K": tile.shrink_block_k,
            "BLOCK_R": block_r,
        },
        num_warps=4,
        num_stages=3,
        flops=2 * pairs * k * rank,
        bytes_accessed=2 * (pairs * (k + rank) + min(pairs, experts) * rank * k),
    )
