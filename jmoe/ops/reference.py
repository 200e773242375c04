"""What the layer consists of in plain jax.numpy: the activation, one expert's weights, one expert's adapters."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jmoe.ops.experts import Lora
from jmoe.ops.mxfp4 import Mxfp4, PackedMxfp4, dequantize
from jmoe.ops.packed import unpack_expert
from jmoe.triton_src.activation import SwiGLU

type Adapter = tuple[Float[Array, "A R K"], Float[Array, "A N R"], Float[Array, " A"]]


def swiglu(z: Float[Array, "T 2I"], activation: SwiGLU) -> Float[Array, "T I"]:
    """The activation of gate_up's results."""
    gate, up = (z[:, 0::2], z[:, 1::2]) if activation.interleaved else jnp.split(z, 2, axis=1)
    if activation.limit is not None:
        gate = jnp.minimum(gate, activation.limit)
        up = jnp.clip(up, -activation.limit, activation.limit)
    return gate * jax.nn.sigmoid(activation.alpha * gate) * (up + activation.offset)


def dense(weight: Mxfp4 | PackedMxfp4 | Float[Array, "N K"], dtype: DTypeLike) -> Float[Array, "N K"]:
    """One expert's weights as an array, by way of bfloat16 if they are MXFP4: that is the kernels' operand type."""
    if isinstance(weight, PackedMxfp4):
        weight = Mxfp4(*unpack_expert(weight.words, weight.scales, n=weight.n, k=weight.k))
    if isinstance(weight, Mxfp4):
        one = jax.tree.map(lambda leaf: leaf[None], weight)
        return dequantize(one, jnp.bfloat16)[0].astype(dtype)
    return weight.astype(dtype)


def adapter_count(lora: Lora) -> int:
    """The number of adapters, 0 if no projection has LoRA."""
    scale = lora.gate_up_scale if lora.gate_up_scale is not None else lora.down_scale
    return 0 if scale is None else scale.shape[0]


def gate_up_of(lora: Lora | None) -> Adapter | None:
    """(a, b, scale) of gate_up, or None."""
    if lora is None or lora.gate_up_a is None or lora.gate_up_b is None or lora.gate_up_scale is None:
        return None
    return lora.gate_up_a, lora.gate_up_b, lora.gate_up_scale


def down_of(lora: Lora | None) -> Adapter | None:
    """(a, b, scale) of down, or None."""
    if lora is None or lora.down_a is None or lora.down_b is None or lora.down_scale is None:
        return None
    return lora.down_a, lora.down_b, lora.down_scale
