"""Attention of one query a sequence to a cache of keys and values, which is read and written in place."""

import dataclasses
from typing import NamedTuple

import triton
import triton.language as tl

from jmoe.triton_src.plan import Buffer, Plan, cdiv, next_power_of_2
from jmoe.triton_src.tiles import CachedAttentionTile


@triton.jit
def rotated(heads_ptr, at, ok, cosine_ptr, sine_ptr, D: tl.constexpr):
    """The heads that begin at `at`, their halves turned against each other; rounded once."""
    dims = tl.arange(0, D)
    half = dims % (D // 2)
    own = tl.load(heads_ptr + at + dims, mask=ok, other=0.0)
    other = tl.load(heads_ptr + at + (dims + D // 2) % D, mask=ok, other=0.0)
    cosine = tl.load(cosine_ptr + half).to(own.dtype).to(tl.float32)
    sine = tl.load(sine_ptr + half).to(own.dtype).to(tl.float32)
    sine = tl.where(dims < D // 2, -sine, sine)
    return (own.to(tl.float32) * cosine + other.to(tl.float32) * sine).to(own.dtype)


@triton.jit
def cached_attention_kernel(
    heads_ptr,  # (B, N + 2 M, D) bf16: q, k and v of the sequence's latest token, not rotated
    cosine_ptr,  # (B, D / 2) float32
    sine_ptr,  # (B, D / 2) float32
    cache_ptr,  # (L, B, M, S, 2 D) bf16: a key and its value behind it; the latest token's are written
    layer_ptr,  # (1,) int32
    position_ptr,  # (B,) int32, of the latest token
    sinks_ptr,  # (layers, N) bf16 or float32; None with several splits
    sinks_layer_ptr,  # (1,) int32, or None
    out_ptr,  # (B, N, D) bf16, or None
    partial_ptr,  # (B, N, SPLITS, D) float32: sum of exp(score - largest) * value; None with one split
    largest_ptr,  # (B, N, SPLITS) float32: the largest score, -inf of none; or None
    total_ptr,  # (B, N, SPLITS) float32: sum of exp(score - largest); or None
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
    """Of the N / M query heads that share a key head, the parts over the slots in use, or with one split the mean.

    Grid: (B * M, SPLITS).

    Slot j holds a token if j <= position, and all do once a ring has gone round. The latest token's slot is never read:
    the program in whose part it lies has the key and the value from `heads`, and writes them.
    """
    GROUP: tl.constexpr = N // M
    sequence = tl.program_id(0) // M
    head = tl.program_id(0) % M
    split = tl.program_id(1)
    position = tl.load(position_ptr + sequence)
    used = tl.minimum(position + 1, S)
    latest = position % S
    share = tl.cdiv(tl.cdiv(used, BLOCK_S), SPLITS) * BLOCK_S
    start = split * share
    stop = tl.minimum(start + share, used)
    group = tl.arange(0, BLOCK_G)
    group_ok = group < GROUP
    dims = tl.arange(0, D)
    heads = heads_ptr + sequence * (N + 2 * M) * D
    cosine, sine = cosine_ptr + sequence * (D // 2), sine_ptr + sequence * (D // 2)
    q = rotated(heads, (head * GROUP + group)[:, None] * D, group_ok[:, None], cosine, sine, D)
    at = ((tl.load(layer_ptr) * BATCH + sequence) * M + head).to(tl.int64) * S
    largest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, D), tl.float32)
    if (latest >= start) & (latest < stop):
        key = rotated(heads, (N + head) * D, dims < D, cosine, sine, D)
        value = tl.load(heads + (N + M + head) * D + dims)
        written = cache_ptr + (at + latest) * (2 * D) + dims
        tl.store(written, key)
        tl.store(written + D, value)
        largest = tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * SCALE
        total += 1.0
        acc += value.to(tl.float32)[None, :]
    for first in range(start, stop, BLOCK_S):
        slots = first + tl.arange(0, BLOCK_S)
        ok = (slots < stop) & (slots != latest)
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
    out = (sequence * N + head * GROUP + group) * SPLITS + split
    if SPLITS == 1:
        sinks = sinks_ptr + tl.load(sinks_layer_ptr) * N + head * GROUP + group
        sink = tl.load(sinks, mask=group_ok, other=0.0).to(tl.float32)
        whole = tl.maximum(largest, sink)
        weight = tl.exp(largest - whole)
        mean = acc * (weight / (total * weight + tl.exp(sink - whole)))[:, None]
        tl.store(out_ptr + out[:, None] * D + dims[None, :], mean.to(out_ptr.dtype.element_ty), mask=group_ok[:, None])
    else:
        tl.store(partial_ptr + out[:, None] * D + dims[None, :], acc, mask=group_ok[:, None])
        tl.store(largest_ptr + out, largest, mask=group_ok)
        tl.store(total_ptr + out, total, mask=group_ok)


@triton.jit
def merge_attention_kernel(
    partial_ptr,  # (B, N, SPLITS, D) float32
    largest_ptr,  # (B, N, SPLITS) float32
    total_ptr,  # (B, N, SPLITS) float32
    position_ptr,  # (B,) int32, negative of rows without a sequence; None: all have one, and no part is empty
    sinks_ptr,  # (layers, N) bf16 or float32
    sinks_layer_ptr,  # (1,) int32
    out_ptr,  # (B, N, D) bf16
    N: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The parts' mean, with exp(sink) in its denominator; zeros without a sequence. Grid: (B * N,).

    Of an empty part, whose largest score is -inf, nothing else is there.
    """
    row = tl.program_id(0)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, D)
    sink = tl.load(sinks_ptr + tl.load(sinks_layer_ptr) * N + row % N).to(tl.float32)
    largest = tl.load(largest_ptr + row * SPLITS + splits)
    whole = tl.maximum(tl.max(largest, axis=0), sink)
    weight = tl.exp(largest - whole)
    totals = total_ptr + row * SPLITS + splits
    parts = partial_ptr + (row * SPLITS + splits)[:, None] * D + dims[None, :]
    if position_ptr is None:
        total = tl.sum(weight * tl.load(totals), axis=0) + tl.exp(sink - whole)
        out = tl.sum(tl.load(parts) * weight[:, None], axis=0) / total
    else:
        there = largest != float("-inf")
        total = tl.sum(weight * tl.load(totals, mask=there, other=0.0), axis=0) + tl.exp(sink - whole)
        out = tl.sum(tl.load(parts, mask=there[:, None], other=0.0) * weight[:, None], axis=0) / total
        out = tl.where(tl.load(position_ptr + row // N) < 0, 0.0, out)
    tl.store(out_ptr + row * D + dims, out.to(out_ptr.dtype.element_ty))


@dataclasses.dataclass(frozen=True)
class CachedAttentionProblem:
    """Attention of one token of each sequence to a layer's cache."""

    rows: int  # sequences
    heads: int
    key_heads: int
    slots: int
    head_dim: int


def plan_cached_attention(problem: CachedAttentionProblem, tile: CachedAttentionTile) -> list[Plan]:
    """attended [B, N, D] and the cache with the latest token, from heads, cosine, sine, cache, layer [1], position [B],
    and sinks of several layers, of which sinks_layer [1] says the one.
    """
    p = problem
    wanted = min(cdiv(tile.programs, p.rows * p.key_heads), cdiv(p.slots, 2 * tile.block_s))
    return in_parts(
        Plan(
            kernel=cached_attention_kernel,
            grid=(p.rows * p.key_heads,),
            operands={f"{name}_ptr": name for name in ("heads", "cosine", "sine", "cache", "layer", "position")},
            outputs={},
            updates=("cache_ptr",),
            constexprs={
                "N": p.heads,
                "D": p.head_dim,
                "BATCH": p.rows,
                "M": p.key_heads,
                "S": p.slots,
                "SCALE": p.head_dim**-0.5,
                "BLOCK_S": tile.block_s,
                "BLOCK_G": max(16, next_power_of_2(p.heads // p.key_heads)),
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            flops=4 * p.rows * p.heads * p.slots * p.head_dim,
            bytes_accessed=4 * p.rows * p.key_heads * p.slots * p.head_dim,
        ),
        AttendedShape(p.rows, p.heads, p.head_dim),
        wanted,
        tile,
    )


class AttendedShape(NamedTuple):
    """Of one query's result for each sequence."""

    rows: int
    heads: int
    head_dim: int


def in_parts(
    attention: Plan, shape: AttendedShape, wanted: int, tile: CachedAttentionTile, *, empty: str | None = None
) -> list[Plan]:
    """The launches of attention by at least `wanted` parts, a power of two: its own, and with several parts their mean.

    Args:
      attention: without SPLITS, the grid's last axis, sinks and outputs.
      empty: the buffer whose negative rows are without a sequence; None: there are none, and no empty parts.
    """
    splits = next_power_of_2(max(wanted, 1))
    attended = {"out_ptr": Buffer("attended", tuple(shape), "bfloat16")}
    sinks = {"sinks_ptr": "sinks", "sinks_layer_ptr": "sinks_layer"}
    by_head = (shape.rows, shape.heads, splits)
    parts = {
        "partial_ptr": Buffer("attention_partial", (*by_head, shape.head_dim), "float32"),
        "largest_ptr": Buffer("attention_largest", by_head, "float32"),
        "total_ptr": Buffer("attention_total", by_head, "float32"),
    }
    outputs, absent = (attended, parts) if splits == 1 else (parts, {**attended, **sinks})
    whole = dataclasses.replace(
        attention,
        grid=(*attention.grid, splits),
        operands={**attention.operands, **sinks, **dict.fromkeys(absent)},
        outputs=outputs,
        constexprs={**attention.constexprs, "SPLITS": splits},
    )
    if splits == 1:
        return [whole]
    merge = Plan(
        kernel=merge_attention_kernel,
        grid=(shape.rows * shape.heads,),
        operands={**{parameter: part.name for parameter, part in parts.items()}, "position_ptr": empty, **sinks},
        outputs=attended,
        constexprs={"N": shape.heads, "D": shape.head_dim, "SPLITS": splits},
        num_warps=tile.merge_num_warps,
        num_stages=tile.merge_num_stages,
        flops=3 * shape.rows * shape.heads * splits * shape.head_dim,
        bytes_accessed=4 * shape.rows * shape.heads * splits * shape.head_dim,
    )
    return [whole, merge]
