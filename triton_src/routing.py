"""Routing: the choice of experts, and the order in which grouped products visit (token, expert) pairs.

choose: router logits -> experts and weights. count, then sort: experts -> order and tile table. Everything is integer
arithmetic on prefix counts, so the order is stable and two runs agree bit for bit.
"""

import triton
import triton.language as tl

from jmoe.triton_src.plan import Buffer, Plan, cdiv, next_power_of_2

SORT_BLOCK = 128
"""Pairs that one step of count and sort holds at once."""

MAX_SORT_PROGRAMS = 256
"""Every program of sort reads every program's counts, so their number is bounded and each takes more pairs instead."""


@triton.jit(do_not_specialize=["tokens"])
def choose_kernel(
    logits_ptr,  # (T, E) bf16 or float32
    experts_ptr,  # (T, k) int32
    weights_ptr,  # (T, k) float32
    tokens,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The k largest logits of each token, largest first, and the softmax over these k.

    Equal logits (-0 and 0 are equal) go to the lower expert; NaN counts as infinity, so that it is chosen and shows.
    Grid: (cdiv(T, BLOCK_T),).
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, EXPERTS_PADDED)
    choice = tl.arange(0, TOP_K_PADDED)
    real = (token < tokens)[:, None] & (expert < EXPERTS)[None, :]
    logits = tl.load(logits_ptr + token.to(tl.int64)[:, None] * EXPERTS + expert[None, :], mask=real, other=0.0)
    logits = logits.to(tl.float32)
    # Integers in the order of the floats, so that what is taken (the least integer) stays below a logit of -inf.
    comparable = tl.where(logits != logits, float("inf"), tl.where(logits == 0, 0.0, logits))
    bits = comparable.to(tl.int32, bitcast=True)
    taken: tl.constexpr = -(2**31)
    key = tl.where((expert < EXPERTS)[None, :], bits ^ ((bits >> 31) & 0x7FFFFFFF), taken)
    chosen = tl.zeros((BLOCK_T, TOP_K_PADDED), tl.int32)
    value = tl.full((BLOCK_T, TOP_K_PADDED), float("-inf"), tl.float32)
    for j in tl.static_range(TOP_K):
        largest = tl.max(key, axis=1)
        index = tl.min(tl.where(key == largest[:, None], expert[None, :], EXPERTS_PADDED), axis=1)
        here = expert[None, :] == index[:, None]
        logit = tl.sum(tl.where(here, logits, 0.0), axis=1)
        chosen = tl.where(choice[None, :] == j, index[:, None], chosen)
        value = tl.where(choice[None, :] == j, logit[:, None], value)
        key = tl.where(here, taken, key)
    weight = tl.exp(value - tl.max(value, axis=1)[:, None])
    weight = tl.where((choice < TOP_K)[None, :], weight, 0.0)
    weight = weight / tl.sum(weight, axis=1)[:, None]
    out = token[:, None] * TOP_K + choice[None, :]
    out_ok = (token < tokens)[:, None] & (choice < TOP_K)[None, :]
    tl.store(experts_ptr + out, chosen, mask=out_ok)
    tl.store(weights_ptr + out, weight, mask=out_ok)


