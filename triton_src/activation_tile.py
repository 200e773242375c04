"""The activation and its gradient on tiles, in float32, and where its gate and up stand in gate_up's rows.

ACTIVATION is a jmoe.triton_src.activation.SwiGLU, the value itself; what it does without costs no instruction.
"""

import triton
import triton.language as tl


@triton.jit
def clamp(gate, up, ACTIVATION: tl.constexpr):
    """gate at most the limit, and up within it. NaN passes through, as it does in jax.numpy and torch."""
    if ACTIVATION.limit is not None:
        gate = tl.minimum(gate, ACTIVATION.limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -ACTIVATION.limit, ACTIVATION.limit, propagate_nan=tl.PropagateNan.ALL)
    return gate, up


@triton.jit
def add_offset(up, ACTIVATION: tl.constexpr):
    """up + offset."""
    return up + ACTIVATION.offset if ACTIVATION.offset != 0 else up


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr):
    """gate * sigmoid(alpha * gate) * (up + offset), after the clamps."""
    gate, up = clamp(gate, up, ACTIVATION)
    return gate * tl.sigmoid(ACTIVATION.alpha * gate) * add_offset(up, ACTIVATION)


@triton.jit
def activate_backward(gate, up, dh, ACTIVATION: tl.constexpr):
    """(dgate, dup) of activate for its result's gradient dh. Where a clamp holds a value, its gradient is zero."""
    clamped_gate, clamped_up = clamp(gate, up, ACTIVATION)
    sigmoid = tl.sigmoid(ACTIVATION.alpha * clamped_gate)
    swish = clamped_gate * sigmoid
    dgate = dh * add_offset(clamped_up, ACTIVATION) * (sigmoid + ACTIVATION.alpha * swish * (1 - sigmoid))
    if ACTIVATION.limit is None:
        dup = dh * swish
    else:
        dgate = tl.where(gate <= ACTIVATION.limit, dgate, 0.0)
        dup = tl.where((up >= -ACTIVATION.limit) & (up <= ACTIVATION.limit), dh * swish, 0.0)
    return dgate, dup


@triton.constexpr_function
def bfloat16_below(limit: float) -> float:
    """The largest bfloat16 of at most limit: its eight bits from the highest on. A limit of 0 itself."""
    if limit == 0:
        return limit
    unit = 1.0
    while limit >= 256 * unit:
        unit *= 2
    while limit < 128 * unit:
        unit /= 2
    return int(limit / unit) * unit


@triton.jit
def keep_clamped(gate, up, ACTIVATION: tl.constexpr):
    """(gate, up) that bfloat16 rounds to the side of the limit that they are on, as those beyond have no gradient."""
    if ACTIVATION.limit is not None:
        LIMIT: tl.constexpr = ACTIVATION.limit
        BELOW: tl.constexpr = bfloat16_below(LIMIT)
        BEYOND: tl.constexpr = LIMIT * (1 + 2**-7)
        if BELOW != LIMIT:
            gate = tl.where((gate > BELOW) & (gate <= LIMIT), BELOW, gate)
            up = tl.where((up > BELOW) & (up <= LIMIT), BELOW, up)
            up = tl.where((up < -BELOW) & (up >= -LIMIT), -BELOW, up)
        gate = tl.where(gate > LIMIT, tl.maximum(gate, BEYOND), gate)
        up = tl.where(up > LIMIT, tl.maximum(up, BEYOND), up)
        up = tl.where(up < -LIMIT, tl.minimum(up, -BEYOND), up)
    return gate, up


@triton.jit
def gate_up_row(column, N: tl.constexpr, ACTIVATION: tl.constexpr):
    """The row of gate_up's N for a column of tiles, in which gate and up alternate."""
    if not ACTIVATION.interleaved:
        column = column % 2 * (N // 2) + column // 2
    return column
