"""What the layer does on a mesh of eight CPU devices, in a process of its own: a line of JSON for each case.

    python -m tests.ops.mesh_program CASE ...    a case is kind/backend/axes of tokens/axes of experts/what

The backend "triton" is here a stand-in for the launches, which computes the same by XLA; "opaque" is one that XLA sees
as little of as of jax-triton's: a custom call of that name, which is compiled and never run.
"""

import ctypes
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jmoe
from jmoe.ops.call import Tokens, buffers_of
from jmoe.ops.export import TRITON_CUSTOM_CALL
from jmoe.ops.launch.layer import in_its_layer, moe_p, result_avals
from jmoe.ops.mesh_axes import MeshAxes, specs_of
from jmoe.ops.random_layer import Layer, LayerShape, random_layer
from jmoe.ops.routing import route
from jmoe.ops.xla.layer import backward, forward
from jmoe.ops.xla.moe import with_routing

SHAPE = LayerShape(16, hidden=64, intermediate=96, experts=8, top_k=2, adapters=2, rank=3, mixed=True)
SENT = ("all-gather", "all-to-all", "collective-permute", "all-reduce", "reduce-scatter")


def computed(*leaves: jax.Array, tree: Any, results: tuple[str, ...], options: Any) -> list[jax.Array]:
    """The primitive's results by XLA. Like the launches, gradients are of what was kept."""
    call, kept, dy = jax.tree.unflatten(tree, leaves)
    one = call.of_one_layer()
    like, routed = buffers_of(call), with_routing(options, one)
    if dy is None:
        rows = call.tokens.x.shape[0] * options.top_k
        by_name = {
            "y": forward(options.activation, routed).astype(call.tokens.x.dtype),
            "experts": routed.tokens.routing.experts,
            "weights": routed.tokens.routing.weights,
            "pre_activations": jnp.zeros_like(routed.tokens.x, shape=(rows, 2 * options.intermediate)),
        }
        return [by_name[name] for name in results]
    names = [name.removesuffix("_grad") for name in results]
    if kept.routing is not None:
        tokens = dataclasses.replace(one.tokens, router_logits=None, routing=kept.routing)
        routed = dataclasses.replace(one, tokens=tokens)
    wanted = ["weights" if name == "router_logits" else name for name in names]
    by_name = backward(options.activation, routed, wanted, dy)
    if "router_logits" in names:
        _, pullback = jax.vjp(lambda logits: route(logits, options.top_k).weights, call.tokens.router_logits)
        by_name["router_logits"] = pullback(by_name["weights"])[0]
    return [in_its_layer(by_name[name], like[name], call.layer).astype(like[name].dtype) for name in names]


def opaque(*leaves: jax.Array, **params: Any) -> list[jax.Array]:
    """A custom call of the name of jax-triton's."""
    avals = result_avals(*map(jax.typeof, leaves), **params)
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    return jax.ffi.ffi_call(TRITON_CUSTOM_CALL, shapes, custom_call_api_version=2)(*leaves)


def stand_in(launches: Callable[..., Any]) -> None:
    mlir.register_lowering(moe_p, mlir.lower_fun(launches, multiple_results=True), platform="cpu")


def register_opaque() -> None:
    """Some function under that name, for XLA to find when it compiles."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    address = ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p).value
    capsule = new(address, b"xla._CUSTOM_CALL_TARGET", None)
    jax.ffi.register_ffi_target(TRITON_CUSTOM_CALL, capsule, platform="cpu", api_version=0)


def sent(program: str) -> list[tuple[str, str, int]]:
    """(collective, dtype, elements) of each of a compiled program's, of the largest part of its result."""
    found = []
    for result, name in re.findall(rf"= *(\(?[a-z0-9]+\[[^=]*?) ({'|'.join(SENT)})(?:-start)?\(", program):
        parts = [(dtype, shape) for dtype, shape in re.findall(r"([a-z]+[0-9]+)\[([0-9,]*)\]", result)]
        sizes = [(int(np.prod([int(size) for size in shape.split(",") if size])), dtype) for dtype, shape in parts]
        size, dtype = max(sizes)
        found.append((name, dtype, size))
    return found


def names(words: str) -> Any:
    """ "de" are two mesh axes, "-" is none."""
    return None if words == "-" else tuple(words)


