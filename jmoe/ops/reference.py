"""The layer in plain jax.numpy: backend "xla", and the specification of what the kernels compute.

Products take operands in x's dtype and sum in float32; bias, LoRA's sum, SwiGLU and gate weights are float32; what the
kernels store between launches (LoRA's shrunk rows, activations, each expert's output) is rounded to x's dtype here too.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.ops.experts import Experts, Lora
from jmoe.ops.mxfp4 import Mxfp4, PackedMxfp4, dequantize
from jmoe.ops.packed import unpack_expert
from jmoe.ops.routing import Routing
from jmoe.triton_src.activation import SwiGLU

type Weight = Mxfp4 | PackedMxfp4 | Float[Array, "E N K"]
type Adapter = tuple[Float[Array, "A R K"], Float[Array, "A N R"], Float[Array, " A"]]


def moe_reference(
    x: Float[Array, "T H"],
    routing: Routing,
    experts: Experts,
    lora: Lora | None,
    adapter_ids: Int32[Array, " T"] | None,
    expert_offset: Int32[Array, ""] | int,
    activation: SwiGLU,
) -> Float[Array, "T H"]:
    """y[t] = sum over t's pairs of weight * expert(x[t]), one expert after another: one is dequantised at a time.

    Pairs of experts outside [expert_offset, expert_offset + E) add nothing. An expert that no token chose is skipped,
    so that neither its time nor a NaN in it counts.
    """
    if adapter_ids is None:
        adapter_ids = jnp.zeros_like(routing.experts[:, 0])
    if lora is not None:
        known = (adapter_ids >= -1) & (adapter_ids < adapter_count(lora))
        # Such a token of an earlier layer is NaN, which times its gradient of 0 would be NaN in all of LoRA's.
        x = jnp.where(known[:, None], x, 0)

    def one_expert(
        y: Float[Array, "T H"], local: tuple[Int32[Array, ""], Experts, Lora | None]
    ) -> tuple[Float[Array, "T H"], None]:
        index, weights_e, lora_e = local
        chosen = routing.experts == index + expert_offset
        gate = jnp.sum(jnp.where(chosen, routing.weights, 0), axis=1)
        mine = jnp.any(chosen, axis=1)

        def compute(y: Float[Array, "T H"]) -> Float[Array, "T H"]:
            z = project(x, weights_e.gate_up, weights_e.gate_up_bias, gate_up_of(lora_e), adapter_ids)
            h = swiglu(z, activation).astype(x.dtype)
            out = project(h, weights_e.down, weights_e.down_bias, down_of(lora_e), adapter_ids)
            out = (gate[:, None] * out).astype(x.dtype).astype(jnp.float32)
            return y + jnp.where(mine[:, None], out, 0)

        return lax.cond(jnp.any(mine), compute, lambda y: y, y), None

    # The scan runs over experts; LoRA's leading axes [A, E, ...] become [E, A, ...] for it.
    count = weight_experts(experts.down)
    lora_by_expert = jax.tree.map(
        lambda leaf: jnp.swapaxes(leaf, 0, 1) if leaf.ndim > 1 else jnp.broadcast_to(leaf, (count, *leaf.shape)), lora
    )
    y = jnp.zeros_like(x, jnp.float32)
    y, _ = lax.scan(jax.checkpoint(one_expert), y, (jnp.arange(count), experts, lora_by_expert))
    if lora is not None:
        y = jnp.where(known[:, None], y, jnp.nan)
    return y.astype(x.dtype)


def project(
    x: Float[Array, "T K"],
    weight: Mxfp4 | PackedMxfp4 | Float[Array, "N K"],
    bias: Float[Array, " N"] | None,
    lora: Adapter | None,
    adapter_ids: Int32[Array, " T"],
) -> Float[Array, "T N"]:
    """float32 x W^T + LoRA + bias of one expert; lora is a [A, r, K], b [A, N, r] and scale [A]."""
    z = product(x, dense(weight, x.dtype))
    if lora is not None:

        def one_adapter(
            z: Float[Array, "T N"], adapter: tuple[Array, tuple[Array, Array, Array]]
        ) -> tuple[Float[Array, "T N"], None]:
            index, own = adapter
            # An adapter that no token uses may hold NaN, which no gradient is to see.
            mine = (adapter_ids == index)[:, None]
            a, b, scale = (jnp.where(mine.any(), factor, 0) for factor in own)
            shrunk = (product(x, a.astype(x.dtype)) * scale).astype(x.dtype)
            expanded = product(shrunk, b.astype(x.dtype))
            return jnp.where(mine, z + expanded, z), None

        z, _ = lax.scan(one_adapter, z, (jnp.arange(lora[0].shape[0]), lora))
    return z if bias is None else z + bias.astype(jnp.float32)


def product(x: Float[Array, "M K"], w: Float[Array, "N K"]) -> Float[Array, "M N"]:
    """x w^T in float32, at full precision also where float32 products default to less."""
    return lax.dot_general(
        x, w, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def swiglu(z: Float[Array, "T 2I"], activation: SwiGLU) -> Float[Array, "T I"]:
    """The activation of gate_up's results."""
    gate, up = (z[:, 0::2], z[:, 1::2]) if activation.interleaved else jnp.split(z, 2, axis=1)
    if activation.limit is not None:
        gate = jnp.minimum(gate, activation.limit)
        up = jnp.clip(up, -activation.limit, activation.limit)
    return gate * jax.nn.sigmoid(activation.alpha * gate) * (up + activation.offset)


def dense(weight: Mxfp4 | PackedMxfp4 | Float[Array, "N K"], dtype: jnp.dtype) -> Float[Array, "N K"]:
    """One expert's weights as an array, by way of bfloat16 if they are MXFP4: that is the kernels' operand type."""
    if isinstance(weight, PackedMxfp4):
        weight = Mxfp4(*unpack_expert(weight.words, weight.scales, n=weight.n, k=weight.k))
    if isinstance(weight, Mxfp4):
        one = jax.tree.map(lambda leaf: leaf[None], weight)
        return dequantize(one, jnp.bfloat16)[0].astype(dtype)
    return weight.astype(dtype)


def weight_experts(weight: Weight) -> int:
    """The number of experts that a weight holds."""
    return weight.shape[0]


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
