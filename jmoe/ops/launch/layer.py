"""A mixture-of-experts layer, its gradients and its routing as launches: a primitive for what is traced anywhere."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jax.interpreters import batching

from jmoe.ops.batching import batch_launches
from jmoe.ops.call import Call, Kept, Options, buffers_of
from jmoe.ops.launch.calls import launch, register
from jmoe.ops.launch.local_gpu import Gpu, gpu_of
from jmoe.ops.mxfp4 import Mxfp4, PackedMxfp4
from jmoe.ops.packed import unpack
from jmoe.ops.target import Target

if TYPE_CHECKING:
    from jmoe.triton_src.problem import MoeProblem

moe_p = jex.core.Primitive("jmoe_moe")
"""Operands: the leaves of (Call, Kept or None, dy or None), whose structure is the parameter `tree`.

Results: the buffers that the parameter `results` names. From a Call alone these are y, which is first, experts, weights
and pre_activations; with what it kept and dy, they are gradients, x_grad for example.
"""
moe_p.multiple_results = True
batching.primitive_batchers[moe_p] = functools.partial(batch_launches, moe_p.bind)


@moe_p.def_abstract_eval
def result_avals(*avals: Any, tree: Any, results: tuple[str, ...], options: Options) -> list[Any]:
    call: Call = tree.unflatten(avals)[0]
    x: Any = call.tokens.x
    tokens, pairs = x.shape[0], x.shape[0] * options.top_k
    by_name = {
        "y": x,
        "experts": x.update(shape=(tokens, options.top_k), dtype=jnp.dtype(jnp.int32)),
        "weights": x.update(shape=(tokens, options.top_k), dtype=jnp.dtype(jnp.float32)),
        "pre_activations": x.update(shape=(pairs, 2 * options.intermediate), dtype=jnp.dtype(jnp.bfloat16)),
    }
    by_name |= {f"{name}_grad": aval for name, aval in buffers_of(call).items()}
    return [by_name[name] for name in results]


NO_WEIGHT_GRADIENT = (
    "the Triton backend of jmoe.moe takes the experts' weights for constants and has no gradient in them; "
    'differentiate bf16 experts with backend="xla", or leave them out of what is differentiated'
)

WEIGHT_GRADIENTS = ("gate_up_grad", "down_grad")
"""What is refused when it is lowered: on a CPU the launches are traced, then left out."""


def launch_layer(*leaves: jax.Array, tree: Any, results: tuple[str, ...], options: Options) -> list[jax.Array]:
    """The layer or its gradient as launches: what the primitive stands for on CUDA.

    Raises:
      NotImplementedError: the experts' weights are among what is differentiated, or see check_triton_takes.
    """
    call, kept, dy = tree.unflatten(leaves)
    check_triton_takes(call)
    if set(results) & set(WEIGHT_GRADIENTS):
        raise NotImplementedError(NO_WEIGHT_GRADIENT)
    if call.tokens.x.size == 0 or not results:
        avals = result_avals(*map(jax.typeof, leaves), tree=tree, results=results, options=options)
        return [jnp.zeros(aval.shape, aval.dtype) for aval in avals]
    gpu = gpu_of(options.target)
    if dy is not None:
        return launch_gradients(call, kept, dy, results, options, gpu)
    from jmoe.triton_src.moe import plan_moe

    keep = "pre_activations" in results
    buffers, problem = problem_of(call, options, gpu, gradient=keep)
    written = launch(plan_moe(problem, gpu.capability, gpu.table, keep=keep), buffers, gpu.capability)
    return [written[name] for name in results]


register(moe_p, launch_layer)


def launch_gradients(
    call: Call, kept: Kept, dy: jax.Array, results: tuple[str, ...], options: Options, gpu: Gpu
) -> list[jax.Array]:
    """The gradients that `results` names as launches."""
    from jmoe.triton_src.moe_backward import plan_moe_backward

    inputs = buffers_of(call)
    if kept.routing is not None:
        call = dataclasses.replace(call, tokens=dataclasses.replace(call.tokens, routing=kept.routing))
    buffers, problem = problem_of(call, options, gpu, gradient=True)
    if call.tokens.adapter_ids is not None:
        # A token whose adapter does not exist is NaN whatever the arguments are: no gradient comes from it.
        known = (call.tokens.adapter_ids >= -1) & (call.tokens.adapter_ids < problem.adapters)
        dy = jnp.where(known[:, None], dy, 0)
    buffers["dy"] = dy
    if kept.pre_activations is not None:
        buffers["pre_activations"] = kept.pre_activations
    of = {name: inputs[name.removesuffix("_grad")] for name in results}
    wanted = {name.removesuffix("_grad"): buffer.dtype.name for name, buffer in of.items()}
    is_kept = kept.pre_activations is not None
    written = launch(plan_moe_backward(problem, wanted, is_kept, gpu.capability, gpu.table), buffers, gpu.capability)
    return [in_its_layer(written[name], buffer, call.layer) for name, buffer in of.items()]


def in_its_layer(grad: jax.Array, buffer: jax.Array, layer: jax.Array | None) -> jax.Array:
    """The gradient of a buffer; of one that is a stack of layers, among those of the other layers, which are zero."""
    if layer is None or grad.shape == buffer.shape:
        return grad
    return lax.dynamic_update_index_in_dim(jnp.zeros_like(buffer), grad, layer[0], axis=0)


def problem_of(call: Call, options: Options, gpu: Gpu, *, gradient: bool) -> tuple[dict[str, jax.Array], "MoeProblem"]:
    """A call's buffers and the problem that they pose, unpacked where kernels for packed weights are missing."""
    from jmoe.triton_src.problem import Layout, MoeProblem
    from jmoe.triton_src.tiles import layer_tile

    buffers = buffers_of(call)
    kinds = {Mxfp4: Layout.MXFP4, PackedMxfp4: Layout.PACKED}
    weights = {"gate_up": call.experts.gate_up, "down": call.experts.down}
    layouts = {name: kinds.get(type(weight), Layout.DENSE) for name, weight in weights.items()}
    problem = MoeProblem.from_shapes(
        {name: array.shape for name, array in buffers.items()},
        intermediate=options.intermediate,
        layouts=layouts,
        top_k=options.top_k,
        activation=options.activation,
        scoring=options.scoring,
    )
    is_read = problem.packed and layer_tile(gpu.table, problem.rows_of_expert, packed=True, gradient=gradient)
    if Layout.PACKED in layouts.values() and not is_read:
        one = call.of_one_layer()
        return problem_of(dataclasses.replace(one, experts=unpack(one.experts)), options, gpu, gradient=gradient)
    return buffers, problem


