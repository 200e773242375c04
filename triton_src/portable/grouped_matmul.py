"""The experts' two products, gate_up and down: one kernel over tiles of rows that share an expert."""

import triton
import triton.language as tl

from jmoe.triton_src.activation_tile import activate, gate_up_row, keep_clamped
from jmoe.triton_src.plan import Buffer, Plan, cdiv
from jmoe.triton_src.portable.expert_weight import dense_product, mxfp4_product
from jmoe.triton_src.portable.shrink import expand_tile, lora_constexprs, lora_operands
from jmoe.triton_src.problem import Layout, MoeProblem, Projection
from jmoe.triton_src.stacked import in_stack
from jmoe.triton_src.tiles import GroupedMatmulTile


@triton.jit(do_not_specialize=["pairs"])
def grouped_matmul_kernel(
    x_ptr,  # gate_up: (T, K) bf16; down: (P, K) bf16 by position
    weight_ptr,  # MXFP4: (E, N, K / 2) uint8, low nibble first; dense: (E, N, K) bf16
    scales_ptr,  # MXFP4: (E, N, K / 32) uint8; dense: None
    bias_ptr,  # (E, N) bf16 or float32, or None
    gates_ptr,  # down: (P,) float32, routing weight by pair; gate_up: None
    shrunk_ptr,  # (SPLITS, P, RANK_PADDED) float32 by position, or None without LoRA
    lora_b_ptr,  # (A, E, N, R) bf16 or float32, or None without LoRA
    adapter_ids_ptr,  # (T,) int32, -1 for none; None: adapter 0 for all
    order_ptr,  # (P,) int32, position -> pair
    tiles_ptr,  # (slots, 3) int32: expert or -1, first position, end position
    layer_ptr,  # (1,) int32: which layer's weights, of several; None: there is one layer's
    lora_layer_ptr,  # (1,) int32: which layer's LoRA, of several; None: there is one layer's
    out_ptr,  # gate_up: (P, N / 2) bf16 by position; down: (P, N) bf16 by pair
    pre_activations_ptr,  # gate_up: (P, N) bf16 by position, or None unless they are kept for gradients
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
    ACTIVATION: tl.constexpr,  # jmoe.triton_src.activation.SwiGLU
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = x W[e]^T + LoRA + bias[e] by tiles of rows that share expert e, and what follows it.

    gate_up: out[p] = activation of (product of x[token(p)]). down: out[pair(p)] = gate of the pair * (product of x[p]).
    Grid: (cdiv(N, BLOCK_N), slots); one program = one expert's tile of positions by BLOCK_N columns.
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
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = columns < N
    matrix_rows = gate_up_row(columns, N, ACTIVATION) if GATE_UP else columns
    # rows * K and, for 256 experts, expert * N * K pass 2^31.
    x_rows = x_ptr + (tokens if GATE_UP else rows).to(tl.int64) * K
    wide_expert = in_stack(expert, layer_ptr, EXPERTS).to(tl.int64)

    if scales_ptr is not None:
        blocks = weight_ptr + wide_expert * (N * K // 2)
        scales = scales_ptr + wide_expert * (N * K // 32)
        acc = mxfp4_product(x_rows, row_ok, blocks, scales, matrix_rows, column_ok, K, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        weight = weight_ptr + wide_expert * (N * K)
        acc = dense_product(x_rows, row_ok, weight, matrix_rows, column_ok, K, BLOCK_M, BLOCK_N, BLOCK_K)

    if lora_b_ptr is not None:
        lora_expert = in_stack(expert, lora_layer_ptr, ADAPTERS * EXPERTS)
        acc = expand_tile(
            acc, shrunk_ptr, lora_b_ptr, adapter_ids_ptr, tokens, rows, row_ok, matrix_rows, column_ok, lora_expert,
            pairs, N, EXPERTS, ADAPTERS, RANK, RANK_PADDED, BLOCK_R, SPLITS, False, x_ptr.dtype.element_ty,
        )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + wide_expert * N + matrix_rows, mask=column_ok, other=0.0).to(tl.float32)[None, :]

    if GATE_UP:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
        if pre_activations_ptr is not None:
            kept_gate, kept_up = keep_clamped(gate, up, ACTIVATION)
            kept = tl.reshape(tl.join(kept_gate, kept_up), (BLOCK_M, BLOCK_N))
            tl.store(
                pre_activations_ptr + rows.to(tl.int64)[:, None] * N + matrix_rows[None, :],
                kept.to(pre_activations_ptr.dtype.element_ty),
                mask=row_ok[:, None] & column_ok[None, :],
            )
        out = activate(gate, up, ACTIVATION)
        out_columns = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        out_rows = out_ptr + rows.to(tl.int64) * (N // 2)
        out_ok = out_columns < N // 2
    else:
        out = acc * tl.load(gates_ptr + pair, mask=row_ok, other=0.0)[:, None]
        out_columns = columns
        out_rows = out_ptr + pair.to(tl.int64) * N
        out_ok = column_ok
    tl.store(
        out_rows[:, None] + out_columns[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & out_ok[None, :],
    )


def pre_activations(problem: MoeProblem) -> dict[str, Buffer]:
    """The output of gate_up's launch that is kept for gradients."""
    return {"pre_activations_ptr": Buffer("pre_activations", (problem.pairs, problem.gate_up.n), "bfloat16")}


def plan_grouped_matmul(product: Projection, problem: MoeProblem, tile: GroupedMatmulTile, keep: bool = False) -> Plan:
    """gate_up: activations [P, I] from x [T, H], and pre_activations [P, 2I] too if `keep`.

    down: pair_out [P, H] from activations.
    """
    p, n, k = problem, product.n, product.k
    out = Buffer("pair_out", (p.pairs, n), "bfloat16")
    if product.is_gate_up:
        out = Buffer("activations", (p.pairs, n // 2), "bfloat16")
    return Plan(
        kernel=grouped_matmul_kernel,
        grid=(cdiv(n, tile.block_n), p.slots(tile)),
        operands={
            "x_ptr": "x" if product.is_gate_up else "activations",
            "weight_ptr": product.name,
            "scales_ptr": None if product.layout is Layout.DENSE else f"{product.name}_scales",
            "bias_ptr": f"{product.name}_bias" if product.bias else None,
            "gates_ptr": None if product.is_gate_up else "weights",
            **lora_operands(product, p),
            "order_ptr": "order",
            "tiles_ptr": "tiles",
            **p.stacked.weights_operand,
            **p.stacked.lora_operand,
            **({} if keep else {"pre_activations_ptr": None}),
        },
        scalars={"pairs": p.pairs},
        outputs={"out_ptr": out, **(pre_activations(p) if keep else {})},
        constexprs={
            "N": n,
            "K": k,
            "EXPERTS": p.experts,
            "TOP_K": p.top_k,
            **lora_constexprs(product, p, tile),
            "GATE_UP": product.is_gate_up,
            "ACTIVATION": p.activation,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        flops=2 * p.pairs * n * (k + (product.rank or 0)),
        bytes_accessed=p.active_experts * product.layout.bytes(n, k) + 2 * p.pairs * (k + out.shape[1]),
    )
