"""The layer by the backend of the platform, with its gradient.

The choice of backend is made when a program is lowered, in the forward pass and again in the backward pass, between
which the same arrays are kept on either: the inputs, the routing and, where Triton can run and unless they are computed
again, gate_up's results before the activation.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.interpreters import mlir, xla

from jmoe.ops.batching import moe_of_batches, one_after_another
from jmoe.ops.buffers import Buffers, Options
from jmoe.ops.launch.layer import moe_backward_p, moe_forward_p
from jmoe.ops.launch.local_gpu import has_cuda
from jmoe.ops.routing import route
from jmoe.ops.xla.moe import moe_xla

KEPT = "jmoe_pre_activations"
"""The name, for policies of jax.checkpoint, of what the forward pass keeps unless recompute is set."""

WEIGHTS = ("gate_up", "down")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def moe_by_platform(options: Options, buffers: Buffers) -> jax.Array:
    """y by Triton on CUDA or where it was forced, by XLA elsewhere."""
    return on_platform(options, moe_of_batches(options), functools.partial(moe_xla, options), buffers)


def on_platform[T](
    options: Options, triton: Callable[[Buffers], T], other: Callable[[Buffers], T], buffers: Buffers
) -> T:
    """triton(buffers) on CUDA, and everywhere if Triton was forced; other(buffers) else."""
    if options.forced:
        return triton(buffers)
    return lax.platform_dependent(buffers, cuda=triton, default=other)


@jax.tree_util.register_static
class Names(tuple[str, ...]):
    """Names of buffers, static among what is kept."""


def _forward(options: Options, primals: dict[str, CustomVJPPrimal]) -> tuple[jax.Array, tuple[Names, Buffers]]:
    buffers = {name: primal.value for name, primal in primals.items()}
    wanted = Names(name for name, primal in primals.items() if primal.perturbed)
    if options.forced and set(wanted) & set(WEIGHTS):
        raise NotImplementedError(NO_WEIGHT_GRADIENT)
    if not options.forced and not (buffers["x"].dtype == jnp.bfloat16 and has_cuda()):
        options = options._replace(recompute=True)  # XLA alone can run this, and reads no pre_activations
    results = on_platform(options, forward_of_batches(options), functools.partial(_forward_xla, options), buffers)
    y = results.pop("y")
    if "pre_activations" in results:
        results["pre_activations"] = checkpoint_name(results["pre_activations"], KEPT)
    return y, (wanted, buffers | results)


def _forward_xla(options: Options, buffers: Buffers) -> Buffers:
    """As moe_forward_p. XLA's backward pass computes everything again: its pre_activations are zeros.

    They are there only beside a GPU, for which the same program might be lowered.
    """
    results = {"y": moe_xla(options, buffers)}
    if "router_logits" in buffers:
        routing = route(buffers["router_logits"], options.top_k)
        results |= {"experts": routing.experts, "weights": routing.weights}
    if not options.recompute:
        tokens = buffers["x"].shape[0]
        zero = jnp.zeros_like(buffers["x"], jnp.bfloat16, shape=(tokens * options.top_k, 2 * options.intermediate))
        results["pre_activations"] = zero
    return results


def _backward(options: Options, kept: tuple[Names, Buffers], dy: Any) -> tuple[dict[str, Any]]:
    wanted, buffers = kept
    gradients: dict[str, Any] = dict.fromkeys(input_names(buffers))
    if wanted and not isinstance(dy, SymbolicZero):
        triton = one_after_another(functools.partial(_backward_triton, options, wanted))
        other = functools.partial(_backward_xla, options, wanted)
        gradients |= on_platform(options, triton, other, buffers | {"dy": dy})
    return (gradients,)


def input_names(buffers: Buffers) -> list[str]:
    """Names of the layer's inputs among what is kept."""
    chosen = ("experts", "weights") if "router_logits" in buffers else ()
    return [name for name in buffers if name not in (*chosen, "pre_activations", "dy")]


def _backward_triton(options: Options, wanted: Names, buffers: Buffers) -> Buffers:
    weights = {name: refuse_p.bind(buffers[name]) for name in wanted if name in WEIGHTS}
    others = Names(name for name in wanted if name not in WEIGHTS)
    gradients = moe_backward_p.bind(*buffers.values(), names=tuple(buffers), wanted=others, options=options)
    return weights | dict(zip(others, gradients, strict=True))


def _backward_xla(options: Options, wanted: Names, buffers: Buffers) -> Buffers:
    inputs = {name: buffers[name] for name in input_names(buffers)}
    given = {name: array for name, array in inputs.items() if name not in wanted}
    point = {name: inputs[name] for name in wanted}
    return jax.vjp(lambda point: moe_xla(options, given | point), point)[1](buffers["dy"])[0]


moe_by_platform.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.cache
def forward_of_batches(options: Options) -> Callable[[Buffers], Buffers]:
    """moe_forward_p by names, with a rule for vmap."""

    def call(buffers: Buffers) -> Buffers:
        chosen = ("experts", "weights") if "router_logits" in buffers else ()
        results = ("y", *chosen, *(() if options.recompute else ("pre_activations",)))
        arrays = moe_forward_p.bind(*buffers.values(), names=tuple(buffers), results=results, options=options)
        return dict(zip(results, arrays, strict=True))

    return one_after_another(call)


NO_WEIGHT_GRADIENT = (
    "the Triton backend of jmoe.moe takes the experts' weights for constants and has no gradient in them; "
    'differentiate bf16 experts with backend="xla", or leave them out of what is differentiated'
)

refuse_p = jex.core.Primitive("jmoe_no_gradient")
"""Stands where a gradient would be, and refuses to be lowered: on a CPU this branch is traced, then left out."""

refuse_p.def_impl(lambda *args, **params: xla.apply_primitive(refuse_p, *args, **params))
refuse_p.def_abstract_eval(lambda weight: weight)


def _refuse(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(NO_WEIGHT_GRADIENT)


mlir.register_lowering(refuse_p, _refuse)
