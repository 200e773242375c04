"""gpt-oss's clamped SwiGLU on tiles."""

import triton
import triton.language as tl


@triton.jit
def swiglu_tile(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """gate * sigmoid(ALPHA * gate) * (up + 1), gate clamped above and up on both sides, in float32.

    NaN passes through the clamps, as it does in jax.numpy and torch.
    """
    gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate * tl.sigmoid(ALPHA * gate) * (up + 1)


@triton.constexpr_function
def bfloat16_below(limit: float) -> float:
    """The largest bfloat16 of at most limit: its eight bits from the highest on. A limit of 0 or infinity itself."""
    if not 0 < limit < float("inf"):
        return limit
    unit = 1.0
    while limit >= 256 * unit:
        unit *= 2
    while limit < 128 * unit:
        unit /= 2
    return int(limit / unit) * unit


@triton.jit
def keep_clamped(gate, up, LIMIT: tl.constexpr):
    """(gate, up) that bfloat16 rounds to the side of the limit that they are on, as those beyond have no gradient."""
    BELOW: tl.constexpr = bfloat16_below(LIMIT)
    BEYOND: tl.constexpr = LIMIT * (1 + 2**-7)
    if BELOW != LIMIT:
        gate = tl.where((gate > BELOW) & (gate <= LIMIT), BELOW, gate)
        up = tl.where((up > BELOW) & (up <= LIMIT), BELOW, up)
        up = tl.where((up < -BELOW) & (up >= -LIMIT), -BELOW, up)
    gate = tl.where(gate > LIMIT, tl.maximum(gate, BEYOND), gate)
    up = tl.where(up > LIMIT, tl.maximum(up, BEYOND), up)
    return gate, tl.where(up < -LIMIT, tl.minimum(up, -BEYOND), up)