@triton.jit
def held_experts(experts_ptr, expert_offset_ptr, pair, pairs, EXPERTS: tl.constexpr):
    """(expert, held): each pair's expert among those held here, and whether it is one of them."""
    expert = tl.load(experts_ptr + pair, mask=pair < pairs, other=-1)
    if expert_offset_ptr is not None:
        expert -= tl.load(expert_offset_ptr)
    return expert, (pair < pairs) & (expert >= 0) & (expert < EXPERTS)


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(
    experts_ptr,  # (P,) int32
    expert_offset_ptr,  # (1,) int32, or None
    counts_ptr,  # (programs, E) int32
    pairs,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """counts[i, e] = pairs of expert e in the i-th run of STEPS * BLOCK_P pairs. Grid: (programs,)."""
    program = tl.program_id(0)
    bins = tl.arange(0, EXPERTS_PADDED)
    counts = tl.zeros((EXPERTS_PADDED,), tl.int32)
    for step in range(STEPS):
        pair = (program * STEPS + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        expert, held = held_experts(experts_ptr, expert_offset_ptr, pair, pairs, EXPERTS)
        counts += tl.histogram(tl.where(held, expert, 0), EXPERTS_PADDED, mask=held)
    tl.store(counts_ptr + program * EXPERTS + bins, counts, mask=bins < EXPERTS)


@triton.jit(do_not_specialize=["pairs", "programs", "slots"])
def sort_kernel(
    experts_ptr,  # (P,) int32
    expert_offset_ptr,  # (1,) int32, or None
    counts_ptr,  # (programs, E) int32
    order_ptr,  # (P,) int32: position -> pair; positions past the held pairs are not written
    tiles_ptr,  # (slots, 3) int32: expert, first position, end of the expert's positions; expert -1 where unused
    pairs,
    programs,
    slots,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Positions of the pairs, sorted by expert and stable, and the tiles of BLOCK_M positions of one expert each.

    Grid: (programs,), as in count.
    """
    program = tl.program_id(0)
    bins = tl.arange(0, EXPERTS_PADDED)
    lane = tl.arange(0, BLOCK_P)
    total = tl.zeros((EXPERTS_PADDED,), tl.int32)
    before = tl.zeros((EXPERTS_PADDED,), tl.int32)
    run = tl.arange(0, 16)
    for start in range(0, programs, 16):
        counts = tl.load(
            counts_ptr + (start + run)[:, None] * EXPERTS + bins[None, :],
            mask=(start + run < programs)[:, None] & (bins < EXPERTS)[None, :],
            other=0,
        )
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((start + run < program)[:, None], counts, 0), axis=0)
    begin = tl.cumsum(total, axis=0) - total

    next_position = begin + before
    for step in range(STEPS):
        pair = (program * STEPS + step) * BLOCK_P + lane
        expert, held = held_experts(experts_ptr, expert_offset_ptr, pair, pairs, EXPERTS)
        bin_ = tl.where(held, expert, 0)
        same = tl.where(held, expert, -1)
        earlier = (same[None, :] == same[:, None]) & (lane[None, :] < lane[:, None])
        position = tl.gather(next_position, bin_, axis=0) + tl.sum(earlier.to(tl.int32), axis=1)
        tl.store(order_ptr + position, pair, mask=held)
        next_position += tl.histogram(bin_, EXPERTS_PADDED, mask=held)

    tiles = (total + BLOCK_M - 1) // BLOCK_M
    tiles_end = tl.cumsum(tiles, axis=0)
    for start in range(program * BLOCK_P, slots, programs * BLOCK_P):
        slot = start + lane
        owner = tl.sum((tiles_end[None, :] <= slot[:, None]).to(tl.int32), axis=1)
        used = owner < EXPERTS_PADDED
        owner = tl.where(used, owner, 0)
        owner_begin = tl.gather(begin, owner, axis=0)
        tile_in_owner = slot - tl.gather(tiles_end - tiles, owner, axis=0)
        tl.store(tiles_ptr + slot * 3, tl.where(used, owner, -1), mask=slot < slots)
        tl.store(tiles_ptr + slot * 3 + 1, owner_begin + tile_in_owner * BLOCK_M, mask=slot < slots)
        tl.store(tiles_ptr + slot * 3 + 2, owner_begin + tl.gather(total, owner, axis=0), mask=slot < slots)


def padded_experts(experts: int) -> int:
    """Bins of the kernels' histograms and reductions: a power of two, at least 16."""
    return max(16, next_power_of_2(experts))


def plan_choose(tokens: int, experts: int, top_k: int) -> Plan:
    """experts and weights [T, k] from router_logits [T, E]."""
    block_t = 16
    return Plan(
        kernel=choose_kernel,
        grid=(cdiv(tokens, block_t),),
        operands={"logits_ptr": "router_logits"},
        scalars={"tokens": tokens},
        outputs={
            "experts_ptr": Buffer("experts", (tokens, top_k), "int32"),
            "weights_ptr": Buffer("weights", (tokens, top_k), "float32"),
        },
        constexprs={
            "EXPERTS": experts,
            "EXPERTS_PADDED": padded_experts(experts),
            "TOP_K": top_k,
            "TOP_K_PADDED": max(2, next_power_of_2(top_k)),
            "BLOCK_T": block_t,
        },
        bytes_accessed=tokens * (4 * experts + 8 * top_k),
    )


def tile_slots(pairs: int, experts: int, block_m: int) -> int:
    """The most tiles of block_m rows that `pairs` rows of at most `experts` experts can need."""
    active = min(pairs, experts)
    return (pairs - active) // block_m + active


def plan_sort(*, pairs: int, experts: int, block_m: int, expert_offset: bool) -> tuple[Plan, Plan]:
    """count and sort: order [P] and tiles [slots, 3] from experts [T, k]."""
    steps = cdiv(pairs, SORT_BLOCK * MAX_SORT_PROGRAMS)
    programs = cdiv(pairs, SORT_BLOCK * steps)
    slots = tile_slots(pairs, experts, block_m)
    operands = {"experts_ptr": "experts", "expert_offset_ptr": "expert_offset" if expert_offset else None}
    constexprs = {
        "EXPERTS": experts,
        "EXPERTS_PADDED": padded_experts(experts),
        "STEPS": steps,
        "BLOCK_P": SORT_BLOCK,
    }
    count = Plan(
        kernel=count_kernel,
        grid=(programs,),
        operands=operands,
        scalars={"pairs": pairs},
        outputs={"counts_ptr": Buffer("counts", (programs, experts), "int32")},
        constexprs=constexprs,
        bytes_accessed=4 * (pairs + programs * experts),
    )
    sort = Plan(
        kernel=sort_kernel,
        grid=(programs,),
        operands={**operands, "counts_ptr": "counts"},
        scalars={"pairs": pairs, "programs": programs, "slots": slots},
        outputs={
            "order_ptr": Buffer("order", (pairs,), "int32"),
            "tiles_ptr": Buffer("tiles", (slots, 3), "int32"),
        },
        constexprs={**constexprs, "BLOCK_M": block_m},
        num_warps=8,
        bytes_accessed=4 * (2 * pairs + programs * programs * experts + 3 * slots),
    )
    return count, sort
