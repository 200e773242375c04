"""The gradient of the experts' products in their rows: the weights as they lie, read across."""

import triton
import triton.language as tl

from jmoe.triton_src.plan import Buffer, Plan, cdiv
from jmoe.triton_src.portable.shrink import expand_tile, lora_constexprs
from jmoe.triton_src.problem import Layout, MoeProblem, Projection, RowTile
from jmoe.triton_src.stacked import in_stack
from jmoe.triton_src.tiles import PortableDgradTile


@triton.jit(do_not_specialize=["pairs"])
def dgrad_kernel(
    grad_ptr,  # gate_up: (P, N) bf16 by position; down: (T, N) bf16
    weight_ptr,  # MXFP4: (E, N, K / 2) uint8, low nibble first; dense: (E, N, K) bf16
    scales_ptr,  # MXFP4: (E, N, K / 32) uint8; dense: None
    shrunk_ptr,  # (SPLITS, P, RANK_PADDED) float32 by position: scale * grad B, or None without LoRA
    lora_a_ptr,  # (A, E, R, K) bf16 or float32, or None without LoRA
    adapter_ids_ptr,  # (T,) int32, -1 for none; None: adapter 0 for all
    order_ptr,  # (P,) int32, position -> pair
    tiles_ptr,  # (slots, 3) int32: expert or -1, first position, end position
    layer_ptr,  # (1,) int32: which layer's weights, of several; None: there is one layer's
    lora_layer_ptr,  # (1,) int32: which layer's LoRA, of several; None: there is one layer's
    out_ptr,  # gate_up: (P, K) bf16 by pair; down: (P, K) bf16 by position
    pairs,
    N: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    GATE_UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = grad W[e] + LoRA by tiles of rows that share expert e.

    Grid: (cdiv(K, BLOCK_K), slots); one program = one expert's tile of positions by BLOCK_K columns.
    """
    tile = tl.program_id(1)
    expert = tl.load(tiles_ptr + tile * 3)
    if expert < 0:
        return
    first = tl.load(tiles_ptr + tile * 3 + 1)
    end = tl.load(tiles_ptr + tile * 3 + 2)
    rows = first + tl.arange(0, BLOCK_M)
    row_ok = rows < end
    pair = tl.load(order_ptr + rows, mask=row_ok, other=0)
    tokens = pair // TOP_K
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    column_ok = columns < K
    grad_rows = grad_ptr + (rows if GATE_UP else tokens).to(tl.int64) * N
    wide_expert = in_stack(expert, layer_ptr, EXPERTS).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n in range(0, N, BLOCK_N):
        inner = n + tl.arange(0, BLOCK_N)
        inner_ok = inner < N
        grad = tl.load(grad_rows[:, None] + inner[None, :], mask=row_ok[:, None] & inner_ok[None, :], other=0.0)
        if scales_ptr is not None:
            weight = mxfp4_tile(
                weight_ptr + wide_expert * (N * K // 2), scales_ptr + wide_expert * (N * K // 32),
                inner, inner_ok, tl.program_id(0) * BLOCK_K, K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            weight = tl.load(
                weight_ptr + wide_expert * (N * K) + inner[:, None] * K + columns[None, :],
                mask=inner_ok[:, None] & column_ok[None, :],
                other=0.0,
            )
        acc = tl.dot(grad, weight, acc)
    if lora_a_ptr is not None:
        lora_expert = in_stack(expert, lora_layer_ptr, ADAPTERS * EXPERTS)
        acc = expand_tile(
            acc, shrunk_ptr, lora_a_ptr, adapter_ids_ptr, tokens, rows, row_ok, columns, column_ok, lora_expert,
            pairs, K, EXPERTS, ADAPTERS, RANK, RANK_PADDED, BLOCK_R, SPLITS, True, grad_ptr.dtype.element_ty,
        )  # fmt: skip
    out_rows = out_ptr + (pair if GATE_UP else rows).to(tl.int64) * K
    tl.store(
        out_rows[:, None] + columns[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & column_ok[None, :],
    )


@triton.jit
def mxfp4_tile(
    blocks_ptr,  # the expert's (N, K / 2) uint8, low nibble first
    scales_ptr,  # the expert's (N, K / 32) uint8
    rows,  # (BLOCK_N,)
    row_ok,  # (BLOCK_N,)
    column,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """bf16 (BLOCK_N, BLOCK_K): those rows from `column`, a multiple of 32, on; zero outside."""
    bytes_ = column // 2 + tl.arange(0, BLOCK_K // 2)
    groups = column // 32 + tl.arange(0, BLOCK_K // 32)
    blocks = tl.load(
        blocks_ptr + rows[:, None] * (K // 2) + bytes_[None, :],
        mask=row_ok[:, None] & (bytes_ < K // 2)[None, :],
        other=0,
    )
    scales = tl.load(
        scales_ptr + rows[:, None] * (K // 32) + groups[None, :],
        mask=row_ok[:, None] & (groups < K // 32)[None, :],
        other=0,
    ).to(tl.int32)
    # 2**(scale - 127) as float32: the byte is the exponent.
    factor = tl.where(scales == 255, float("nan"), (scales << 23).to(tl.float32, bitcast=True))
    values = tl.reshape(tl.join(e2m1_values(blocks & 15), e2m1_values(blocks >> 4)), (BLOCK_N, BLOCK_K // 32, 32))
    return tl.reshape((values * factor[:, :, None]).to(tl.bfloat16), (BLOCK_N, BLOCK_K))


@triton.jit
def e2m1_values(nibbles):
    """float32 values of 4-bit codes: sign, two bits of exponent, one of mantissa."""
    code = nibbles.to(tl.int32)
    size = code & 7
    doubled = tl.where(size == 0, 0, ((2 | (size & 1)) << (size >> 1)) >> 1)
    value = doubled.to(tl.float32) * 0.5
    return tl.where(code >= 8, -value, value)


def plan_dgrad(product: Projection, problem: MoeProblem, tile: PortableDgradTile, routed: RowTile) -> Plan:
    """gate_up: pair_dx [P, H] from pre_activations_grad. down: down_dgrad [P, I] from dy [T, H].

    routed: the tile of the routing and of LoRA's shrink.
    """
    p, n, k = problem, product.n, product.k
    return Plan(
        kernel=dgrad_kernel,
        grid=(cdiv(k, tile.block_k), p.slots(routed)),
        operands={
            "grad_ptr": "pre_activations_grad" if product.is_gate_up else "dy",
            "weight_ptr": product.name,
            "scales_ptr": None if product.layout is Layout.DENSE else f"{product.name}_scales",
            **dgrad_lora_operands(product, p),
            "order_ptr": "order",
            "tiles_ptr": "tiles",
            **p.stacked.weights_operand,
            **p.stacked.lora_operand,
        },
        scalars={"pairs": p.pairs},
        outputs=dgrad_output(product, p),
        constexprs={
            "N": n,
            "K": k,
            "EXPERTS": p.experts,
            "TOP_K": p.top_k,
            **lora_constexprs(product, p, routed),
            "GATE_UP": product.is_gate_up,
            "BLOCK_M": routed.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        flops=2 * p.pairs * k * (n + (product.rank or 0)),
        bytes_accessed=p.active_experts * product.layout.bytes(n, k) + 2 * p.pairs * (n + k),
    )


def dgrad_output(product: Projection, problem: MoeProblem) -> dict[str, Buffer]:
    """The output of a dgrad's launch."""
    name = "pair_dx" if product.is_gate_up else "down_dgrad"
    return {"out_ptr": Buffer(name, (problem.pairs, product.k), "bfloat16")}


def dgrad_lora_operands(product: Projection, problem: MoeProblem) -> dict[str, str | None]:
    """The operands of a dgrad's launch that are about LoRA."""
    lora = product.rank is not None
    return {
        "shrunk_ptr": f"{product.name}_grad_shrunk" if lora else None,
        "lora_a_ptr": f"{product.name}_a" if lora else None,
        "adapter_ids_ptr": "adapter_ids" if lora and problem.adapter_ids else None,
    }
