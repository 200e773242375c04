from typing import NamedTuple

from jaxtyping import Array, Float, Int32


class Batch(NamedTuple):
    tokens: Int32[Array, "... T"]
    targets: Int32[Array, "... T"]
    weights: Float[Array, "... T"]
    segment_ids: Int32[Array, "... T"]
