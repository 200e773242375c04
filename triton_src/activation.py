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


@triton.jit
def keep_clamped(gate, up, LIMIT: tl.constexpr):
    """(gate, up) that bfloat16 rounds to the side of the limit that they are on, so that their gradient stays zero."""
    BEYOND: tl.constexpr = LIMIT * (1 + 2**-7)
    gate = tl.where(gate > LIMIT, tl.maximum(gate, BEYOND), gate)
    up = tl.where(up > LIMIT, tl.maximum(up, BEYOND), up)
    return gate, tl.where(up < -LIMIT, tl.minimum(up, -BEYOND), up)
