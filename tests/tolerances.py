"""How far a result may be off, and why."""

from typing import NamedTuple


class Tolerance(NamedTuple):
    """The largest ||y - exact|| / ||exact||, and why it is that."""

    relative: float
    why: str


BFLOAT16 = Tolerance(5e-3, "three roundings to 8 bits on the way (LoRA or activations, expert output, y), 2e-3 each")
FLOAT32 = Tolerance(1e-5, "float32 sums of K terms in another order than the reference's")
GRADIENT = Tolerance(1e-2, "twice as many roundings to 8 bits as y has: the forward pass's and the backward pass's")
OF_TORCH = 1.1
"""Times the error of PyTorch's own bf16 computation on the same inputs, where there are enough results to average."""
GRADIENT_OF_TORCH = 1.2
"""The same for gradients."""
