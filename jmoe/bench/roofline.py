"""The least time a layer can take on a GPU: reading the weights it needs, or multiplying by them."""

import dataclasses

from jmoe.bench.case import Size

BYTES_PER_WEIGHT = 17 / 32
"""MXFP4: 32 weights in 16 bytes and one of scale."""


@dataclasses.dataclass(frozen=True)
class Roof:
    """What a GPU was measured to do."""

    bytes_per_second: float
    flops_per_second: float


ROOFS = {
    # Measured on that card: reading memory, and a bfloat16 product of 8192 x 8192 x 8192.
    "NVIDIA H100 80GB HBM3": Roof(bytes_per_second=3.10e12, flops_per_second=794e12),
}
"""By the device's name."""


def active_experts(experts: int, top_k: int, tokens: float) -> float:
    """How many experts `tokens` tokens are expected to use when each uses top_k random ones."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def roofline_microseconds(roof: Roof, size: Size, experts: int, tokens: float) -> float:
    """The larger of the time to read the active experts' weights once and the time for all products."""
    weights = 3 * size.hidden * size.intermediate
    reading = active_experts(experts, size.top_k, tokens) * weights * BYTES_PER_WEIGHT / roof.bytes_per_second
    computing = 2 * tokens * size.top_k * weights / roof.flops_per_second
    return max(reading, computing) * 1e6