def route_and_sort(
    router_logits: jax.Array, zeros: jax.Array, *, top_k: int, target: Target | None = None
) -> dict[str, jax.Array]:
    """The launches that precede a layer's products on packed experts, alone, for a GPU. For measuring them.

    zeros: int32, of which the first is read. The result's "ready_counters" are zeros: given to the next call, they make
    the calls run one after another, which as nodes of one CUDA graph would run side by side.
    """
    gpu = gpu_of(target)
    from jmoe.triton_src.routing.plan import plan_routing
    from jmoe.triton_src.routing.problem import RouteProblem
    from jmoe.triton_src.tiles import layer_tile

    tokens, experts = router_logits.shape
    rows = tokens * top_k / experts
    tile = layer_tile(gpu.table, rows, packed=True) or layer_tile(gpu.table, rows, packed=False)
    assert tile is not None
    problem = RouteProblem(
        tokens=tokens,
        top_k=top_k,
        experts=experts,
        router_experts=experts,
        expert_offset=True,
        block_m=tile.block_m,
        hidden=None,
        counters=True,
    )
    given = {"router_logits": router_logits, "expert_offset": zeros}
    buffers = launch(plan_routing(problem, gpu.table), given, gpu.capability)
    return {name: buffers[name] for name in ("weights", "order", "tiles", "ready_counters")}


def check_triton_takes(call: Call) -> None:
    """Raises NotImplementedError for what only backend "xla" computes."""
    if jax.export.is_symbolic_dim(tokens := call.tokens.x.shape[0]):
        raise NotImplementedError(
            f"the Triton backend takes numbers of tokens, got {tokens}: export one program for each"
        )
    for name, array in (("x", call.tokens.x), ("gate_up", call.experts.gate_up), ("down", call.experts.down)):
        if not isinstance(array, Mxfp4 | PackedMxfp4) and array.dtype != jnp.bfloat16:
            raise NotImplementedError(f'the Triton backend takes bfloat16 {name}, got {array.dtype}; use backend="xla"')
