"""A dense product of few rows with one layer of a stack, read in place by Triton on CUDA; by XLA elsewhere."""

from typing import NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int32

from jmoe.ops.launch.calls import register, triton_or_xla
from jmoe.ops.launch.decode import launch_decode
from jmoe.ops.row_adapters import by_present_adapter
from jmoe.ops.target import Target

MOST_ROWS = 64
"""Rows of decode_linear at most. For more a product is no longer bound by reading the weights."""

decode_linear_p = jex.core.Primitive("jmoe_decode_linear")
"""Operands as the plan names them, in the order of the parameter `names`. Result: [T, N] like x."""

decode_linear_p.def_abstract_eval(
    lambda x, weight, *_, **__: x.update(shape=(x.shape[0], weight.shape[1]), dtype=x.dtype)
)


class Expand(NamedTuple):
    """LoRA's second half: scale * x A^T, and all layers' B, N rows of each adapter.

    adapter_ids: each row's, -1 for none; None: the first adapter for all.
    """

    shrunk: BFloat16[Array, "T R"]
    b: BFloat16[Array, "L P R"]
    adapter_ids: Int32[Array, " T"] | None = None


def decode_linear(
    x: BFloat16[Array, "T K"],
    weight: BFloat16[Array, "L N K"],
    bias: BFloat16[Array, "L N"],
    layer: Int32[Array, ""],
    lora: Expand | None = None,
    *,
    target: Target | None = None,
) -> BFloat16[Array, "T N"]:
    """x weight[layer]^T + bias[layer], plus LoRA of that layer, summed in float32 and rounded once. It has no gradient.

    Args:
      x: at most MOST_ROWS rows.
      target: a GPU that may not be here, to lower for it; forces Triton.
    """
    buffers = {"x": x, "weight": weight, "bias": bias, "layer": layer.reshape(1)}
    if lora is not None:
        buffers |= {"shrunk": lora.shrunk, "lora_b": lora.b}
        if lora.adapter_ids is not None:
            buffers["adapter_ids"] = lora.adapter_ids
    return triton_or_xla(decode_linear_p, linear_by_xla, list(buffers.values()), target, names=tuple(buffers))


def linear_by_xla(x: Array, weight: Array, bias: Array, layer: Array, *lora: Array) -> Float[Array, "T N"]:
    """decode_linear by plain operations."""
    weight, bias = (lax.dynamic_index_in_dim(array, layer[0], keepdims=False) for array in (weight, bias))
    y = jnp.einsum("tk,nk->tn", x, weight, preferred_element_type=jnp.float32) + bias.astype(jnp.float32)
    if lora:
        shrunk, b, *ids = lora
        b = lax.dynamic_index_in_dim(b, layer[0], keepdims=False).reshape(-1, y.shape[1], b.shape[-1])

        def with_adapter(adapter: Array | int) -> Array:
            return y + jnp.einsum("tr,nr->tn", shrunk, b[adapter], preferred_element_type=jnp.float32)

        y = by_present_adapter(ids[0], len(b), with_adapter, y) if ids else with_adapter(0)
    return y.astype(x.dtype)


def _launches(*operands: Array, names: tuple[str, ...], target: Target | None) -> Array:
    buffers: dict[str, jax.Array] = dict(zip(names, operands, strict=True))
    rows, k = buffers["x"].shape
    lora = {}
    if "shrunk" in buffers:
        lora = {"rank": buffers["shrunk"].shape[1], "lora_rows": buffers["lora_b"].shape[1]}
        lora |= {"adapter_ids": "adapter_ids" in buffers}
    sizes = {"rows": rows, "n": buffers["weight"].shape[1], "k": k, **lora}
    return launch_decode("decode_linear", buffers, target, **sizes)["linear"]


register(decode_linear_p, _launches)
