"""Which experts a block of rows uses: the top k of its logits, or the expert given for each row.

A block is a cube (STRIPS, ROWS, columns): row s * ROWS + r of the block lies at [s, r]. Every product of the cube keeps
its layout, so that the few values a token needs never cross the threads that hold its logits.

A token's choice of 2 of 6 experts, say:

    expert       0     1     2     3     4     5
    logits     0.5   2.0  -1.0   2.0   0.0   1.0
    keys       the logits' bits as integers in the logits' order, below them 15, 14, ...: the first 2.0 is larger
    choice      -1     0    -1     1    -1    -1     by column: the number of the token's choice, 0 the best
    used         1     3                             by choice: the column
    weights    0.5   0.5                             by choice: softmax over the chosen logits, or as SCORING has it

From `choice` the rows that chose a column are counted (sort_positions.py); through `used` a token finds its counts.
"""

import triton
import triton.language as tl

LEAST_SUM = tl.constexpr(1e-20)
"""What is added to a sum of scores that divides, as DeepSeek does: all of them may be zeros."""


@triton.jit
def scores_of(logits, columns_ok, SCORING: tl.constexpr):
    """The scores, float32 like and of logits (..., columns), of columns that there are."""
    logits = logits.to(tl.float32)
    if SCORING.function == "sigmoid":
        scores = tl.sigmoid(logits)
    else:
        logits = tl.where(columns_ok, logits, float("-inf"))
        powers = tl.exp(logits - tl.max(logits, axis=-1, keep_dims=True))
        scores = powers / tl.sum(powers, axis=-1, keep_dims=True)
    return scores


@triton.jit
def sort_keys(logits, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOP_K: tl.constexpr):
    """(keys, least): integers in the order of choice, no two experts' of a row equal, all at least least + TOP_K.

    A key holds the logit's magnitude as an integer of the logit's sign, above 16 bits for the expert: equal logits (-0
    and 0 are equal) go to the lower expert. NaN counts as infinity. Two bytes of logit take a key of four, four one of
    eight.
    """
    expert = tl.arange(0, EXPERTS_PADDED)[None, None, :]
    if logits.dtype == tl.bfloat16:
        bits = logits.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = logits.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    sign = bits >> 31
    INFINITY: tl.constexpr = 0x7F800000
    ordered = tl.where(magnitude > INFINITY, INFINITY, (magnitude ^ sign) - sign)
    last_first = EXPERTS_PADDED - 1 - expert
    if logits.dtype == tl.bfloat16:
        least: tl.constexpr = -(2**31)
        keys = ordered + last_first
    else:
        least: tl.constexpr = -(2**63)
        keys = (ordered.to(tl.int64) << 32) + last_first
    return tl.where(expert < EXPERTS, keys, least + TOP_K), least


@triton.jit
def expert_of(key, EXPERTS_PADDED: tl.constexpr):
    """The expert in a key of sort_keys."""
    return EXPERTS_PADDED - 1 - (key & 0xFFFF).to(tl.int32)


