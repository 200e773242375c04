"""A call's arrays by the names that launch plans use."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops.experts import Experts, Lora
from jmoe.ops.mxfp4 import Mxfp4, PackedMxfp4
from jmoe.ops.routing import Routing

type Buffers = dict[str, jax.Array]


class Options(NamedTuple):
    """What is static about a call."""

    intermediate: int
    top_k: int
    swiglu_alpha: float
    swiglu_limit: float
    capability: int | None  # None: that of the GPU at hand when lowered
    forced: bool  # the caller named the Triton backend, so that what it cannot do is an error at once
    recompute: bool


def name_buffers(
    x: jax.Array,
    router_logits: jax.Array | None,
    experts: Experts,
    lora: Lora | None,
    adapter_ids: jax.Array | None,
    routing: Routing | None,
    expert_offset: jax.Array | int,
    layer: jax.Array | int | None,
) -> Buffers:
    """The call's arrays under the names that launch plans use."""
    buffers: dict[str, Any] = {"x": x, "router_logits": router_logits, "adapter_ids": adapter_ids}
    if routing is not None:
        buffers |= {"experts": routing.experts, "weights": routing.weights}
    if not (isinstance(expert_offset, int) and expert_offset == 0):
        buffers["expert_offset"] = jnp.asarray(expert_offset, jnp.int32).reshape(1)
    if layer is not None:
        buffers["layer"] = jnp.asarray(layer, jnp.int32).reshape(1)
    for projection in ("gate_up", "down"):
        weight = getattr(experts, projection)
        if isinstance(weight, Mxfp4):
            buffers |= {projection: weight.blocks, f"{projection}_scales": weight.scales}
        elif isinstance(weight, PackedMxfp4):
            buffers |= {projection: weight.words, f"{projection}_scales": weight.scales}
        else:
            buffers[projection] = weight
        buffers[f"{projection}_bias"] = getattr(experts, f"{projection}_bias")
        for part in ("a", "b", "scale"):
            buffers[f"{projection}_{part}"] = getattr(lora, f"{projection}_{part}", None)
        if (scale := buffers[f"{projection}_scale"]) is not None:
            buffers[f"{projection}_scale"] = lax.stop_gradient(scale)
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def of_one_layer(buffers: Buffers) -> Buffers:
    """The buffers with the layer that "layer" chooses taken out of those that are of several."""
    if "layer" not in buffers:
        return buffers
    (layer,) = buffers["layer"]
    chosen = {name: lax.dynamic_index_in_dim(buffers[name], layer, keepdims=False) for name in names_of_stacks(buffers)}
    return {name: chosen.get(name, array) for name, array in buffers.items() if name != "layer"}


def names_of_stacks(buffers: Buffers) -> list[str]:
    """Buffers that have a leading axis for layers: with "layer" those of the experts, and LoRA's if that has one."""
    if "layer" not in buffers:
        return []
    experts = [f"{p}{part}" for p in ("gate_up", "down") for part in ("", "_scales", "_bias")]
    lora = [f"{p}_{part}" for p in ("gate_up", "down") for part in ("a", "b", "scale")]
    scales = [buffers[name] for name in ("gate_up_scale", "down_scale") if name in buffers]
    return [name for name in (*experts, *(lora if scales and scales[0].ndim == 2 else ())) if name in buffers]
