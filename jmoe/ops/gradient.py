"""The layer by the backend of the platform, with its gradient.

The choice of backend is made when a program is lowered, in the forward pass and again in the backward pass, between
which the same arrays are kept on either: the call's, the routing and, where Triton can run and unless they are computed
again, gate_up's results before the activation.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jmoe.ops.call import Call, Kept, Options, buffers_of, like_call
from jmoe.ops.launch.layer import NO_WEIGHT_GRADIENT, WEIGHT_GRADIENTS, moe_p
from jmoe.ops.launch.local_gpu import has_cuda
from jmoe.ops.launch.partition import bind_partitioned
from jmoe.ops.partition import may_be_split
from jmoe.ops.routing import Routing
from jmoe.ops.xla.moe import Names, moe_xla, with_routing

KEPT = "jmoe_pre_activations"
"""The name, for policies of jax.checkpoint, of what the forward pass keeps unless recompute is set."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def moe_by_platform(options: Options, call: Call) -> jax.Array:
    """y by Triton on CUDA or where it was forced, by XLA elsewhere."""
    (y,) = on_platform(options, ("y",), functools.partial(_xla, options), call, None, None)
    return y


def on_platform(
    options: Options,
    results: tuple[str, ...],
    xla: Callable[[Call, Kept | None, jax.Array | None], list[jax.Array]],
    *operands: Any,
) -> list[jax.Array]:
    """The primitive's results on CUDA, and everywhere if Triton was forced; those of `xla` else.

    operands: the call, what it kept and dy, the last two None in the forward pass.
    """
    leaves, tree = jax.tree.leaves(operands), cast(Any, jax.tree.structure(operands))
    bind = bind_partitioned if may_be_split(leaves) else moe_p.bind
    launches = functools.partial(bind, tree=tree, results=results, options=options)
    if options.forced:
        return launches(*leaves)
    return lax.platform_dependent(*leaves, cuda=launches, default=lambda *leaves: xla(*tree.unflatten(leaves)))


def _xla(options: Options, call: Call, *_: None) -> list[jax.Array]:
    """As the primitive's y."""
    return [moe_xla(options, call)]


def _forward(options: Options, primals: Any) -> tuple[jax.Array, tuple[Names, Call, Kept]]:
    call = jax.tree.map(lambda primal: primal.value, primals)
    wanted = Names(name for name, primal in buffers_of(primals).items() if primal.perturbed)
    if options.forced and any(f"{name}_grad" in WEIGHT_GRADIENTS for name in wanted):
        raise NotImplementedError(NO_WEIGHT_GRADIENT)
    if not options.forced and not (call.tokens.x.dtype == jnp.bfloat16 and has_cuda()):
        options = options._replace(recompute=True)  # XLA alone can run this, and reads no pre_activations
    given = call.tokens.routing is not None
    names = ("y", *(() if given else ("experts", "weights")), *(() if options.recompute else ("pre_activations",)))
    arrays = on_platform(options, names, functools.partial(_forward_xla, options, names), call, None, None)
    results = dict(zip(names, arrays, strict=True))
    routing = None if given else Routing(results["experts"], results["weights"])
    pre_activations = None if options.recompute else checkpoint_name(results["pre_activations"], KEPT)
    return results["y"], (wanted, call, Kept(routing, pre_activations))


def _forward_xla(options: Options, names: tuple[str, ...], call: Call, *_: None) -> list[jax.Array]:
    """As the primitive. XLA's backward pass computes everything again: its pre_activations are zeros.

    They are there only beside a GPU, for which the same program might be lowered.
    """
    call, x = with_routing(options, call), call.tokens.x
    routing = call.tokens.routing
    assert routing is not None
    results = {"y": moe_xla(options, call), "experts": routing.experts, "weights": routing.weights}
    if "pre_activations" in names:
        shape = (x.shape[0] * options.top_k, 2 * options.intermediate)
        results["pre_activations"] = jnp.zeros_like(x, jnp.bfloat16, shape=shape)
    return [results[name] for name in names]


def _backward(options: Options, kept: tuple[Names, Call, Kept], dy: Any) -> tuple[Call]:
    wanted, call, extra = kept
    gradients: dict[str, Any] = {}
    if wanted and not isinstance(dy, SymbolicZero):
        names = tuple(f"{name}_grad" for name in wanted)
        arrays = on_platform(options, names, functools.partial(_backward_xla, options, wanted), call, extra, dy)
        gradients = dict(zip(wanted, arrays, strict=True))
    return (like_call(call, gradients),)


def _backward_xla(options: Options, wanted: Names, call: Call, _: Kept, dy: jax.Array) -> list[jax.Array]:
    """The gradients of what is wanted, by JAX's rules for moe_xla."""
    leaves, tree = jax.tree.leaves(call), cast(Any, jax.tree.structure(call))
    places = buffers_of(tree.unflatten(range(len(leaves))))
    point = [leaves[places[name]] for name in wanted]

    def y(point: list[jax.Array]) -> jax.Array:
        at = list(leaves)
        for name, leaf in zip(wanted, point, strict=True):
            at[places[name]] = leaf
        return moe_xla(options, tree.unflatten(at))

    return jax.vjp(y, point)[1](dy)[0]


moe_by_platform.defvjp(_forward, _backward, symbolic_zeros=True)
