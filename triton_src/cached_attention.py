"""Attention of one query a sequence to a cache of keys and values, which is read in place."""

import triton
import triton.language as tl

from jmoe.triton_src.plan import Buffer, Plan, cdiv, next_power_of_2

BLOCK_S = 64
"""Slots that a program reads at once."""

PROGRAMS = 264
"""Wanted of a launch, two on each of an H100's multiprocessors: a sequence's slots are split to have so many."""


@triton.jit
def cached_attention_kernel(
    q_ptr,  # (B, N, D) bf16
    cache_ptr,  # (L, B, M, S, 2 D) bf16: a key and its value behind it
    layer_ptr,  # (1,) int32
    position_ptr,  # (B,) int32, of the sequence's latest token
    partial_ptr,  # (B, N, SPLITS, D) float32: sum of exp(score - largest) * value
    largest_ptr,  # (B, N, SPLITS) float32: the largest score, -inf of none
    total_ptr,  # (B, N, SPLITS) float32: sum of exp(score - largest)
    BATCH: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Parts, over the slots in use, of the N / M query heads that share a key head. Grid: (B * M, SPLITS).

    Slot j holds a token if j <= position, and all do once a ring has gone round.
    """
    GROUP: tl.constexpr = N // M
    sequence = tl.program_id(0) // M
    head = tl.program_id(0) % M
    split = tl.program_id(1)
    used = tl.minimum(tl.load(position_ptr + sequence) + 1, S)
    share = tl.cdiv(tl.cdiv(used, BLOCK_S), SPLITS) * BLOCK_S
    start = split * share
    stop = tl.minimum(start + share, used)
    group = tl.arange(0, BLOCK_G)
    group_ok = group < GROUP
    dims = tl.arange(0, D)
    rows = sequence * N + head * GROUP + group
    q = tl.load(q_ptr + rows[:, None] * D + dims[None, :], mask=group_ok[:, None], other=0.0)
    at = ((tl.load(layer_ptr) * BATCH + sequence) * M + head).to(tl.int64) * S
    largest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, D), tl.float32)
    for first in range(start, stop, BLOCK_S):
        slots = first + tl.arange(0, BLOCK_S)
        ok = slots < stop
        entry = cache_ptr + (at + slots)[:, None] * (2 * D) + dims[None, :]
        keys = tl.load(entry, mask=ok[:, None], other=0.0)
        values = tl.load(entry + D, mask=ok[:, None], other=0.0)
        scores = tl.where(ok[None, :], tl.dot(q, keys.T) * SCALE, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_largest[:, None])
        shrink = tl.exp(largest - new_largest)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None])
        largest = new_largest
    out = rows * SPLITS + split
    tl.store(partial_ptr + out[:, None] * D + dims[None, :], acc, mask=group_ok[:, None])
    tl.store(largest_ptr + out, largest, mask=group_ok)
    tl.store(total_ptr + out, total, mask=group_ok)


@triton.jit
def merge_attention_kernel(
    partial_ptr,  # (B, N, SPLITS, D) float32
    largest_ptr,  # (B, N, SPLITS) float32
    total_ptr,  # (B, N, SPLITS) float32
    sinks_ptr,  # (N,) bf16 or float32
    out_ptr,  # (B, N, D) bf16
    N: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The parts' mean, with exp(sink) in its denominator. Grid: (B * N,)."""
    row = tl.program_id(0)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, D)
    sink = tl.load(sinks_ptr + row % N).to(tl.float32)
    largest = tl.load(largest_ptr + row * SPLITS + splits)
    whole = tl.maximum(tl.max(largest, axis=0), sink)
    weight = tl.exp(largest - whole)
    total = tl.sum(weight * tl.load(total_ptr + row * SPLITS + splits), axis=0) + tl.exp(sink - whole)
    parts = tl.load(partial_ptr + (row * SPLITS + splits)[:, None] * D + dims[None, :])
    out = tl.sum(parts * weight[:, None], axis=0) / total
    tl.store(out_ptr + row * D + dims, out.to(out_ptr.dtype.element_ty))


def plan_cached_attention(*, batch: int, heads: int, key_heads: int, slots: int, head_dim: int) -> list[Plan]:
    """attended [B, N, D] from q, cache, sinks, layer [1] and position [B]."""
    wanted = min(cdiv(PROGRAMS, batch * key_heads), cdiv(slots, 2 * BLOCK_S))
    splits = next_power_of_2(max(wanted, 1))
    sizes = {"N": heads, "D": head_dim, "SPLITS": splits}
    parts = {
        "partial_ptr": Buffer("attention_partial", (batch, heads, splits, head_dim), "float32"),
        "largest_ptr": Buffer("attention_largest", (batch, heads, splits), "float32"),
        "total_ptr": Buffer("attention_total", (batch, heads, splits), "float32"),
    }
    return [
        Plan(
            kernel=cached_attention_kernel,
            grid=(batch * key_heads, splits),
            operands={name: name.removesuffix("_ptr") for name in ("q_ptr", "cache_ptr", "layer_ptr", "position_ptr")},
            outputs=parts,
            constexprs={
                **sizes,
                "BATCH": batch,
                "M": key_heads,
                "S": slots,
                "SCALE": head_dim**-0.5,
                "BLOCK_S": BLOCK_S,
                "BLOCK_G": max(16, next_power_of_2(heads // key_heads)),
            },
            num_warps=4,
            num_stages=3,
            flops=4 * batch * heads * slots * head_dim,
            bytes_accessed=4 * batch * key_heads * slots * head_dim,
        ),
        Plan(
            kernel=merge_attention_kernel,
            grid=(batch * heads,),
            operands={**{parameter: part.name for parameter, part in parts.items()}, "sinks_ptr": "sinks"},
            outputs={"out_ptr": Buffer("attended", (batch, heads, head_dim), "bfloat16")},
            constexprs=sizes,
            num_warps=1,
            num_stages=1,
            flops=3 * batch * heads * splits * head_dim,
            bytes_accessed=4 * batch * heads * splits * head_dim,
        ),
    ]
