"""The sum over a token's experts, a role of the programs that multiply by packed weights."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from jmoe.triton_src.finished import wait_for_all

BLOCK_H = gl.constexpr(512)
"""Columns of a program."""


@gluon.jit
def sum_experts(
    pair_out_ptr,  # (P, H) bf16 by pair
    experts_ptr,  # (T, k) int32
    expert_offset_ptr,  # (1,) int32, first expert held here; None: 0
    adapter_ids_ptr,  # (T,) int32, or None
    y_ptr,  # (T, H) bf16
    counter,
    count,
    program,
    H: gl.constexpr,
    EXPERTS: gl.constexpr,
    TOP_K: gl.constexpr,
    ADAPTERS: gl.constexpr,
):
    """As combine_kernel. pair_out can be read when `counter` is at `count`; cdiv(H, BLOCK_H) programs a token."""
    L: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    BLOCKS: gl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    token = program // BLOCKS
    h = program % BLOCKS * BLOCK_H + gl.arange(0, BLOCK_H, L)
    offset = 0
    if expert_offset_ptr is not None:
        offset = gl.load(expert_offset_ptr)
    held = ()
    for j in gl.static_range(TOP_K):
        expert = gl.load(experts_ptr + token * TOP_K + j) - offset
        held = held + ((expert >= 0) & (expert < EXPERTS),)
    wait_for_all(counter, count)
    acc = gl.zeros([BLOCK_H], gl.float32, L)
    for j in gl.static_range(TOP_K):
        pair = token.to(gl.int64) * TOP_K + j
        acc += gl.load(pair_out_ptr + pair * H + h, mask=held[j] & (h < H), other=0.0).to(gl.float32)
    if adapter_ids_ptr is not None:
        adapter = gl.load(adapter_ids_ptr + token)
        acc = gl.where((adapter >= -1) & (adapter < ADAPTERS), acc, float("nan"))
    gl.store(y_ptr + token.to(gl.int64) * H + h, acc.to(gl.bfloat16), mask=h < H)
