"""LoRA of many rows, each by its own adapter, on top of a dense product: by Triton on CUDA; by XLA elsewhere."""

from typing import NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.ops.launch.calls import register, triton_or_xla
from jmoe.ops.launch.lora import launch_lora_by_row
from jmoe.ops.row_adapters import by_present_adapter
from jmoe.ops.target import Target

lora_by_row_p = jex.core.Primitive("jmoe_lora_by_row")
"""Operands in the order of NAMES. Result: [T, N] like x."""

NAMES = ("x", "product", "bias", "adapter_ids", "layer", "a", "scale", "b")
"""The operands, as the plan names them."""

lora_by_row_p.def_abstract_eval(lambda x, product, *_, **__: x.update(shape=product.shape))


class StackedFactors(NamedTuple):
    """All layers' A, the scale of each rank, and B, of A adapters."""

    a: Float[Array, "L A R K"]
    scale: Float[Array, "L A R"]
    b: Float[Array, "L A N R"]


def lora_by_row(
    x: Float[Array, "T K"],
    product: Float[Array, "T N"],
    bias: Float[Array, " N"],
    adapter_ids: Int32[Array, " T"],
    layer: Int32[Array, ""],
    factors: StackedFactors,
    *,
    target: Target | None = None,
) -> Float[Array, "T N"]:
    """product + bias + LoRA of x by each row's adapter of that layer, summed in float32 and rounded once to x's dtype.

    It has no gradient. Rows of one adapter mostly follow each other, as those of a sequence do: then it takes as long
    as with one adapter, however many are loaded.

    Args:
      product: float32, of x and the weight.
      adapter_ids: -1 for none; rows of an adapter that does not exist are as those without.
      target: a GPU that may not be here, to lower for it; forces Triton.
    """
    operands = (x, product, bias, adapter_ids, layer.reshape(1), *factors)

    takes = all(array.dtype == jnp.bfloat16 for array in (x, bias, factors.a, factors.b))
    return triton_or_xla(lora_by_row_p, lora_by_row_by_xla, operands, target, takes=takes)


def lora_by_row_by_xla(
    x: Array, product: Array, bias: Array, adapter_ids: Array, layer: Array, a: Array, scale: Array, b: Array
) -> Float[Array, "T N"]:
    """lora_by_row by plain operations."""
    y = product + bias.astype(jnp.float32)

    def multiply(rows: Array, matrix: Array) -> Array:
        return jnp.einsum(
            "tk,nk->tn",
            rows,
            matrix.astype(rows.dtype),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    def with_adapter(adapter: Array) -> Array:
        own = jax.tree.map(lambda stack: stack[layer[0], adapter], StackedFactors(a, scale, b))
        return y + multiply((multiply(x, own.a) * own.scale).astype(x.dtype), own.b)

    return by_present_adapter(adapter_ids, a.shape[1], with_adapter, y).astype(x.dtype)


def _launches(*operands: Array, target: Target | None) -> Array:
    return launch_lora_by_row(dict(zip(NAMES, operands, strict=True)), target)


register(lora_by_row_p, _launches)