def layer_of(what: str, wide: bool) -> Layer:
    layer = random_layer(dataclasses.replace(SHAPE, mxfp4="dense" not in what))
    if "packed" in what:
        layer = dataclasses.replace(layer, experts=jmoe.pack(layer.experts))
    if "stack" in what:
        stacked = lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf * 0, leaf]), tree)  # noqa: E731
        layer = dataclasses.replace(layer, experts=stacked(layer.experts), lora=stacked(layer.lora))
    if wide:
        single = lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf  # noqa: E731
        layer = jax.tree.map(single, layer)
    return layer


def function_of(what: str, backend: str | None, mesh_axes: MeshAxes | None) -> Callable[[Layer], Any]:
    """What the case computes."""

    def moe(layer: Layer, x: jax.Array, lora: jmoe.Lora, logits: jax.Array, ids: jax.Array) -> jax.Array:
        options = {"mesh_axes": mesh_axes, "backend": backend}
        if "stack" in what:
            options["layer"] = jnp.int32(1)
        return jmoe.moe(x, logits, layer.experts, top_k=2, lora=lora, adapter_ids=ids, **options)

    def y(layer: Layer, x: jax.Array, lora: jmoe.Lora, logits: jax.Array) -> jax.Array:
        if "scan" in what:
            return lax.scan(lambda x, _: (moe(layer, x, lora, logits, layer.adapter_ids), None), x, length=2)[0]
        if "vmap" in what:
            groups = [array.reshape(4, 4, *array.shape[1:]) for array in (x, logits, layer.adapter_ids)]
            return jax.vmap(lambda x, logits, ids: moe(layer, x, lora, logits, ids))(*groups).reshape(x.shape)
        return moe(layer, x, lora, logits, layer.adapter_ids)

    def loss(x: jax.Array, lora: jmoe.Lora, logits: jax.Array, layer: Layer) -> jax.Array:
        return jnp.sum(y(layer, x, lora, logits).astype(jnp.float32) ** 2)

    if "gradient" in what:
        return lambda layer: jax.grad(loss, (0, 1, 2))(layer.x, layer.lora, layer.router_logits, layer)
    return lambda layer: y(layer, layer.x, layer.lora, layer.router_logits)


def place(layer: Layer, mesh: jax.sharding.Mesh, axes: MeshAxes, stacked: bool) -> Layer:
    """The layer's arrays where these axes split them."""
    tokens = Tokens(layer.x, layer.router_logits, None, layer.adapter_ids)
    specs = specs_of(tokens, layer.experts, layer.lora, stacked, axes)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    tokens, experts, lora = jax.device_put((tokens, layer.experts, layer.lora), shardings)
    return Layer(tokens.x, tokens.router_logits, experts, lora, tokens.adapter_ids)


def errors(got: Any, want: Any) -> float:
    """The largest relative error of an array."""
    found = [0.0]
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = (np.asarray(each.astype(jnp.float32), np.float64) for each in (one, other))
        found.append(float(np.linalg.norm(one - other) / (np.linalg.norm(other) or 1)))
    return max(found)


def run(case: str) -> dict[str, Any]:
    kind, backend, tokens, experts, what = case.split("/")
    mesh = jax.make_mesh(
        (2, 4), ("d", "e"), axis_types=(AxisType.Explicit if kind == "Explicit" else AxisType.Auto,) * 2
    )
    axes = MeshAxes(names(experts) or (), P(names(tokens)))
    layer = layer_of(what, wide=backend == "xla")
    placed = place(layer, mesh, axes, "stack" in what)
    forced = "xla" if backend == "xla" else "triton"
    stand_in(opaque if backend == "opaque" else computed)
    compiled = jax.jit(function_of(what, forced, axes if kind == "named" else None)).lower(placed).compile()
    found: dict[str, Any] = {"sent": sent(compiled.as_text()), "calls": compiled.as_text().count(TRITON_CUSTOM_CALL)}
    if backend != "opaque":
        got = compiled(placed)
        found["error"] = errors(got, jax.jit(function_of(what, forced, None))(layer))
        found["spec"] = str(jax.tree.leaves(got)[0].sharding.spec)
    return found


if __name__ == "__main__":
    register_opaque()
    for case in sys.argv[1:]:
        print(json.dumps({case: run(case)}), flush=True)
