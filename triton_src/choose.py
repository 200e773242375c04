"""Which experts a block of rows uses: the top k of its logits, or the expert given for each row.

A block is a cube (STRIPS, ROWS, columns): row s * ROWS + r of the block lies at [s, r]. Every product of the cube keeps
its layout, so that the few values a token needs never cross the threads that hold its logits.
"""

import triton
import triton.language as tl


@triton.jit
def sort_keys(logits, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOP_K: tl.constexpr):
    """(keys, least): integers in the order of choice, no two of a row equal, all at least least + TOP_K.

    A key holds the bits of the logit, put in integers' order, above 16 bits for the expert: equal logits (-0 and 0 are
    equal) go to the lower expert. NaN counts as infinity. Two bytes of logit take a key of four, four one of eight.
    """
    expert = tl.arange(0, EXPERTS_PADDED)[None, None, :]
    value = logits.to(tl.float32)
    value = tl.where(value != value, float("inf"), tl.where(value == 0, 0.0, value))
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last_first = EXPERTS_PADDED - 1 - expert
    if logits.dtype == tl.bfloat16:
        least: tl.constexpr = -(2**31)
        keys = (ordered & -65536) | last_first
    else:
        least: tl.constexpr = -(2**63)
        keys = (ordered.to(tl.int64) << 32) | last_first
    return tl.where(expert < EXPERTS, keys, least + TOP_K), least


@triton.jit
def expert_of(key, EXPERTS_PADDED: tl.constexpr):
    """The expert in a key of sort_keys."""
    return EXPERTS_PADDED - 1 - (key & 0xFFFF).to(tl.int32)


@triton.jit
def logit_of(key):
    """The logit in a key of sort_keys: infinity for NaN, which comes to the same weights."""
    if key.dtype == tl.int32:
        bits = (key ^ ((key >> 31) & 0x7FFFFFFF)) & -65536
    else:
        ordered = (key >> 32).to(tl.int32)
        bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def choose(
    logits_ptr,  # (T, COLUMNS) bf16 or float32
    experts_ptr,  # (T, k) int32, written
    weights_ptr,  # (T, k) float32, written
    token,  # (STRIPS, ROWS)
    tokens,
    COLUMNS: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """(STRIPS, ROWS, columns): as its how-manieth choice a token uses a column's expert, best first; -1 if it does not.

    Writes the experts, and the softmax over their logits, which is summed from the largest to the least and so has the
    same bits whatever the block's shape.
    """
    column = tl.arange(0, COLUMNS_PADDED)[None, None, :]
    token_ok = token < tokens
    logits = tl.load(
        logits_ptr + token.to(tl.int64)[:, :, None] * COLUMNS + column,
        mask=token_ok[:, :, None] & (column < COLUMNS),
        other=0.0,
    )
    keys, least = sort_keys(logits, COLUMNS, COLUMNS_PADDED, TOP_K)
    best = ()
    for j in tl.static_range(TOP_K):
        largest = tl.max(keys, axis=2)
        # What is taken becomes the number of its choice, below all that is not.
        keys = tl.where(keys == largest[:, :, None], least + j, keys)
        best = best + (largest,)  # noqa: RUF005
    total = tl.zeros_like(logit_of(best[0]))
    for j in tl.static_range(TOP_K):
        total += tl.exp(logit_of(best[j]) - logit_of(best[0]))
    experts = ()
    weights = ()
    for j in tl.static_range(TOP_K):
        experts = experts + (expert_of(best[j], COLUMNS_PADDED),)  # noqa: RUF005
        weights = weights + (tl.exp(logit_of(best[j]) - logit_of(best[0])) / total,)  # noqa: RUF005
    store_choices(experts_ptr, experts, token, token_ok, TOP_K)
    store_choices(weights_ptr, weights, token, token_ok, TOP_K)
    return tl.where(token_ok[:, :, None] & (keys < least + TOP_K), (keys & 0xFFFF).to(tl.int32), -1)


@triton.jit
def side_by_side(values, CHOICES: tl.constexpr):
    """(choices, (STRIPS, ROWS, choices)): numbers of the choices, padded to a power of two, and the tuple's values.

    One block instead of CHOICES, each of which would go through shared memory on its way into memory.
    """
    choice = tl.arange(0, triton.next_power_of_2(CHOICES))[None, None, :]
    block = values[0][:, :, None] + tl.zeros_like(choice).to(values[0].dtype)
    for j in tl.static_range(1, CHOICES):
        block = tl.where(choice == j, values[j][:, :, None], block)
    return choice, block


@triton.jit
def store_choices(out_ptr, values, row, row_ok, CHOICES: tl.constexpr):
    """out[row, j] = values[j] of a tuple of CHOICES blocks (STRIPS, ROWS)."""
    choice, block = side_by_side(values, CHOICES)
    tl.store(out_ptr + row[:, :, None] * CHOICES + choice, block, mask=row_ok[:, :, None] & (choice < CHOICES))


@triton.jit
def of_choices(values, choice, CHOICES: tl.constexpr):
    """(choices, (STRIPS, ROWS, choices)), as in side_by_side: values of the columns chosen, -1 where there is none.

    values, at least 0, and choice, as of chosen_columns: (STRIPS, ROWS, columns).
    """
    out = ()
    for j in tl.static_range(CHOICES):
        out = out + (tl.max(tl.where(choice == j, values, -1), axis=2),)  # noqa: RUF005
    return side_by_side(out, CHOICES)


@triton.jit
def chosen_columns(
    logits_ptr,  # (T, COLUMNS) bf16 or float32, or None: experts are given
    experts_ptr,  # (T, k) int32, written unless given
    weights_ptr,  # (T, k) float32, written; None where experts are given
    offset,  # first expert held here
    row,  # (STRIPS, ROWS): token, or pair where experts are given
    rows,
    COLUMNS: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """(STRIPS, ROWS, columns): as its how-manieth choice a row uses a column's expert; -1 where it does not.

    Columns are the router's experts, or those held here where experts are given; a row then is a pair, whose only
    choice is 0, as nothing keeps a given token's experts apart.
    """
    if logits_ptr is not None:
        choice = choose(logits_ptr, experts_ptr, weights_ptr, row, rows, COLUMNS, COLUMNS_PADDED, TOP_K)
    else:
        column = tl.arange(0, COLUMNS_PADDED)[None, None, :]
        expert = tl.load(experts_ptr + row, mask=row < rows, other=0) - offset
        chosen = (row < rows)[:, :, None] & (column < COLUMNS) & (expert[:, :, None] == column)
        choice = tl.where(chosen, 0, -1)
    return choice
