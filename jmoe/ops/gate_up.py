"""The order of gate and up in gate_up's rows: halves, as most checkpoints have them, made to alternate."""

import dataclasses
from typing import Any, overload

import jax
import jax.numpy as jnp

from jmoe.ops.experts import Experts, Lora


@overload
def interleave(weights: Experts) -> Experts: ...


@overload
def interleave(weights: Lora) -> Lora: ...


def interleave(weights: Experts | Lora) -> Experts | Lora:
    """The same experts or LoRA with gate and up alternating in gate_up's rows, gate first, of all gate before all up.

    That is the order of `interleaved=True` in jmoe.SwiGLU, which packed experts have. To be done once, before jmoe.pack
    or by it. Arrays of numpy stay numpy's. LoRA may have a leading axis for layers, the experts not.

    Raises:
      ValueError: gate_up has an odd number of rows, or is packed.
    """
    if isinstance(weights, Lora):
        b = weights.gate_up_b
        return weights if b is None else dataclasses.replace(weights, gate_up_b=_alternate(b, b.ndim - 2))
    gate_up, bias = weights.gate_up, weights.gate_up_bias
    if hasattr(gate_up, "words"):
        raise ValueError(
            "experts.gate_up must not be packed, in which gate and up alternate: interleave before packing"
        )
    gate_up = jax.tree.map(lambda part: _alternate(part, 1), gate_up)
    return dataclasses.replace(weights, gate_up=gate_up, gate_up_bias=None if bias is None else _alternate(bias, 1))


def _alternate(array: Any, axis: int) -> Any:
    """The array with its two halves along this axis alternating."""
    rows = array.shape[axis]
    if rows % 2:
        raise ValueError(f"gate_up must have an even number of rows 2I, got shape {jnp.shape(array)}")
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    return array.reshape(*before, 2, rows // 2, *after).swapaxes(axis, axis + 1).reshape(array.shape)
