"""A mixture-of-experts layer, its gradients and its routing as launches: primitives for what is traced anywhere."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import lax

from jmoe.ops.buffers import Buffers, Options, names_of_stacks, of_one_layer
from jmoe.ops.launch.calls import launch, register
from jmoe.ops.launch.local_gpu import Gpu, gpu_of
from jmoe.ops.packed import unpack_buffers
from jmoe.ops.target import Target

if TYPE_CHECKING:
    from jmoe.triton_src.problem import MoeProblem

moe_p = jex.core.Primitive("jmoe_moe")
"""Operands: the layer's buffers, in the order of the parameter `names`. Result: y like x."""

moe_forward_p = jex.core.Primitive("jmoe_moe_forward")
"""moe_p for a gradient to follow. Results: those that the parameter `results` names, y among them."""

moe_backward_p = jex.core.Primitive("jmoe_moe_backward")
"""Operands: moe_forward_p's and its results without y, and dy. Results: gradients of the operands in `wanted`."""

moe_p.def_abstract_eval(lambda *avals, names, **_: avals[names.index("x")])


def _forward_avals(*avals: Any, names: tuple[str, ...], results: tuple[str, ...], options: Options) -> list[Any]:
    x = avals[names.index("x")]
    tokens = x.shape[0]
    shapes = {
        "y": (x.shape, x.dtype),
        "experts": ((tokens, options.top_k), jnp.int32),
        "weights": ((tokens, options.top_k), jnp.float32),
        "pre_activations": ((tokens * options.top_k, 2 * options.intermediate), jnp.bfloat16),
    }
    return [x.update(shape=shapes[name][0], dtype=jnp.dtype(shapes[name][1])) for name in results]


moe_forward_p.multiple_results = True
moe_forward_p.def_abstract_eval(_forward_avals)
moe_backward_p.multiple_results = True
moe_backward_p.def_abstract_eval(lambda *avals, names, wanted, **_: [avals[names.index(name)] for name in wanted])


def _moe_launches(*arrays: jax.Array, names: tuple[str, ...], options: Options) -> jax.Array:
    """The layer as launches: what the primitive stands for on CUDA."""
    return launch_layer(dict(zip(names, arrays, strict=True)), options, gpu_of(options.target))["y"]


def _forward_launches(
    *arrays: jax.Array, names: tuple[str, ...], results: tuple[str, ...], options: Options
) -> list[jax.Array]:
    """As _moe_launches, with what the gradient needs."""
    buffers = dict(zip(names, arrays, strict=True))
    everything = launch_layer(buffers, options, gpu_of(options.target), keep=not options.recompute)
    return [everything[name] for name in results]


def _backward_launches(
    *arrays: jax.Array, names: tuple[str, ...], wanted: tuple[str, ...], options: Options
) -> list[jax.Array]:
    """The gradients as launches."""
    gradients = launch_gradients(dict(zip(names, arrays, strict=True)), wanted, options, gpu_of(options.target))
    return [gradients[name] for name in wanted]


def launch_layer(buffers: Buffers, options: Options, gpu: Gpu, *, keep: bool = False) -> Buffers:
    """The layer as launches for a GPU.

    Every buffer by name: "y", the routing's, and with `keep` pre_activations.
    """
    from jmoe.triton_src.moe import plan_moe

    check_dtypes(buffers)
    if buffers["x"].size == 0:
        tokens = buffers["x"].shape[0]
        nothing = jnp.zeros((tokens, options.top_k))
        empty = {"experts": nothing.astype(jnp.int32), "weights": nothing.astype(jnp.float32)}
        pairs = jnp.zeros((tokens * options.top_k, 2 * options.intermediate), jnp.bfloat16)
        return {"y": jnp.zeros_like(buffers["x"]), "pre_activations": pairs, **empty}
    buffers, problem = problem_of(buffers, options, gpu, gradient=keep)
    return launch(plan_moe(problem, gpu.capability, gpu.table, keep=keep), buffers, gpu.capability)


