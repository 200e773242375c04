"""Weights of several layers in one array, read in place: which of them a launch takes is a number in memory."""

from typing import NamedTuple

import triton
import triton.language as tl


class Stacked(NamedTuple):
    """Which arrays have a leading axis for layers, of which the buffer "layer" chooses one."""

    weights: bool = False  # the experts' weights and biases
    lora: bool = False

    @property
    def weights_operand(self) -> dict[str, str | None]:
        """The operand of a launch that reads weights or biases."""
        return {"layer_ptr": "layer" if self.weights else None}

    @property
    def lora_operand(self) -> dict[str, str | None]:
        """The operand of a launch that reads LoRA."""
        return {"lora_layer_ptr": "layer" if self.lora else None}


ONE_LAYER = Stacked()


@triton.jit
def in_stack(index, layer_ptr, SIZE: tl.constexpr):
    """An index into one layer's SIZE as one into all layers'; layer_ptr (1,) int32, or None: there is one layer."""
    if layer_ptr is not None:
        index += tl.load(layer_ptr) * SIZE
    return index
