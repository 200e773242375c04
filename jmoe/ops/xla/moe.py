"""jmoe.moe's arrays through the layer by XLA, with rules for jax.grad, jax.vmap and meshes."""

import dataclasses
import functools
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from jmoe.ops.batching import batch_launches
from jmoe.ops.call import Call, Options, buffers_of, like_call
from jmoe.ops.partition import partitioned
from jmoe.ops.routing import route
from jmoe.ops.xla.layer import backward, forward


def moe_xla(options: Options, call: Call) -> jax.Array:
    """The layer by plain XLA operations. Of its forward pass nothing is kept for a gradient but its inputs."""
    return routed_moe(options, with_routing(options, call.of_one_layer()))


def with_routing(options: Options, call: Call) -> Call:
    """The call with its routing instead of its router's logits."""
    if call.tokens.routing is not None:
        return call
    assert call.tokens.router_logits is not None
    logits, choice_bias = call.tokens.router_logits, call.choice_bias
    routing = route(logits, options.top_k, scoring=options.scoring, choice_bias=choice_bias)
    tokens = dataclasses.replace(call.tokens, router_logits=None, routing=routing)
    return dataclasses.replace(call, tokens=tokens, choice_bias=None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def routed_moe(options: Options, call: Call) -> jax.Array:
    """y of tokens whose experts are chosen."""
    (y,) = _bind(options, ("y",), call, None)
    return y


def _forward(options: Options, primals: Any) -> tuple[jax.Array, tuple[tuple[str, ...], Call]]:
    call = jax.tree.map(lambda primal: primal.value, primals)
    wanted = Names(
        name for name, primal in buffers_of(primals).items() if primal.perturbed and not name.endswith("_scale")
    )
    return routed_moe(options, call), (wanted, call)


@jax.tree_util.register_static
class Names(tuple[str, ...]):
    """Names of buffers, static among what is kept."""


def _backward(options: Options, kept: tuple[Names, Call], dy: Any) -> tuple[Call]:
    wanted, call = kept
    gradients: dict[str, Any] = {}
    if wanted and not isinstance(dy, SymbolicZero):
        arrays = _bind(options, tuple(f"{name}_grad" for name in wanted), call, dy)
        gradients = dict(zip(wanted, arrays, strict=True))
    return (like_call(call, gradients),)


routed_moe.defvjp(_forward, _backward, symbolic_zeros=True)


def _bind(options: Options, results: tuple[str, ...], call: Call, dy: jax.Array | None) -> list[jax.Array]:
    """Results like those of the launches' primitive, from a call of one layer with its routing."""
    leaves, tree = jax.tree.flatten((call, dy))
    return _of_leaves(*leaves, tree=tree, results=results, options=options)


def _of_leaves(*leaves: jax.Array, **params: Any) -> list[jax.Array]:
    """The results, with batch_launches' rule for vmap."""
    compute = custom_vmap(functools.partial(_compute, **params))

    @compute.def_vmap
    def batch(size: int, is_batched: list[bool], *leaves: jax.Array) -> tuple[list[jax.Array], list[bool]]:
        dims = [0 if moves else None for moves in is_batched]
        results, _ = batch_launches(_of_leaves, leaves, dims, **params)
        return results, [True] * len(results)

    return compute(*leaves)


def _compute(*leaves: jax.Array, tree: Any, results: tuple[str, ...], options: Options) -> list[jax.Array]:
    call, dy = tree.unflatten(leaves)
    like = buffers_of(call) | {"y": call.tokens.x}

    def one_device(results: tuple[str, ...], call: Call, _: Any, dy: jax.Array | None) -> list[jax.Array]:
        if dy is None:
            return [forward(options.activation, call)]
        names = tuple(name.removesuffix("_grad") for name in results)
        by_name = backward(options.activation, call, names, dy)
        return [by_name[name] for name in names]

    arrays = partitioned(one_device, f"xla {options}", results, call, None, dy)
    return [array.astype(like[name.removesuffix("_grad")].dtype) for name, array in zip(results, arrays, strict=True)]
