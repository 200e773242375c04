"""What the experts apply between their two products, as a value: references, plans and kernels are given the same one.

The standard library alone, so that a program without Triton has it too; on tiles it is in activation_tile.py.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """gate * sigmoid(alpha * gate) * (up + offset), gate clamped above by limit and up on both sides; gpt-oss's.

    Hashable, and static: another value is another program. NaN passes through the clamps.

    Attributes:
      alpha: of the sigmoid; finite.
      limit: of the clamps, at least 0; None or infinity: there are none. Where a clamp holds a value, its gradient is
        zero.
      offset: of up; finite.
      interleaved: gate and up alternate in gate_up's 2I rows, gate first; else all of gate come first, then all of up.
        Packed weights are interleaved.

    Raises:
      ValueError: a number outside of these.
    """

    alpha: float = 1.702
    limit: float | None = 7.0
    offset: float = 1.0
    interleaved: bool = True

    def __post_init__(self) -> None:
        for name in ("alpha", "offset"):
            object.__setattr__(self, name, float(getattr(self, name)))
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if self.limit is not None:
            if not self.limit >= 0:
                raise ValueError(f"limit must be at least 0, or None, got {self.limit}")
            # Equal activations are equal values, and one program.
            object.__setattr__(self, "limit", None if math.isinf(self.limit) else float(self.limit))
        object.__setattr__(self, "interleaved", bool(self.interleaved))


def SiluAndMul(*, interleaved: bool = True) -> SwiGLU:
    """silu(gate) * up, of most other models: SwiGLU without clamps or offset. interleaved: as in SwiGLU."""
    return SwiGLU(alpha=1.0, limit=None, offset=0.0, interleaved=interleaved)


def check_activation(activation: object, packed: bool) -> None:
    """Raises ValueError unless it is a SwiGLU, which the experts' weights, packed or not, have the order for."""
    if not isinstance(activation, SwiGLU):
        raise ValueError(f"activation must be a jmoe.SwiGLU, got {activation!r}")
    if packed and not activation.interleaved:
        raise ValueError(
            f"activation must have interleaved=True with packed experts, in which gate and up alternate, got "
            f"{activation}: pack halves by jmoe.pack(experts, interleaved=False), or leave the experts unpacked"
        )
