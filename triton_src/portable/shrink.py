"""LoRA on grouped rows: shrink (x A^T) as a launch of its own, expand (B) as extra K inside the main product."""

import triton
import triton.language as tl

from jmoe.triton_src.plan import Buffer, Plan
from jmoe.triton_src.problem import MoeProblem, Projection, RowTile
from jmoe.triton_src.row_adapters import known_adapters, next_adapter
from jmoe.triton_src.stacked import in_stack
from jmoe.triton_src.tiles import ShrinkTile


@triton.jit(do_not_specialize=["pairs"])
def shrink_kernel(
    x_ptr,  # (T, K) bf16 by token, or (P, K) by position
    a_ptr,  # (A, E, R, K) bf16 or float32; (A, E, K, R) if TRANSPOSED
    scale_ptr,  # (A,) float32
    adapter_ids_ptr,  # (T,) int32, -1 for none; None: adapter 0 for all
    order_ptr,  # (P,) int32, position -> pair
    tiles_ptr,  # (max_tiles, 3) int32: expert or -1, first position, end position
    lora_layer_ptr,  # (1,) int32: which layer's LoRA, of several; None: there is one layer's
    shrunk_ptr,  # (SPLITS, P, RANK_PADDED) float32 by position
    pairs,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    TILE_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Parts, over K, of shrunk[p] = scale[a] * x[p] A[a, e]^T for the pair's adapter a and expert e.

    Zero without adapter and past R. One program = TILE_M positions of one expert, which is at most BLOCK_M, with every
    LANES-th of the adapters that these have, and one part of K. Grid: (RANK_PADDED / BLOCK_R, max_tiles, SPLITS *
    LANES).
    """
    expert = tl.load(tiles_ptr + tl.program_id(1) * 3)
    if expert < 0:
        return
    split = tl.program_id(2) % SPLITS
    lane = tl.program_id(2) // SPLITS
    first = tl.load(tiles_ptr + tl.program_id(1) * 3 + 1)
    end = tl.load(tiles_ptr + tl.program_id(1) * 3 + 2)
    rows = first + tl.arange(0, BLOCK_M)
    row_ok = rows < tl.minimum(end, first + TILE_M)
    tokens = tl.load(order_ptr + rows, mask=row_ok, other=0) // TOP_K
    if adapter_ids_ptr is None:
        shrink_rows(
            x_ptr, a_ptr, scale_ptr, lora_layer_ptr, shrunk_ptr, tokens, rows, row_ok, row_ok, lane, expert, split,
            pairs, K, EXPERTS, ADAPTERS, RANK, RANK_PADDED, GATHER, TRANSPOSED, SPLITS, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    else:
        used = known_adapters(tl.load(adapter_ids_ptr + tokens, mask=row_ok, other=-1), ADAPTERS)
        if lane == 0:
            ranks = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
            part = shrunk_ptr + split.to(tl.int64) * pairs * RANK_PADDED
            at = part + rows.to(tl.int64)[:, None] * RANK_PADDED + ranks[None, :]
            tl.store(at, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), mask=(row_ok & (used < 0))[:, None])
        adapter = next_adapter(used, -1, ADAPTERS)
        nth = 0
        while adapter < ADAPTERS:
            if nth % LANES == lane:
                shrink_rows(
                    x_ptr, a_ptr, scale_ptr, lora_layer_ptr, shrunk_ptr, tokens, rows, row_ok, used == adapter,
                    adapter, expert, split, pairs, K, EXPERTS, ADAPTERS, RANK, RANK_PADDED, GATHER, TRANSPOSED,
                    SPLITS, BLOCK_M, BLOCK_K, BLOCK_R,
                )  # fmt: skip
            adapter = next_adapter(used, adapter, ADAPTERS)
            nth += 1


@triton.jit
def shrink_rows(
    x_ptr,
    a_ptr,
    scale_ptr,
    lora_layer_ptr,
    shrunk_ptr,
    tokens,  # (BLOCK_M,)
    rows,  # (BLOCK_M,) positions
    row_ok,  # (BLOCK_M,)
    mine,  # (BLOCK_M,) rows of the adapter
    adapter,
    expert,
    split,
    pairs,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One adapter's part of K and BLOCK_R ranks of the rows that are its own."""
    # rows * K passes 2^31 at 131,072 tokens.
    x_rows = x_ptr + (tokens if GATHER else rows).to(tl.int64) * K
    ranks = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank_ok = ranks < RANK
    RANK_STRIDE: tl.constexpr = 1 if TRANSPOSED else K
    K_STRIDE: tl.constexpr = RANK if TRANSPOSED else 1
    matrix = in_stack(adapter * EXPERTS + expert, lora_layer_ptr, ADAPTERS * EXPERTS)
    a_rows = a_ptr + matrix.to(tl.int64) * (RANK * K) + ranks * RANK_STRIDE
    steps: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for step in range(0, steps):
        k = (split * steps + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows[:, None] + k[None, :], mask=row_ok[:, None] & (k < K)[None, :], other=0.0)
        a = tl.load(a_rows[:, None] + k[None, :] * K_STRIDE, mask=rank_ok[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(x, a.to(x.dtype).T, acc)
    scale = tl.load(scale_ptr + in_stack(adapter, lora_layer_ptr, ADAPTERS))
    # Padded ranks are set to zero, not multiplied by it: x may hold infinities.
    shrunk = tl.where(mine[:, None] & rank_ok[None, :], acc * scale, 0.0)
    part = shrunk_ptr + split.to(tl.int64) * pairs * RANK_PADDED
    tl.store(part + rows.to(tl.int64)[:, None] * RANK_PADDED + ranks[None, :], shrunk, mask=mine[:, None])


@triton.jit
def expand_tile(
    acc,  # (BLOCK_M, BLOCK_N) float32
    shrunk_ptr,  # (SPLITS, P, RANK_PADDED) float32 by position
    b_ptr,  # (A, E, N, R) bf16 or float32; (A, E, R, N) if TRANSPOSED
    adapter_ids_ptr,  # (T,) int32, or None
    tokens,  # (BLOCK_M,)
    rows,  # (BLOCK_M,) positions
    row_ok,  # (BLOCK_M,)
    columns,  # (BLOCK_N,)
    column_ok,  # (BLOCK_N,)
    expert,
    pairs,
    N: tl.constexpr,
    EXPERTS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """acc + shrunk B[a, e]^T for each row's adapter a. Rows of others are selected away, not multiplied by zero."""
    if adapter_ids_ptr is None:
        for adapter in range(ADAPTERS):
            if tl.max(row_ok.to(tl.int32), axis=0) > 0:
                expanded = expand_rows(
                    acc, shrunk_ptr, b_ptr, rows, row_ok, columns, column_ok, adapter * EXPERTS + expert, pairs,
                    N, RANK, RANK_PADDED, BLOCK_R, SPLITS, TRANSPOSED, DTYPE,
                )  # fmt: skip
                acc = tl.where(row_ok[:, None], expanded, acc)
    else:
        used = known_adapters(tl.load(adapter_ids_ptr + tokens, mask=row_ok, other=-1), ADAPTERS)
        adapter = next_adapter(used, -1, ADAPTERS)
        while adapter < ADAPTERS:
            expanded = expand_rows(
                acc, shrunk_ptr, b_ptr, rows, row_ok, columns, column_ok, adapter * EXPERTS + expert, pairs,
                N, RANK, RANK_PADDED, BLOCK_R, SPLITS, TRANSPOSED, DTYPE,
            )  # fmt: skip
            acc = tl.where((used == adapter)[:, None], expanded, acc)
            adapter = next_adapter(used, adapter, ADAPTERS)
    return acc


@triton.jit
def expand_rows(
    acc,  # (BLOCK_M, BLOCK_N) float32
    shrunk_ptr,
    b_ptr,
    rows,
    row_ok,
    columns,
    column_ok,
    matrix,
    pairs,
    N: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """acc + shrunk B^T by the matrix of one adapter and expert, whoever's the rows are."""
    COLUMN_STRIDE: tl.constexpr = 1 if TRANSPOSED else RANK
    RANK_STRIDE: tl.constexpr = N if TRANSPOSED else 1
    b_base = b_ptr + matrix.to(tl.int64) * (N * RANK)
    for r in tl.range(0, RANK_PADDED, BLOCK_R, num_stages=1):
        ranks = r + tl.arange(0, BLOCK_R)
        at = shrunk_ptr + rows.to(tl.int64)[:, None] * RANK_PADDED + ranks[None, :]
        total = tl.load(at, mask=row_ok[:, None], other=0.0)
        for split in tl.static_range(1, SPLITS):
            part = at + tl.cast(split * RANK_PADDED, tl.int64) * pairs
            total += tl.load(part, mask=row_ok[:, None], other=0.0)
        shrunk = total.to(DTYPE)
        b = tl.load(
            b_base + columns[:, None] * COLUMN_STRIDE + ranks[None, :] * RANK_STRIDE,
            mask=column_ok[:, None] & (ranks < RANK)[None, :],
            other=0.0,
        )
        acc = tl.dot(shrunk, b.to(shrunk.dtype).T, acc)
    return acc


@triton.constexpr_function
def rank_blocks(rank: int, longest: int = 64) -> tuple[int, int]:
    """(BLOCK_R, RANK_PADDED) of a rank: a tensor-core product needs 16, and longer ranks go in steps."""
    # Spelt out, as kernels call this and may not call plain functions.
    block = min(longest, max(16, 1 << (rank - 1).bit_length()))
    return block, -(-rank // block) * block


def lora_operands(product: Projection, problem: MoeProblem) -> dict[str, str | None]:
    """The operands of a product's launch that are about LoRA."""
    lora = product.rank is not None
    return {
        "shrunk_ptr": f"{product.name}_shrunk" if lora else None,
        "lora_b_ptr": f"{product.name}_b" if lora else None,
        "adapter_ids_ptr": "adapter_ids" if lora and problem.adapter_ids else None,
    }


def lora_constexprs(product: Projection, problem: MoeProblem, routed: RowTile) -> dict[str, int]:
    """The constants of a product's launch that are about LoRA; one set for all sizes without it."""
    if product.rank is None:
        return {"ADAPTERS": 0, "RANK": 0, "RANK_PADDED": 16, "BLOCK_R": 16, "SPLITS": 1}
    block_r, rank_padded = rank_blocks(product.rank)
    return {
        "ADAPTERS": problem.adapters,
        "RANK": product.rank,
        "RANK_PADDED": rank_padded,
        "BLOCK_R": block_r,
        "SPLITS": routed.shrink_splits,
    }


MOST_LANES = 4
"""Programs that share the adapters of a tile: with more most would find none left, since a tile's rows have few."""

BY_TOKEN = ("x", "dy")
"""Buffers that have a row for each token; others have one for each position."""


def plan_shrink(
    source: str, matrix: str, out: str, product: Projection, problem: MoeProblem, tile: ShrinkTile, routed: RowTile
) -> Plan:
    """Parts of `out` [splits, P, RANK_PADDED] from rows of `source` and from the product's matrix "a" or "b".

    source: x or dy, which have a row for each token, or a buffer that has one for each position.
    routed: the tile of the routing.
    """
    p, rank = problem, product.rank
    assert rank is not None
    transposed = matrix == "b"  # [A, E, n, rank], where A is [A, E, rank, k]
    k = product.n if transposed else product.k
    block_r, rank_padded = rank_blocks(rank)
    splits = routed.shrink_splits
    lanes = min(p.adapters, MOST_LANES) if p.adapter_ids else 1
    return Plan(
        kernel=shrink_kernel,
        grid=(rank_padded // block_r, p.max_tiles(routed), splits * lanes),
        operands={
            "x_ptr": source,
            "a_ptr": f"{product.name}_{matrix}",
            "scale_ptr": f"{product.name}_scale",
            "adapter_ids_ptr": "adapter_ids" if p.adapter_ids else None,
            "order_ptr": "order",
            "tiles_ptr": "tiles",
            **p.stacked.lora_operand,
        },
        outputs={"shrunk_ptr": Buffer(out, (splits, p.pairs, rank_padded), "float32")},
        scalars={"pairs": p.pairs},
        constexprs={
            "K": k,
            "EXPERTS": p.experts,
            "TOP_K": p.top_k,
            "ADAPTERS": p.adapters,
            "RANK": rank,
            "RANK_PADDED": rank_padded,
            "GATHER": source in BY_TOKEN,
            "TRANSPOSED": transposed,
            "SPLITS": splits,
            "LANES": lanes,
            "TILE_M": routed.block_m,
            "BLOCK_M": max(16, routed.block_m),
            "BLOCK_K": tile.block_k,
            "BLOCK_R": block_r,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        flops=2 * p.pairs * k * rank,
        bytes_accessed=2 * (p.pairs * k + p.active_experts * rank * k) + 4 * splits * p.pairs * rank,
    )
