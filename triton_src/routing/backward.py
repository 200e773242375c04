"""The router's gradient: of the weights of a token's chosen experts in its logits."""

import triton
import triton.language as tl

from jmoe.triton_src.plan import Buffer, Plan, cdiv, next_power_of_2
from jmoe.triton_src.problem import MoeProblem
from jmoe.triton_src.routing.problem import SMALLEST_BLOCK
from jmoe.triton_src.routing.top_k import scores_of
from jmoe.triton_src.tiles import RouteBackwardTile


@triton.jit(do_not_specialize=["tokens"])
def route_backward_kernel(
    experts_ptr,  # (T, k) int32
    weights_ptr,  # (T, k) float32
    pair_gates_grad_ptr,  # (P,) float32 by pair; read for local pairs alone
    expert_offset_ptr,  # (1,) int32, first expert of this shard; None: 0
    logits_ptr,  # (T, COLUMNS) bf16 or float32, or None where the weights alone tell the gradient
    weights_grad_ptr,  # (T, k) float32, or None
    logits_grad_ptr,  # (T, COLUMNS), or None
    tokens,
    COLUMNS: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SCORING: tl.constexpr,  # jmoe.triton_src.scoring.Scoring
):
    """logits_grad = weight * (gate's gradient - the sum of weight * gate's gradient) at chosen experts, zero elsewhere.

    That is of a softmax over the chosen logits, and of a scale of 1. Of sigmoids, 1 - sigmoid multiplies it, and the
    sum is left out where it divides no weight; of a softmax over all logits, every expert's score times the sum is
    taken from its gradient.
    Pairs of experts that are not of this shard have no gradient from here. Grid: (cdiv(T, BLOCK_T),).
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = token < tokens
    offset = 0 if expert_offset_ptr is None else tl.load(expert_offset_ptr)
    sum_ = tl.zeros((BLOCK_T,), tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        expert = tl.load(experts_ptr + pair, mask=ok, other=0) - offset
        local = ok & (expert >= 0) & (expert < EXPERTS)
        grad = tl.load(pair_gates_grad_ptr + pair, mask=local, other=0.0)
        if weights_grad_ptr is not None:
            tl.store(weights_grad_ptr + pair, grad, mask=ok)
        sum_ += grad * tl.load(weights_ptr + pair, mask=ok, other=0.0)
    if logits_grad_ptr is not None:
        column = tl.arange(0, COLUMNS_PADDED)
        if SCORING.scale != 1 and SCORING.renormalize:
            sum_ = sum_ / SCORING.scale
        OF_ALL: tl.constexpr = SCORING.function == "softmax" and not SCORING.renormalize
        if OF_ALL:
            columns_ok = (column < COLUMNS)[None, :]
            all_at = token.to(tl.int64)[:, None] * COLUMNS + column[None, :]
            logits = tl.load(logits_ptr + all_at, mask=ok[:, None] & columns_ok, other=0.0)
            out = -sum_[:, None] * scores_of(logits, columns_ok, SCORING)
        else:
            out = tl.zeros((BLOCK_T, COLUMNS_PADDED), tl.float32)
        for j in tl.static_range(TOP_K):
            pair = token * TOP_K + j
            known = tl.load(experts_ptr + pair, mask=ok, other=0)
            local = ok & (known - offset >= 0) & (known - offset < EXPERTS)
            grad = tl.load(pair_gates_grad_ptr + pair, mask=local, other=0.0)
            if SCORING.renormalize:
                grad = tl.load(weights_ptr + pair, mask=ok, other=0.0) * (grad - sum_)
            else:
                grad = tl.load(weights_ptr + pair, mask=ok, other=0.0) * grad
            if SCORING.function == "sigmoid":
                logit = tl.load(logits_ptr + token.to(tl.int64) * COLUMNS + known, mask=ok, other=0.0)
                grad = grad * tl.sigmoid(-logit.to(tl.float32))
            chosen = grad[:, None] + out if OF_ALL else grad[:, None]
            out = tl.where(column[None, :] == known[:, None], chosen, out)
        at = logits_grad_ptr + token.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        tl.store(at, out.to(logits_grad_ptr.dtype.element_ty), mask=ok[:, None] & (column < COLUMNS)[None, :])


def plan_route_backward(problem: MoeProblem, tile: RouteBackwardTile, dtype: str) -> Plan:
    """router_logits_grad [T, E] in dtype, or weights_grad [T, k] float32 where experts and weights were given."""
    p = problem
    columns = p.router_experts or 1
    columns_padded = next_power_of_2(max(columns, SMALLEST_BLOCK))
    block_t = max(1, min(tile.block_rows, tile.largest_block // columns_padded))
    outputs = {"logits_grad_ptr": Buffer("router_logits_grad", (p.tokens, columns), dtype)}
    if p.router_experts is None:
        outputs = {"weights_grad_ptr": Buffer("weights_grad", (p.tokens, p.top_k), "float32")}
    absent = {"weights_grad_ptr": None, "logits_grad_ptr": None}
    return Plan(
        kernel=route_backward_kernel,
        grid=(cdiv(p.tokens, block_t),),
        operands={
            "experts_ptr": "experts",
            "weights_ptr": "weights",
            "pair_gates_grad_ptr": "pair_gates_grad",
            "expert_offset_ptr": "expert_offset" if p.expert_offset else None,
            "logits_ptr": "router_logits" if p.router_experts and not p.scoring.of_chosen_logits else None,
            **{name: None for name in absent if name not in outputs},
        },
        scalars={"tokens": p.tokens},
        outputs=outputs,
        constexprs={
            "COLUMNS": columns,
            "COLUMNS_PADDED": columns_padded,
            "EXPERTS": p.experts,
            "TOP_K": p.top_k,
            "BLOCK_T": block_t,
            "SCORING": p.scoring,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        flops=4 * p.pairs,
        bytes_accessed=p.tokens * (2 * columns + 12 * p.top_k),
    )
