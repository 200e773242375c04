"""The sum over a token's experts."""

import triton
import triton.language as tl

from jmoe.triton_src.plan import Buffer, Plan, cdiv
from jmoe.triton_src.problem import MoeProblem
from jmoe.triton_src.tiles import CombineTile


@triton.jit
def combine_kernel(
    pair_out_ptr,  # (P, H) bf16 by pair
    experts_ptr,  # (T, k) int32
    expert_offset_ptr,  # (1,) int32, first expert held here; None: 0
    adapter_ids_ptr,  # (T,) int32, or None
    y_ptr,  # (T, H) bf16
    H: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ADAPTERS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """y[t] = sum over j of pair_out[t * k + j], leaving out pairs of experts that are not held here.

    A token whose adapter does not exist becomes NaN: its result would otherwise be that of no adapter.
    Grid: (T, cdiv(H, BLOCK_H)).
    """
    token = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offset = 0 if expert_offset_ptr is None else tl.load(expert_offset_ptr)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for j in tl.static_range(TOP_K):
        expert = tl.load(experts_ptr + token * TOP_K + j) - offset
        held = (expert >= 0) & (expert < EXPERTS)
        # P * H may pass 2^31.
        pair = token.to(tl.int64) * TOP_K + j
        acc += tl.load(pair_out_ptr + pair * H + h, mask=held & (h < H), other=0.0).to(tl.float32)
    if adapter_ids_ptr is not None:
        adapter = tl.load(adapter_ids_ptr + token)
        acc = tl.where((adapter >= -1) & (adapter < ADAPTERS), acc, float("nan"))
    tl.store(y_ptr + token.to(tl.int64) * H + h, acc.to(y_ptr.dtype.element_ty), mask=h < H)


def plan_combine(source: str, out: str, problem: MoeProblem, tile: CombineTile, *, unknown_is_nan: bool = True) -> Plan:
    """`out` [T, H] from `source` [P, H]: NaN where a token's adapter does not exist, if `unknown_is_nan`."""
    p = problem
    return Plan(
        kernel=combine_kernel,
        grid=(p.tokens, cdiv(p.hidden, tile.block_h)),
        operands={
            "pair_out_ptr": source,
            "experts_ptr": "experts",
            "expert_offset_ptr": "expert_offset" if p.expert_offset else None,
            "adapter_ids_ptr": "adapter_ids" if p.adapter_ids and unknown_is_nan else None,
        },
        outputs={"y_ptr": Buffer(out, (p.tokens, p.hidden), "bfloat16")},
        constexprs={
            "H": p.hidden,
            "EXPERTS": p.experts,
            "TOP_K": p.top_k,
            "ADAPTERS": p.adapters,
            "BLOCK_H": tile.block_h,
        },
        num_warps=tile.num_warps,
        flops=p.pairs * p.hidden,
        bytes_accessed=2 * p.tokens * (p.top_k + 1) * p.hidden,
    )