@triton.jit
def logit_of(key):
    """The logit in a key of sort_keys: infinity for NaN, which comes to the same weights."""
    ordered = key & -65536 if key.dtype == tl.int32 else (key >> 32).to(tl.int32)
    sign = ordered >> 31
    bits = ((ordered ^ sign) - sign) | (sign << 31)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def select_top_k(
    logits_ptr,  # (T, COLUMNS) bf16 or float32
    choice_bias_ptr,  # (COLUMNS,) bf16 or float32, or None
    experts_ptr,  # (T, k) int32, written
    weights_ptr,  # (T, k) float32, written
    token,  # (STRIPS, ROWS)
    tokens,
    COLUMNS: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,  # jmoe.triton_src.scoring.Scoring
):
    """(choice, experts) of tokens; writes the experts and their weights too.

    choice (STRIPS, ROWS, columns): the number of the choice that a column's expert is of the token, or -1.
    experts (STRIPS, ROWS, choices): the experts by choice, best first.
    Weights are summed from the best to the least, so that their softmax has the same bits whatever the block's
    shape.
    """
    column = tl.arange(0, COLUMNS_PADDED)[None, None, :]
    token_ok = token < tokens
    logits = tl.load(
        logits_ptr + token.to(tl.int64)[:, :, None] * COLUMNS + column,
        mask=token_ok[:, :, None] & (column < COLUMNS),
        other=0.0,
    )
    OF_CHOSEN: tl.constexpr = SCORING.of_chosen_logits and choice_bias_ptr is None
    if not OF_CHOSEN:
        scores = scores_of(logits, column < COLUMNS, SCORING)
    if choice_bias_ptr is None:
        keys, least = sort_keys(logits, COLUMNS, COLUMNS_PADDED, TOP_K)
    else:
        choice_bias = tl.load(choice_bias_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        keys, least = sort_keys(scores + choice_bias, COLUMNS, COLUMNS_PADDED, TOP_K)
    best = ()
    for j in tl.static_range(TOP_K):
        largest = tl.max(keys, axis=2)
        # What is taken becomes the number of its choice, below all that is not.
        keys = tl.where(keys == largest[:, :, None], least + j, keys)
        best = best + (largest,)  # noqa: RUF005
    total = tl.zeros_like(logit_of(best[0]))
    for j in tl.static_range(TOP_K):
        if OF_CHOSEN:
            total += tl.exp(logit_of(best[j]) - logit_of(best[0]))
        else:
            total += at_expert(scores, expert_of(best[j], COLUMNS_PADDED))
    experts = ()
    weights = ()
    for j in tl.static_range(TOP_K):
        experts = experts + (expert_of(best[j], COLUMNS_PADDED),)  # noqa: RUF005
        if OF_CHOSEN:
            weight = tl.exp(logit_of(best[j]) - logit_of(best[0])) / total
        else:
            weight = at_expert(scores, expert_of(best[j], COLUMNS_PADDED))
            if SCORING.renormalize:
                weight = weight / (total + LEAST_SUM)
        if SCORING.scale != 1:
            weight = weight * SCORING.scale
        weights = weights + (weight,)  # noqa: RUF005
    experts = side_by_side(experts, TOP_K)
    at = token[:, :, None] * TOP_K + choice_numbers(TOP_K)
    ok = token_ok[:, :, None] & (choice_numbers(TOP_K) < TOP_K)
    tl.store(experts_ptr + at, experts, mask=ok)
    tl.store(weights_ptr + at, side_by_side(weights, TOP_K), mask=ok)
    choice = tl.where(token_ok[:, :, None] & (keys < least + TOP_K), (keys & 0xFFFF).to(tl.int32), -1)
    return choice, experts


@triton.jit
def at_expert(scores, expert):
    """(STRIPS, ROWS): of scores (STRIPS, ROWS, columns), those of the rows' experts."""
    column = tl.arange(0, scores.shape[2])[None, None, :]
    return tl.sum(tl.where(column == expert[:, :, None], scores, 0.0), axis=2)


@triton.jit
def choice_numbers(CHOICES: tl.constexpr):
    """(1, 1, choices): the numbers of a row's choices, padded to a power of two."""
    return tl.arange(0, triton.next_power_of_2(CHOICES))[None, None, :]


@triton.jit
def side_by_side(values, CHOICES: tl.constexpr):
    """(STRIPS, ROWS, choices) of a tuple of CHOICES blocks (STRIPS, ROWS): one store of all, not one of each."""
    block = values[0][:, :, None] + tl.zeros_like(choice_numbers(CHOICES)).to(values[0].dtype)
    for j in tl.static_range(1, CHOICES):
        block = tl.where(choice_numbers(CHOICES) == j, values[j][:, :, None], block)
    return block


@triton.jit
def bytes_of_choices(values, choice, CHOICES: tl.constexpr):
    """(STRIPS, ROWS, choices): a row's values of the columns that it chose, from 0 to 255.

    values, and choice as of chosen_columns: (STRIPS, ROWS, columns). One sum over the columns gathers four choices:
    each value moves to the byte of its choice. With values 7 and 9 of the choices 1 and 0 the sum is 0x0709.
    """
    number = choice_numbers(CHOICES)
    block = tl.zeros_like(number)
    for first in tl.static_range(0, CHOICES, 4):
        mine = choice >= 0 if CHOICES <= 4 else (choice >= first) & (choice < first + 4)
        word = tl.sum(tl.where(mine, values << (choice & 3) * 8, 0), axis=2)
        block = tl.where(number // 4 == first // 4, (word[:, :, None] >> number % 4 * 8) & 0xFF, block)
    return block


@triton.jit
def chosen_columns(
    logits_ptr,  # (T, COLUMNS) bf16 or float32, or None: experts are given
    choice_bias_ptr,  # (COLUMNS,) bf16 or float32, or None
    experts_ptr,  # (T, k) int32, written unless given
    weights_ptr,  # (T, k) float32, written; None where experts are given
    offset,  # first expert of this shard
    row,  # (STRIPS, ROWS): token, or pair where experts are given
    rows,
    COLUMNS: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
):
    """(choice, used) of rows, as in this file's example.

    choice (STRIPS, ROWS, columns): the number of the choice that a column is of the row, or -1.
    used (STRIPS, ROWS, choices): the column by choice, best first.
    Columns are the router's experts, or those of this shard where experts are given. A row then is a pair, whose only
    choice is 0, as nothing keeps a given token's experts apart, and an expert of another shard has no column.
    """
    if logits_ptr is not None:
        choice, used = select_top_k(
            logits_ptr, choice_bias_ptr, experts_ptr, weights_ptr, row, rows, COLUMNS, COLUMNS_PADDED, TOP_K, SCORING
        )
    else:
        column = tl.arange(0, COLUMNS_PADDED)[None, None, :]
        used = (tl.load(experts_ptr + row, mask=row < rows, other=0) - offset)[:, :, None]
        choice = tl.where((row < rows)[:, :, None] & (column < COLUMNS) & (used == column), 0, -1)
    return choice, used


@triton.jit
def at_columns(values, used):
    """(STRIPS, ROWS, choices): values (columns,) of the columns used; any of them where that is not a column."""
    COLUMNS: tl.constexpr = values.shape[0]
    column = tl.reshape(used, (used.shape[0] * used.shape[1] * used.shape[2],))
    column = tl.where((column >= 0) & (column < COLUMNS), column, 0)
    return tl.reshape(tl.gather(values, column, axis=0), used.shape)


@triton.jit
def local_pairs(
    used,  # as of chosen_columns
    offset,  # first expert of this shard
    row,  # (STRIPS, ROWS), as in chosen_columns
    rows,
    GIVEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """(pair, local), both (STRIPS, ROWS, choices): the pair's number, and whether its expert is of this shard."""
    expert = used if GIVEN else used - offset
    local = (row < rows)[:, :, None] & (choice_numbers(CHOICES) < CHOICES) & (expert >= 0) & (expert < EXPERTS)
    return row[:, :, None] * CHOICES + choice_numbers(CHOICES), local
