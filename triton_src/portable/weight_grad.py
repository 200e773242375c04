"""Gradients that are sums over an expert's rows: of LoRA's A and B, and of biases."""

import triton
import triton.language as tl

from jmoe.triton_src.plan import Buffer, Plan, cdiv, next_power_of_2
from jmoe.triton_src.portable.shrink import BY_TOKEN, rank_blocks
from jmoe.triton_src.problem import MoeProblem, Projection, RowTile
from jmoe.triton_src.tiles import BiasGradTile, LoraGradTile


@triton.jit
def expert_rows(tiles_ptr, expert, SLOTS: tl.constexpr, SLOTS_PADDED: tl.constexpr):
    """(first, end) of an expert's positions, which are without gaps; (0, 0) if it has none."""
    slot = tl.arange(0, SLOTS_PADDED)
    mine = tl.load(tiles_ptr + slot * 3, mask=slot < SLOTS, other=-1) == expert
    first = tl.min(tl.load(tiles_ptr + slot * 3 + 1, mask=mine, other=2147483647), axis=0)
    end = tl.max(tl.load(tiles_ptr + slot * 3 + 2, mask=mine, other=0), axis=0)
    return tl.minimum(first, end), end


@triton.jit(do_not_specialize=["pairs"])
def lora_grad_kernel(
    wide_ptr,  # (T, K) bf16 by token, or (P, K) by position
    shrunk_ptr,  # (SPLITS, P, RANK_PADDED) float32 by position
    adapter_ids_ptr,  # (T,) int32, -1 for none; None: adapter 0 for all
    order_ptr,  # (P,) int32, position -> pair
    tiles_ptr,  # (slots, 3) int32: expert or -1, first position, end position
    out_ptr,  # (A, E, R, K), or (A, E, K, R) if TRANSPOSED
    pairs,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[a, e] = sum over the positions of expert e and adapter a of shrunk[p] (x) wide[p]; zero without any.

    Grid: (cdiv(K, BLOCK_K), E, A * RANK_PADDED / BLOCK_R). The sum runs in the order of positions.
    """
    expert = tl.program_id(1)
    RANK_BLOCKS: tl.constexpr = RANK_PADDED // BLOCK_R
    adapter = tl.program_id(2) // RANK_BLOCKS
    ranks = tl.program_id(2) % RANK_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    column_ok = columns < K
    first, end = expert_rows(tiles_ptr, expert, SLOTS, SLOTS_PADDED)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mine = rows < end
        tokens = tl.load(order_ptr + rows, mask=mine, other=0) // TOP_K
        if adapter_ids_ptr is not None:
            mine = mine & (tl.load(adapter_ids_ptr + tokens, mask=mine, other=-1) == adapter)
        if tl.max(mine.to(tl.int32), axis=0) > 0:
            # Rows of other adapters are not read: they may hold NaN.
            at = shrunk_ptr + rows.to(tl.int64)[None, :] * RANK_PADDED + ranks[:, None]
            total = tl.load(at, mask=mine[None, :], other=0.0)
            for split in tl.static_range(1, SPLITS):
                part = at + tl.cast(split * RANK_PADDED, tl.int64) * pairs
                total += tl.load(part, mask=mine[None, :], other=0.0)
            wide_rows = wide_ptr + (tokens if GATHER else rows).to(tl.int64) * K
            wide = tl.load(wide_rows[:, None] + columns[None, :], mask=mine[:, None] & column_ok[None, :], other=0.0)
            acc = tl.dot(total.to(wide.dtype), wide, acc)
    RANK_STRIDE: tl.constexpr = 1 if TRANSPOSED else K
    COLUMN_STRIDE: tl.constexpr = RANK if TRANSPOSED else 1
    out = out_ptr + (adapter * EXPERTS + expert).to(tl.int64) * (RANK * K)
    tl.store(
        out + ranks[:, None] * RANK_STRIDE + columns[None, :] * COLUMN_STRIDE,
        acc.to(out_ptr.dtype.element_ty),
        mask=(ranks < RANK)[:, None] & column_ok[None, :],
    )


def plan_lora_grad(
    matrix: str,
    wide: str,
    shrunk: str,
    product: Projection,
    problem: MoeProblem,
    tile: LoraGradTile,
    routed: RowTile,
    dtype: str,
) -> Plan:
    """The gradient of the product's matrix "a" or "b", like it, from rows `wide` [., K] and `shrunk` [., P, rank].

    wide: x or dy, which have a row for each token, or a buffer that has one for each position.
    routed: the tile of the routing and of LoRA's shrink.
    """
    p, rank = problem, product.rank
    assert rank is not None
    transposed = matrix == "b"
    k = product.n if transposed else product.k
    block_r, rank_padded = rank_blocks(rank)
    shape = (p.adapters, p.experts, k, rank) if transposed else (p.adapters, p.experts, rank, k)
    slots = p.slots(routed)
    return Plan(
        kernel=lora_grad_kernel,
        grid=(cdiv(k, tile.block_k), p.experts, p.adapters * rank_padded // block_r),
        operands={
            "wide_ptr": wide,
            "shrunk_ptr": shrunk,
            "adapter_ids_ptr": "adapter_ids" if p.adapter_ids else None,
            "order_ptr": "order",
            "tiles_ptr": "tiles",
        },
        scalars={"pairs": p.pairs},
        outputs={"out_ptr": Buffer(f"{product.name}_{matrix}_grad", shape, dtype)},
        constexprs={
            "K": k,
            "EXPERTS": p.experts,
            "TOP_K": p.top_k,
            "RANK": rank,
            "RANK_PADDED": rank_padded,
            "SPLITS": routed.shrink_splits,
            "GATHER": wide in BY_TOKEN,
            "TRANSPOSED": transposed,
            "SLOTS": slots,
            "SLOTS_PADDED": next_power_of_2(slots),
            "BLOCK_M": tile.block_m,
            "BLOCK_K": tile.block_k,
            "BLOCK_R": block_r,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        flops=2 * p.pairs * k * rank,
        bytes_accessed=2 * p.pairs * k + 4 * routed.shrink_splits * p.pairs * rank_padded,
    )


@triton.jit
def bias_grad_kernel(
    grad_ptr,  # (T, N) bf16 by token, or (P, N) by position
    gates_ptr,  # (P,) float32, routing weight by pair, or None
    order_ptr,  # (P,) int32, position -> pair
    tiles_ptr,  # (slots, 3) int32: expert or -1, first position, end position
    out_ptr,  # (E, N)
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[e] = sum over the positions of expert e of gate * grad; zero without any. Grid: (cdiv(N, BLOCK_N), E)."""
    expert = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, end = expert_rows(tiles_ptr, expert, SLOTS, SLOTS_PADDED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        pair = tl.load(order_ptr + rows, mask=rows < end, other=0)
        at = grad_ptr + (pair // TOP_K if GATHER else rows).to(tl.int64)[:, None] * N + columns[None, :]
        grad = tl.load(at, mask=(rows < end)[:, None] & (columns < N)[None, :], other=0.0).to(tl.float32)
        if gates_ptr is not None:
            grad *= tl.load(gates_ptr + pair, mask=rows < end, other=0.0)[:, None]
        acc += grad
    out = tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + expert.to(tl.int64) * N + columns, out, mask=columns < N)


def plan_bias_grad(product: Projection, problem: MoeProblem, tile: BiasGradTile, routed: RowTile, dtype: str) -> Plan:
    """The gradient of gate_up_bias [E, 2I] from pre_activations_grad, or of down_bias [E, H] from dy."""
    p, n = problem, product.n
    slots = p.slots(routed)
    return Plan(
        kernel=bias_grad_kernel,
        grid=(cdiv(n, tile.block_n), p.experts),
        operands={
            "grad_ptr": "pre_activations_grad" if product.is_gate_up else "dy",
            "gates_ptr": None if product.is_gate_up else "weights",
            "order_ptr": "order",
            "tiles_ptr": "tiles",
        },
        outputs={"out_ptr": Buffer(f"{product.name}_bias_grad", (p.experts, n), dtype)},
        constexprs={
            "N": n,
            "TOP_K": p.top_k,
            "GATHER": not product.is_gate_up,
            "SLOTS": slots,
            "SLOTS_PADDED": next_power_of_2(slots),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        flops=2 * p.pairs * n,
        bytes_accessed=2 * p.pairs * n,
    )
