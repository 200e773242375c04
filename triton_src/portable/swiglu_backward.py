"""SwiGLU's gradient by rows, and with it that of the gate weights."""

import triton
import triton.language as tl

from jmoe.triton_src.activation_tile import activate, activate_backward, gate_up_row
from jmoe.triton_src.plan import Buffer, Plan, next_power_of_2
from jmoe.triton_src.problem import MoeProblem, RowTile
from jmoe.triton_src.stacked import in_stack
from jmoe.triton_src.tiles import SwigluBackwardTile


@triton.jit
def swiglu_backward_kernel(
    pre_activations_ptr,  # (P, 2 I) bf16 by position
    down_dgrad_ptr,  # (P, I) bf16 by position: dy W2, before the gate weight
    dy_ptr,  # (T, H) bf16, or None: down has no bias
    bias_ptr,  # (E, H) bf16 or float32, or None
    gates_ptr,  # (P,) float32, routing weight by pair
    order_ptr,  # (P,) int32, position -> pair
    tiles_ptr,  # (slots, 3) int32: expert or -1, first position, end position
    layer_ptr,  # (1,) int32: which layer's weights, of several; None: there is one layer's
    pre_activations_grad_ptr,  # (P, 2 I) bf16 by position
    weighted_activations_ptr,  # (P, I) bf16 by position: gate weight * activation
    pair_gates_grad_ptr,  # (P,) float32 by pair
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,  # jmoe.triton_src.activation.SwiGLU
    BLOCK: tl.constexpr,
):
    """One position a program.

    The gate weight's gradient is <activation, down_dgrad> + <dy, down bias>, for which the experts' outputs need not be
    kept (SonicMoE, arXiv 2512.14080). Grid: (slots, rows of a tile).
    """
    expert = tl.load(tiles_ptr + tl.program_id(0) * 3)
    row = tl.load(tiles_ptr + tl.program_id(0) * 3 + 1) + tl.program_id(1)
    end = tl.load(tiles_ptr + tl.program_id(0) * 3 + 2)
    if (expert < 0) | (row >= end):
        return
    pair = tl.load(order_ptr + row)
    weight = tl.load(gates_ptr + pair)
    wide_row = row.to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, I, BLOCK):
        column = start + tl.arange(0, BLOCK)
        ok = column < I
        both = 2 * start + tl.arange(0, 2 * BLOCK)
        rows_of_both = gate_up_row(both, 2 * I, ACTIVATION)
        z = tl.load(pre_activations_ptr + wide_row * (2 * I) + rows_of_both, mask=both < 2 * I, other=0.0)
        gate, up = tl.split(tl.reshape(z.to(tl.float32), (BLOCK, 2)))
        dh = tl.load(down_dgrad_ptr + wide_row * I + column, mask=ok, other=0.0).to(tl.float32)
        activation = activate(gate, up, ACTIVATION)
        total += activation * dh
        tl.store(
            weighted_activations_ptr + wide_row * I + column,
            (weight * activation).to(weighted_activations_ptr.dtype.element_ty),
            mask=ok,
        )
        dgate, dup = activate_backward(gate, up, weight * dh, ACTIVATION)
        dz = tl.reshape(tl.join(dgate, dup), (2 * BLOCK,))
        tl.store(
            pre_activations_grad_ptr + wide_row * (2 * I) + rows_of_both,
            dz.to(pre_activations_grad_ptr.dtype.element_ty),
            mask=both < 2 * I,
        )
    if bias_ptr is not None:
        bias_row = bias_ptr + in_stack(expert, layer_ptr, EXPERTS).to(tl.int64) * H
        dy_row = dy_ptr + (pair // TOP_K).to(tl.int64) * H
        for start in range(0, H, BLOCK):
            column = start + tl.arange(0, BLOCK)
            dy = tl.load(dy_row + column, mask=column < H, other=0.0).to(tl.float32)
            bias = tl.load(bias_row + column, mask=column < H, other=0.0).to(tl.float32)
            total += dy * bias
    tl.store(pair_gates_grad_ptr + pair, tl.sum(total, axis=0))


def plan_swiglu_backward(problem: MoeProblem, tile: SwigluBackwardTile, routed: RowTile) -> Plan:
    """pre_activations_grad [P, 2I], weighted_activations [P, I] and pair_gates_grad [P] from pre_activations."""
    p, bias = problem, problem.down.bias
    return Plan(
        kernel=swiglu_backward_kernel,
        grid=(p.slots(routed), routed.block_m),
        operands={
            "pre_activations_ptr": "pre_activations",
            "down_dgrad_ptr": "down_dgrad",
            "dy_ptr": "dy" if bias else None,
            "bias_ptr": "down_bias" if bias else None,
            "gates_ptr": "weights",
            "order_ptr": "order",
            "tiles_ptr": "tiles",
            **p.stacked.weights_operand,
        },
        outputs={
            "pre_activations_grad_ptr": Buffer("pre_activations_grad", (p.pairs, 2 * p.intermediate), "bfloat16"),
            "weighted_activations_ptr": Buffer("weighted_activations", (p.pairs, p.intermediate), "bfloat16"),
            "pair_gates_grad_ptr": Buffer("pair_gates_grad", (p.pairs,), "float32"),
        },
        constexprs={
            "H": p.hidden,
            "I": p.intermediate,
            "EXPERTS": p.experts,
            "TOP_K": p.top_k,
            "ACTIVATION": p.activation,
            "BLOCK": min(tile.block, next_power_of_2(p.intermediate)),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        flops=20 * p.pairs * p.intermediate,
        bytes_accessed=2 * p.pairs * (6 * p.intermediate + p.hidden * bias),
    )
