"""Attention of one query a sequence to pages of keys and values, which are read and written in place."""

import dataclasses

import triton
import triton.language as tl

from jmoe.triton_src.decode.cached_attention import AttendedShape, in_parts, rotated
from jmoe.triton_src.paged.pages import Pages
from jmoe.triton_src.plan import Plan, cdiv, next_power_of_2
from jmoe.triton_src.tiles import PagedDecodeAttentionTile


@triton.jit
def paged_decode_attention_kernel(
    heads_ptr,  # (B, N + 2 M, D) bf16: q, k and v of the sequence's latest token, not rotated
    cosine_ptr,  # (B, D / 2) float32
    sine_ptr,  # (B, D / 2) float32
    cache_ptr,  # (L, COUNT, M, PAGE, 2 D) bf16: a key and its value behind it; the latest token's are written
    layer_ptr,  # (1,) int32
    position_ptr,  # (B,) int32, of the latest token; -1: there is no sequence
    pages_ptr,  # (B, P) int32: token p's page stands in column p // PAGE % P
    sinks_ptr,  # (layers, N) bf16 or float32; None with several splits
    sinks_layer_ptr,  # (1,) int32, or None
    out_ptr,  # (B, N, D) bf16, or None
    partial_ptr,  # (B, N, SPLITS, D) float32: sum of exp(score - largest) * value, if largest is not -inf; or None
    largest_ptr,  # (B, N, SPLITS) float32: the largest score, -inf of none; None with one split
    total_ptr,  # (B, N, SPLITS) float32: sum of exp(score - largest), if largest is not -inf; or None
    N: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    PAGE: tl.constexpr,
    P: tl.constexpr,
    WINDOW: tl.constexpr,  # keys that a query sees, its own among them; 0: all
    SCALE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,  # divides PAGE
    BLOCK_G: tl.constexpr,
):
    """Of the N / M query heads that share a key head, the parts over the keys seen, or with one split the mean.

    Grid: (B * M, SPLITS).

    The latest token's place is never read: the program in whose part it lies has the key and the value from `heads`,
    and writes them. Without a sequence nothing is written but zeros as the mean.
    """
    GROUP: tl.constexpr = N // M
    sequence = tl.program_id(0) // M
    head = tl.program_id(0) % M
    split = tl.program_id(1)
    group = tl.arange(0, BLOCK_G)
    group_ok = group < GROUP
    out = (sequence * N + head * GROUP + group) * SPLITS + split
    latest = tl.load(position_ptr + sequence)
    oldest = tl.maximum(latest - (WINDOW - 1), 0) if WINDOW > 0 else 0
    first, end = oldest // BLOCK_S, (latest + BLOCK_S) // BLOCK_S
    share = tl.cdiv(end - first, SPLITS)
    first += split * share
    end = tl.minimum(first + share, end)
    if SPLITS > 1:  # noqa: SIM102 (Triton would compile the other as well)
        if first >= end:
            tl.store(largest_ptr + out, tl.full((BLOCK_G,), float("-inf"), tl.float32), mask=group_ok)
            return
    table = pages_ptr + sequence * P
    page = tl.load(table + first * BLOCK_S // PAGE % P, mask=first < end, other=0)
    dims = tl.arange(0, D)
    heads = heads_ptr + sequence * (N + 2 * M) * D
    cosine, sine = cosine_ptr + sequence * (D // 2), sine_ptr + sequence * (D // 2)
    q = rotated(heads, (head * GROUP + group)[:, None] * D, group_ok[:, None], cosine, sine, D)
    layer = tl.load(layer_ptr).to(tl.int64) * COUNT
    largest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, D), tl.float32)
    if (latest >= first * BLOCK_S) & (latest < end * BLOCK_S):
        key = rotated(heads, (N + head) * D, dims < D, cosine, sine, D)
        value = tl.load(heads + (N + M + head) * D + dims)
        at = ((layer + tl.load(table + latest // PAGE % P)) * M + head) * PAGE + latest % PAGE
        tl.store(cache_ptr + at * (2 * D) + dims, key)
        tl.store(cache_ptr + at * (2 * D) + D + dims, value)
        largest = tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * SCALE
        total += 1.0
        acc += value.to(tl.float32)[None, :]
    for block in range(first, end):
        start = block * BLOCK_S
        slots = start + tl.arange(0, BLOCK_S)
        ok = (slots >= oldest) & (slots < latest)
        at = ((layer + page) * M + head) * PAGE + start % PAGE
        entry = cache_ptr + at * (2 * D) + (tl.arange(0, BLOCK_S)[:, None] * (2 * D) + dims[None, :])
        keys = tl.load(entry, mask=ok[:, None], other=0.0)
        values = tl.load(entry + D, mask=ok[:, None], other=0.0)
        # Ahead, so that the next keys do not wait for it.
        page = tl.load(table + (start + BLOCK_S) // PAGE % P, mask=block + 1 < end, other=0)
        scores = tl.where(ok[None, :], tl.dot(q, keys.T) * SCALE, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        # Of blocks without a key that is seen, as a window's first may be, nothing is added.
        safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(largest - safe)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None])
        largest = new_largest
    if SPLITS == 1:
        sinks = sinks_ptr + tl.load(sinks_layer_ptr) * N + head * GROUP + group
        sink = tl.load(sinks, mask=group_ok, other=0.0).to(tl.float32)
        whole = tl.maximum(largest, sink)
        weight = tl.exp(largest - whole)
        mean = acc * (weight / (total * weight + tl.exp(sink - whole)))[:, None]
        mean = tl.where(latest < 0, 0.0, mean)
        tl.store(out_ptr + out[:, None] * D + dims[None, :], mean.to(out_ptr.dtype.element_ty), mask=group_ok[:, None])
    else:
        tl.store(partial_ptr + out[:, None] * D + dims[None, :], acc, mask=group_ok[:, None])
        tl.store(largest_ptr + out, largest, mask=group_ok)
        tl.store(total_ptr + out, total, mask=group_ok)


@dataclasses.dataclass(frozen=True)
class PagedDecodeAttentionProblem:
    """Attention of one token of each sequence to a layer's pages."""

    rows: int  # sequences
    heads: int
    head_dim: int
    pages: Pages
    window: int | None


def plan_paged_decode_attention(problem: PagedDecodeAttentionProblem, tile: PagedDecodeAttentionTile) -> list[Plan]:
    """attended [B, N, D] and the cache with the latest token, from heads, cosine, sine, cache, layer [1], position [B],
    pages [B, P], and sinks of several layers, of which sinks_layer [1] says the one.

    How many parts a sequence's keys are split into follows from the sizes alone, so that one program serves every
    length; short sequences leave parts empty.
    """
    p = problem
    block_s = min(tile.block_s, p.pages.page_size)
    keys = p.pages.most_keys(p.window)
    key_heads = p.pages.key_heads
    wanted = min(cdiv(tile.programs, p.rows * key_heads), cdiv(keys, 2 * block_s))
    named = ("heads", "cosine", "sine", "cache", "layer", "position", "pages")
    return in_parts(
        Plan(
            kernel=paged_decode_attention_kernel,
            grid=(p.rows * key_heads,),
            operands={f"{name}_ptr": name for name in named},
            outputs={},
            updates=("cache_ptr",),
            constexprs={
                "N": p.heads,
                "D": p.head_dim,
                **p.pages.constexprs(),
                "WINDOW": p.window or 0,
                "SCALE": p.head_dim**-0.5,
                "BLOCK_S": block_s,
                "BLOCK_G": max(16, next_power_of_2(p.heads // key_heads)),
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            flops=4 * p.rows * p.heads * keys * p.head_dim,
            bytes_accessed=4 * p.rows * key_heads * keys * p.head_dim,
        ),
        AttendedShape(p.rows, p.heads, p.head_dim),
        wanted,
        tile,
        empty="position",
    )
