"""Attention of a chunk of prompts to pages of keys and values, after the chunk's own are put there."""

import dataclasses
import math

import triton
import triton.language as tl

from jmoe.triton_src.paged.pages import Pages
from jmoe.triton_src.plan import Buffer, Plan, cdiv, next_power_of_2
from jmoe.triton_src.tiles import PagedPrefillAttentionTile


@triton.jit
def rotated_heads(
    heads_ptr, cosine_ptr, sine_ptr, rows, rows_ok, heads, heads_ok, STRIDE: tl.constexpr, D: tl.constexpr
):
    """These heads of these rows, their halves turned against each other; rounded once; [rows, heads, D]."""
    dims = tl.arange(0, D)
    at = rows.to(tl.int64)
    entry = heads_ptr + (at * STRIDE)[:, None, None] + (heads * D)[None, :, None]
    ok = rows_ok[:, None, None] & heads_ok[None, :, None]
    own = tl.load(entry + dims[None, None, :], mask=ok, other=0.0)
    other = tl.load(entry + ((dims + D // 2) % D)[None, None, :], mask=ok, other=0.0)
    factor = (at * (D // 2))[:, None] + (dims % (D // 2))[None, :]
    cosine = tl.load(cosine_ptr + factor, mask=rows_ok[:, None], other=0.0).to(own.dtype).to(tl.float32)
    sine = tl.load(sine_ptr + factor, mask=rows_ok[:, None], other=0.0).to(own.dtype).to(tl.float32)
    sine = tl.where((dims < D // 2)[None, :], -sine, sine)
    return (own.to(tl.float32) * cosine[:, None, :] + other.to(tl.float32) * sine[:, None, :]).to(own.dtype)


@triton.jit
def write_pages_kernel(
    heads_ptr,  # (T, N + 2 M, D) bf16: q, k and v, not rotated
    cosine_ptr,  # (T, D / 2) float32
    sine_ptr,  # (T, D / 2) float32
    cache_ptr,  # (L, COUNT, M, PAGE, 2 D) bf16: written
    layer_ptr,  # (1,) int32
    offsets_ptr,  # (S + 1,) int32
    first_positions_ptr,  # (S,) int32
    pages_ptr,  # (S, P) int32
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    PAGE: tl.constexpr,
    P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
):
    """Keys, rotated, and values of BLOCK_T tokens, into their sequences' pages. Grid: (cdiv(T, BLOCK_T),)."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    sequences = tl.arange(0, BLOCK_SEQUENCES)
    ends = tl.load(offsets_ptr + 1 + sequences, mask=sequences < S, other=T)
    over = (rows[:, None] >= ends[None, :]) & (sequences < S)[None, :]
    owner = tl.sum(over.to(tl.int32), axis=1)
    ok = (owner < S) & (rows < T)
    begin = tl.load(offsets_ptr + owner, mask=ok, other=0)
    position = tl.load(first_positions_ptr + owner, mask=ok, other=0) + rows - begin
    page = tl.load(pages_ptr + owner * P + position // PAGE % P, mask=ok, other=0)
    dims = tl.arange(0, D)
    heads = tl.arange(0, BLOCK_M)
    heads_ok = heads < M
    keys = rotated_heads(heads_ptr, cosine_ptr, sine_ptr, rows, ok, N + heads, heads_ok, (N + 2 * M) * D, D)
    given = (rows.to(tl.int64) * ((N + 2 * M) * D))[:, None] + ((N + M + heads) * D)[None, :]
    both_ok = (ok[:, None] & heads_ok[None, :])[:, :, None]
    values = tl.load(heads_ptr + given[:, :, None] + dims[None, None, :], mask=both_ok, other=0.0)
    place = (tl.load(layer_ptr).to(tl.int64) * COUNT + page) * (M * PAGE) + position % PAGE
    at = (place[:, None] + (heads * PAGE)[None, :]) * (2 * D)
    written = cache_ptr + at[:, :, None] + dims[None, None, :]
    tl.store(written, keys, mask=both_ok)
    tl.store(written + D, values, mask=both_ok)


@triton.jit
def paged_prefill_attention_kernel(
    heads_ptr,  # (T, N + 2 M, D) bf16: q, k and v, not rotated
    cosine_ptr,  # (T, D / 2) float32
    sine_ptr,  # (T, D / 2) float32
    cache_ptr,  # (L, COUNT, M, PAGE, 2 D) bf16: a key and its value behind it, the chunk's among them
    layer_ptr,  # (1,) int32
    offsets_ptr,  # (S + 1,) int32: sequence s has the rows from offsets[s] to offsets[s + 1]
    first_positions_ptr,  # (S,) int32, of a sequence's first row
    pages_ptr,  # (S, P) int32: token p's page stands in column p // PAGE % P
    sinks_ptr,  # (layers, N) bf16 or float32
    sinks_layer_ptr,  # (1,) int32
    out_ptr,  # (T, N, D) bf16: zeros from offsets[S] on
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    PAGE: tl.constexpr,
    P: tl.constexpr,
    WINDOW: tl.constexpr,  # keys that a query sees, its own among them; 0: all
    SCALE: tl.constexpr,  # of scores as powers of two: D^-0.5 log2(e)
    LOG2E: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,  # divides PAGE
    BLOCK_SEQUENCES: tl.constexpr,
):
    """BLOCK_Q queries of one sequence, in those of their heads that share a key head. Grid: (BLOCKS * M,).

    Blocks are numbered so that no two sequences share one: a sequence's first is offsets[s] // BLOCK_Q + s. The rows
    behind the last sequence are one more, which sees no key. The last blocks, which see most, come first.
    """
    GROUP: tl.constexpr = N // M
    ROWS: tl.constexpr = BLOCK_Q * BLOCK_G
    head = tl.program_id(0) % M
    number = BLOCKS - 1 - tl.program_id(0) // M
    sequences = tl.arange(0, BLOCK_SEQUENCES)
    begins = tl.load(offsets_ptr + sequences, mask=sequences <= S, other=T)
    reached = (sequences <= S) & (begins // BLOCK_Q + sequences <= number)
    sequence = tl.sum(reached.to(tl.int32), axis=0) - 1
    begin = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1, mask=sequence < S, other=T)
    row = begin + (number - begin // BLOCK_Q - sequence) * BLOCK_Q
    if row >= end:
        return
    count = tl.minimum(end - row, BLOCK_Q)
    first = tl.load(first_positions_ptr + sequence, mask=sequence < S, other=0) + row - begin
    last = first + count - 1
    keys_end = tl.where(sequence < S, last + 1, 0)
    oldest = tl.maximum(first - (WINDOW - 1), 0) if WINDOW > 0 else 0
    lowest, stop = oldest // BLOCK_S, tl.cdiv(keys_end, BLOCK_S)
    table = pages_ptr + sequence * P
    page = tl.load(table + lowest * BLOCK_S // PAGE % P, mask=lowest < stop, other=0)
    queries = tl.arange(0, BLOCK_Q)
    group = tl.arange(0, BLOCK_G)
    q = rotated_heads(
        heads_ptr,
        cosine_ptr,
        sine_ptr,
        row + queries,
        queries < count,
        head * GROUP + group,
        group < GROUP,
        (N + 2 * M) * D,
        D,
    ).reshape(ROWS, D)
    rows = tl.arange(0, ROWS)
    query = rows // BLOCK_G
    position = first + tl.minimum(query, count - 1)
    in_group = rows % BLOCK_G
    sinks = sinks_ptr + tl.load(sinks_layer_ptr) * N + head * GROUP + in_group
    sink = tl.load(sinks, mask=in_group < GROUP, other=0.0).to(tl.float32) * LOG2E
    # The sink is a key without value. One of -inf is as good as very low: what is added to it is seen to be finite.
    largest = tl.where(sink == float("-inf"), -1e30, sink)
    total = tl.full((ROWS,), 1.0, tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    dims = tl.arange(0, D)
    slots = tl.arange(0, BLOCK_S)
    layer = tl.load(layer_ptr).to(tl.int64) * COUNT
    whole = (first + 1) // BLOCK_S  # blocks before it all queries see, but for a window
    for block in range(lowest, stop):
        start = block * BLOCK_S
        at = ((layer + page) * M + head) * PAGE + start % PAGE
        entry = cache_ptr + at * (2 * D) + (slots[:, None] * (2 * D) + dims[None, :])
        keys = tl.load(entry)
        # What is not seen may be NaN, and as a value that reaches even a weight of zero.
        held = (start + slots >= oldest) & (start + slots < keys_end)
        values = tl.load(entry + D, mask=held[:, None], other=0.0)
        page = tl.load(table + (start + BLOCK_S) // PAGE % P, mask=block + 1 < stop, other=0)
        scores = tl.dot(q, keys.T)
        partly = block >= whole
        if WINDOW > 0:
            partly |= start + WINDOW <= last
        if partly:
            seen = (start + slots)[None, :] <= position[:, None]
            if WINDOW > 0:
                seen &= (start + slots)[None, :] > position[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1) * SCALE)
        weights = tl.exp2(scores * SCALE - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None])
        largest = new_largest
    mean = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    out = out_ptr + (row.to(tl.int64) * N + head * GROUP) * D
    out_ok = (query < count) & (in_group < GROUP)
    tl.store(out + ((query * N + in_group) * D)[:, None] + dims[None, :], mean, mask=out_ok[:, None])


@dataclasses.dataclass(frozen=True)
class PagedPrefillAttentionProblem:
    """Attention of tokens of several sequences to a layer's pages."""

    rows: int  # tokens
    sequences: int
    heads: int
    head_dim: int
    pages: Pages
    window: int | None


def plan_paged_prefill_attention(problem: PagedPrefillAttentionProblem, tile: PagedPrefillAttentionTile) -> list[Plan]:
    """attended [T, N, D] and the cache with the tokens, from heads, cosine, sine, cache, layer [1], offsets [S + 1],
    first_positions [S], pages [S, P], and sinks of several layers, of which sinks_layer [1] says the one.
    """
    p = problem
    key_heads = p.pages.key_heads
    block_g = next_power_of_2(p.heads // key_heads)
    block_q = cdiv(max(tile.block_m, 16), block_g)
    blocks = cdiv(p.rows, block_q) + p.sequences
    keys = p.pages.most_keys(p.window)
    names = ("heads", "cosine", "sine", "cache", "layer", "offsets", "first_positions", "pages")
    sizes = {
        **p.pages.constexprs(),
        "T": p.rows,
        "S": p.sequences,
        "N": p.heads,
        "D": p.head_dim,
        "BLOCK_SEQUENCES": next_power_of_2(p.sequences + 1),
    }
    token_bytes = 2 * key_heads * p.head_dim * 2
    write = Plan(
        kernel=write_pages_kernel,
        grid=(cdiv(p.rows, tile.block_t),),
        operands={f"{name}_ptr": name for name in names},
        outputs={},
        updates=("cache_ptr",),
        constexprs={**sizes, "BLOCK_T": tile.block_t, "BLOCK_M": next_power_of_2(key_heads)},
        num_warps=tile.write_num_warps,
        bytes_accessed=2 * p.rows * token_bytes,
    )
    attention = Plan(
        kernel=paged_prefill_attention_kernel,
        grid=(blocks * key_heads,),
        operands={f"{name}_ptr": name for name in (*names, "sinks", "sinks_layer")},
        outputs={"out_ptr": Buffer("attended", (p.rows, p.heads, p.head_dim), "bfloat16")},
        constexprs={
            **sizes,
            "WINDOW": p.window or 0,
            "SCALE": p.head_dim**-0.5 * math.log2(math.e),
            "LOG2E": math.log2(math.e),
            "BLOCKS": blocks,
            "BLOCK_Q": block_q,
            "BLOCK_G": block_g,
            "BLOCK_S": min(tile.block_s, p.pages.page_size),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        flops=4 * p.rows * p.heads * min(p.rows, keys) * p.head_dim,
        bytes_accessed=p.rows * (4 * p.heads * p.head_dim + token_bytes),
    )
    return [write, attention]