def launch_gradients(buffers: Buffers, wanted: tuple[str, ...], options: Options, gpu: Gpu) -> Buffers:
    """The gradients of the wanted buffers as launches, by the buffers' names; arguments as in launch_layer."""
    from jmoe.triton_src.moe_backward import plan_moe_backward

    if buffers["x"].size == 0 or not wanted:
        return {name: jnp.zeros_like(buffers[name]) for name in wanted}
    extra = {name: buffers[name] for name in ("dy", "pre_activations") if name in buffers}
    given = {name: array for name, array in buffers.items() if name not in extra}
    given, problem = problem_of(given, options, gpu, gradient=True)
    if "adapter_ids" in given:
        # A token whose adapter does not exist is NaN whatever the arguments are: no gradient comes from it.
        known = (given["adapter_ids"] >= -1) & (given["adapter_ids"] < problem.adapters)
        extra["dy"] = jnp.where(known[:, None], extra["dy"], 0)
    plans = plan_moe_backward(
        problem,
        {name: buffers[name].dtype.name for name in wanted},
        "pre_activations" in extra,
        gpu.capability,
        gpu.table,
    )
    everything = launch(plans, given | extra, gpu.capability)
    stacks = names_of_stacks(buffers)
    gradients = {name: everything[f"{name}_grad"] for name in wanted}
    return {
        name: in_its_layer(grad, buffers[name], buffers["layer"]) if name in stacks else grad
        for name, grad in gradients.items()
    }


def in_its_layer(grad: jax.Array, stack: jax.Array, layer: jax.Array) -> jax.Array:
    """One layer's gradient among those of the other layers, which are zero."""
    return lax.dynamic_update_index_in_dim(jnp.zeros_like(stack), grad, layer[0], axis=0)


def problem_of(buffers: Buffers, options: Options, gpu: Gpu, *, gradient: bool) -> tuple[Buffers, "MoeProblem"]:
    """The problem that the buffers pose, and they, unpacked where kernels that read packed weights are missing."""
    from jmoe.triton_src.problem import Layout, MoeProblem
    from jmoe.triton_src.tiles import packed_tile_for

    tokens = buffers["x"].shape[0]
    experts = buffers["gate_up"].shape[1 if "layer" in buffers else 0]
    packed = [buffers[projection].dtype == jnp.int32 for projection in ("gate_up", "down")]
    as_they_are = all(packed) and packed_tile_for(gpu.table, tokens * options.top_k / experts, gradient) is not None
    if any(packed) and not as_they_are:
        buffers = unpack_buffers(of_one_layer(buffers), options.intermediate)
    layouts = {jnp.dtype(jnp.int32): Layout.PACKED, jnp.dtype(jnp.uint8): Layout.MXFP4}
    problem = MoeProblem.from_shapes(
        {name: array.shape for name, array in buffers.items()},
        intermediate=options.intermediate,
        layouts={name: layouts.get(buffers[name].dtype, Layout.DENSE) for name in ("gate_up", "down")},
        top_k=options.top_k,
        activation=options.activation,
    )
    return buffers, problem


def route_and_sort(
    router_logits: jax.Array, zeros: jax.Array, *, top_k: int, target: Target | None = None
) -> dict[str, jax.Array]:
    """The launches that precede a layer's products on packed experts, alone, for a GPU. For measuring them.

    zeros: int32, of which the first is read. The result's "finished" are zeros: given to the next call, they make the
    calls run one after another, which as nodes of one CUDA graph would run side by side.
    """
    gpu = gpu_of(target)
    from jmoe.triton_src.routing.plan import plan_routing
    from jmoe.triton_src.routing.problem import RouteProblem
    from jmoe.triton_src.tiles import packed_tile_for, tile_for

    tokens, experts = router_logits.shape
    rows = tokens * top_k / experts
    tile = packed_tile_for(gpu.table, rows) or tile_for(gpu.table.grouped_matmul, rows)
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
    return {name: buffers[name] for name in ("weights", "order", "tiles", "finished")}


def check_dtypes(buffers: Mapping[str, jax.Array]) -> None:
    """Raises NotImplementedError for what only backend "xla" computes."""
    if jax.export.is_symbolic_dim(tokens := buffers["x"].shape[0]):
        raise NotImplementedError(
            f"the Triton backend takes numbers of tokens, got {tokens}: export one program for each"
        )
    for name in ("x", "gate_up", "down"):
        dtype = buffers[name].dtype
        if dtype not in (jnp.bfloat16, jnp.uint8, jnp.int32):
            raise NotImplementedError(f'the Triton backend takes bfloat16 {name}, got {dtype}; use backend="xla"')


register(moe_p, _moe_launches)
register(moe_forward_p, _forward_launches)
register(moe_backward_p, _backward_launches)
