"""jmoe.moe's arrays through the layer by XLA, with rules for jax.grad, jax.vmap and meshes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from jmoe.ops.batching import TOKEN_BUFFERS, merge_batch, one_after_another
from jmoe.ops.buffers import Buffers, Options, of_one_layer
from jmoe.ops.experts import Experts, Lora
from jmoe.ops.mxfp4 import Mxfp4, PackedMxfp4
from jmoe.ops.reference import swiglu
from jmoe.ops.routing import Routing, route
from jmoe.ops.xla.layer import Activation, Call, backward, forward
from jmoe.ops.xla.partition import partitioned


def moe_xla(options: Options, buffers: Buffers) -> jax.Array:
    """The layer by plain XLA operations. Of its forward pass nothing is kept for a gradient but its inputs."""
    buffers = of_one_layer(buffers)
    if "router_logits" in buffers:
        routing = route(buffers["router_logits"], options.top_k)
        buffers = {name: array for name, array in buffers.items() if name != "router_logits"}
        buffers |= {"experts": routing.experts, "weights": routing.weights}
    return routed_moe(options, buffers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def routed_moe(options: Options, buffers: Buffers) -> jax.Array:
    """y of tokens whose experts are chosen."""
    return _forward_of_batches(options)(buffers)


@jax.tree_util.register_static
class Names(tuple[str, ...]):
    """Names of buffers, static among what is kept."""


def _forward(options: Options, primals: dict[str, CustomVJPPrimal]) -> tuple[jax.Array, tuple[Names, Buffers]]:
    buffers = {name: primal.value for name, primal in primals.items()}
    wanted = Names(name for name, primal in primals.items() if primal.perturbed and not name.endswith("_scale"))
    return routed_moe(options, buffers), (wanted, buffers)


def _backward(options: Options, kept: tuple[Names, Buffers], dy: Any) -> tuple[dict[str, Any]]:
    wanted, buffers = kept
    gradients: dict[str, Any] = dict.fromkeys(buffers)
    if wanted and not isinstance(dy, SymbolicZero):
        gradients |= one_after_another(functools.partial(_gradients, options, wanted))(buffers | {"dy": dy})
    return (gradients,)


routed_moe.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.cache
def _forward_of_batches(options: Options) -> Any:
    """The forward pass with a rule for vmap: more tokens where only tokens are batched, one after another else."""

    @custom_vmap
    def call(buffers: Buffers) -> jax.Array:
        dtype = buffers["x"].dtype
        compute = lambda own: [forward(activation_of(options), call_of(options, own))]  # noqa: E731
        (y,) = partitioned(compute, ("x",))(buffers)
        return y.astype(dtype)

    @call.def_vmap
    def batch(axis_size: int, in_batched: list[dict[str, bool]], buffers: Buffers) -> tuple[jax.Array, bool]:
        batched = {name for name, is_batched in in_batched[0].items() if is_batched}
        if batched <= TOKEN_BUFFERS:
            merged = {
                name: merge_batch(array, axis_size, name in batched) if name in TOKEN_BUFFERS else array
                for name, array in buffers.items()
            }
            y = call(merged)
            return y.reshape(axis_size, buffers["x"].shape[-2], y.shape[1]), True
        moving = {name: buffers[name] for name in batched}
        return jax.lax.map(lambda one: call({**buffers, **one}), moving), True

    return call


def _gradients(options: Options, wanted: Names, buffers: Buffers) -> Buffers:
    def compute(own: Buffers) -> list[jax.Array]:
        gradients = backward(activation_of(options), call_of(options, own), wanted, own["dy"])
        return [gradients[name] for name in wanted]

    gradients = partitioned(compute, wanted)(buffers)
    return {name: array.astype(buffers[name].dtype) for name, array in zip(wanted, gradients, strict=True)}


def activation_of(options: Options) -> Activation:
    """The call's activation, of rows [M, 2I]."""
    return functools.partial(swiglu, alpha=options.swiglu_alpha, limit=options.swiglu_limit)


def call_of(options: Options, buffers: Buffers) -> Call:
    """The arrays of one layer and its routing in their containers."""
    hidden, intermediate = buffers["x"].shape[1], options.intermediate

    def weight(projection: str, n: int, k: int) -> Mxfp4 | PackedMxfp4 | jax.Array:
        weight, scales = buffers[projection], buffers.get(f"{projection}_scales")
        if scales is None:
            return weight
        return Mxfp4(weight, scales) if weight.dtype == jnp.uint8 else PackedMxfp4(weight, scales, n, k)

    experts = Experts(
        weight("gate_up", 2 * intermediate, hidden),
        buffers.get("gate_up_bias"),
        weight("down", hidden, intermediate),
        buffers.get("down_bias"),
    )
    parts = {f"{p}_{part}": buffers.get(f"{p}_{part}") for p in ("gate_up", "down") for part in ("a", "b", "scale")}
    return Call(
        buffers["x"],
        Routing(buffers["experts"], buffers["weights"]),
        experts,
        None if all(part is None for part in parts.values()) else Lora(**parts),
        buffers.get("adapter_ids"),
        buffers["expert_offset"][0] if "expert_offset" in buffers else 0,
    )
