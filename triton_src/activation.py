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
