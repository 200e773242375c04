"""The mixture-of-experts layer."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.interpreters import mlir, xla
from jaxtyping import Array, Float, Int32

from jmoe.ops.check import check_moe
from jmoe.ops.experts import Experts, Lora
from jmoe.ops.launch import check_dtypes, moe_p
from jmoe.ops.mxfp4 import Mxfp4, PackedMxfp4
from jmoe.ops.reference import adapter_count, moe_reference
from jmoe.ops.routing import Routing, route
from jmoe.ops.sharding import vary_alike
from jmoe.ops.target import Target

type Backend = Literal["triton", "xla"] | Target | None
type Buffers = dict[str, jax.Array]


class Options(NamedTuple):
    """What is static about a call on the Triton backend."""

    intermediate: int
    top_k: int
    swiglu_alpha: float
    swiglu_limit: float
    capability: int | None  # None: that of the GPU at hand when lowered
    forced: bool  # the caller named the Triton backend, so that what it cannot do is an error at once


def moe(
    x: Float[Array, "... H"],
    router_logits: Float[Array, "... E"] | None,
    experts: Experts,
    *,
    top_k: int,
    lora: Lora | None = None,
    adapter_ids: Int32[Array, "..."] | None = None,
    routing: Routing | None = None,
    expert_offset: Int32[Array, ""] | int = 0,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    backend: Backend = None,
) -> Float[Array, "... H"]:
    """y = sum over each token's top_k experts of weight * (down @ swiglu(gate_up @ x + bias) + bias), LoRA included.

    Args:
      x: bfloat16 or float32 [..., H]; the Triton backend takes bfloat16 alone.
      router_logits: bfloat16 or float32 [..., E]; routed as jmoe.route does.
      experts: the weights; see jmoe.Experts.
      top_k: experts a token.
      lora: adapters on the experts; see jmoe.Lora.
      adapter_ids: int32 [...], the adapter of each token, -1 for none. None with a Lora of one adapter: adapter 0 for
        all. An id that no adapter has is an error when concrete, and makes its token NaN when traced.
      routing: a choice of experts to use instead of the logits', which are then ignored and may be None.
      expert_offset: `experts` holds the experts from this one on, of more that the router knows; pairs of others add
        nothing, so that shards sum to the whole. May be traced.
      swiglu_alpha, swiglu_limit: of gpt-oss's activation; see jmoe.ops.reference.swiglu.
      backend: "triton", "xla", Target("sm_90") for Triton on a GPU that is not here, or None: Triton where this is
        lowered for CUDA, XLA elsewhere.

    Returns:
      y like x.

    Raises:
      ValueError: the arguments do not fit together, or the user's tile table for this GPU (see `jmoe tune`) is none.
      NotImplementedError: the Triton backend was asked for what it cannot do: another platform than CUDA, another dtype
        than bfloat16, a gradient.
      ImportError: the Triton backend was lowered without Triton and jax-triton, or with too old ones.
    """
    check_moe(x, router_logits, experts, top_k, lora, adapter_ids, routing)
    if not (backend in (None, "triton", "xla") or isinstance(backend, Target)):
        raise ValueError(f'backend must be "triton", "xla", a jmoe.Target or None, got {backend!r}')
    if lora is not None and adapter_count(lora) == 0:
        lora = None

    flat = functools.partial(flatten_tokens, axes=x.ndim - 1)
    named = name_buffers(
        flat(x),
        None if routing is not None or router_logits is None else flat(router_logits),
        experts,
        lora,
        None if adapter_ids is None else flat(adapter_ids),
        None if routing is None else jax.tree.map(flat, routing),
        expert_offset,
    )
    buffers = vary_alike(named)
    options = Options(
        experts.down.shape[2],
        top_k,
        float(swiglu_alpha),
        float(swiglu_limit),
        capability=backend.capability if isinstance(backend, Target) else None,
        forced=backend is not None,
    )
    if backend == "xla":
        y = moe_xla(options, buffers)
    elif options.forced:
        check_dtypes(buffers)
        y = moe_triton(options, buffers)
    else:
        y = lax.platform_dependent(
            buffers, cuda=functools.partial(moe_triton, options), default=functools.partial(moe_xla, options)
        )
    return y.reshape(x.shape)


def flatten_tokens(array: jax.Array, axes: int) -> jax.Array:
    """Merges the first `axes` axes into one."""
    return array.reshape(math.prod(array.shape[:axes]), *array.shape[axes:])


def name_buffers(
    x: jax.Array,
    router_logits: jax.Array | None,
    experts: Experts,
    lora: Lora | None,
    adapter_ids: jax.Array | None,
    routing: Routing | None,
    expert_offset: jax.Array | int,
) -> Buffers:
    """The call's arrays under the names that launch plans use."""
    buffers: dict[str, Any] = {"x": x, "router_logits": router_logits, "adapter_ids": adapter_ids}
    if routing is not None:
        buffers |= {"experts": routing.experts, "weights": routing.weights}
    if not (isinstance(expert_offset, int) and expert_offset == 0):
        buffers["expert_offset"] = jnp.asarray(expert_offset, jnp.int32).reshape(1)
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
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def moe_xla(options: Options, buffers: Buffers) -> jax.Array:
    """The layer by plain XLA operations."""

    hidden, double = buffers["x"].shape[1], 2 * options.intermediate

    def weight(projection: str) -> Mxfp4 | PackedMxfp4 | jax.Array:
        weight, scales = buffers[projection], buffers.get(f"{projection}_scales")
        if scales is None:
            return weight
        if weight.dtype == jnp.uint8:
            return Mxfp4(weight, scales)
        n, k = (double, hidden) if projection == "gate_up" else (hidden, options.intermediate)
        return PackedMxfp4(weight, scales, n, k)

    experts = Experts(weight("gate_up"), buffers.get("gate_up_bias"), weight("down"), buffers.get("down_bias"))
    parts = {f"{p}_{part}": buffers.get(f"{p}_{part}") for p in ("gate_up", "down") for part in ("a", "b", "scale")}
    lora = None if all(part is None for part in parts.values()) else Lora(**parts)
    if "experts" in buffers:
        routing = Routing(buffers["experts"], buffers["weights"])
    else:
        routing = route(buffers["router_logits"], options.top_k)
    offset = buffers["expert_offset"][0] if "expert_offset" in buffers else 0
    ids = buffers.get("adapter_ids")
    return moe_reference(buffers["x"], routing, experts, lora, ids, offset, options.swiglu_alpha, options.swiglu_limit)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def moe_triton(options: Options, buffers: Buffers) -> jax.Array:
    """The layer by Triton launches."""
    return batchable(options)(buffers)


def _moe_triton_forward(options: Options, buffers: Buffers) -> tuple[jax.Array, Buffers]:
    if options.forced:
        raise NotImplementedError(NO_GRADIENT)
    return moe_triton(options, buffers), buffers


def _moe_triton_backward(options: Options, buffers: Buffers, dy: jax.Array) -> tuple[dict[str, Any]]:
    # The choice of backend is made when lowered, and so is the error: on a CPU this branch is traced, then left out.
    return (
        {
            name: no_gradient_p.bind(dy, shape=array.shape, dtype=array.dtype)
            if jnp.issubdtype(array.dtype, jnp.floating)
            else np.zeros(array.shape, jax.dtypes.float0)
            for name, array in buffers.items()
        },
    )


moe_triton.defvjp(_moe_triton_forward, _moe_triton_backward)


TOKEN_BUFFERS = frozenset({"x", "router_logits", "adapter_ids", "experts", "weights"})
"""Buffers whose leading axis is the token, so that a batch of them is a longer one."""


@functools.cache
def batchable(options: Options) -> Callable[[Buffers], jax.Array]:
    """The primitive with a rule for vmap: more tokens where only tokens are batched, one launch after another else."""

    @custom_vmap
    def call(buffers: Buffers) -> jax.Array:
        return moe_p.bind(
            *buffers.values(),
            names=tuple(buffers),
            intermediate=options.intermediate,
            top_k=options.top_k,
            swiglu_alpha=options.swiglu_alpha,
            swiglu_limit=options.swiglu_limit,
            capability=options.capability,
        )

    @call.def_vmap
    def batch(axis_size: int, in_batched: list[dict[str, bool]], buffers: Buffers) -> tuple[jax.Array, bool]:
        batched = {name for name, is_batched in in_batched[0].items() if is_batched}
        if batched <= TOKEN_BUFFERS:
            merged = {
                name: merge_batch(array, axis_size, name in batched) if name in TOKEN_BUFFERS else array
                for name, array in buffers.items()
            }
            y = call(merged)
            return y.reshape(axis_size, y.shape[0] // axis_size, y.shape[1]), True
        moving = {name: buffers[name] for name in batched}
        return lax.map(lambda one: call({**buffers, **one}), moving), True

    return call


def merge_batch(array: jax.Array, axis_size: int, is_batched: bool) -> jax.Array:
    """[B, T, ...] -> [B * T, ...], after a broadcast from [T, ...] if the array has no batch axis."""
    if not is_batched:
        array = jnp.broadcast_to(array, (axis_size, *array.shape))
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


NO_GRADIENT = 'the Triton backend of jmoe.moe has no gradient yet; differentiate with backend="xla"'

no_gradient_p = jex.core.Primitive("jmoe_no_gradient")
"""Stands where a gradient would be, and refuses to be lowered."""

no_gradient_p.def_impl(lambda *args, **params: xla.apply_primitive(no_gradient_p, *args, **params))
no_gradient_p.def_abstract_eval(lambda dy, *, shape, dtype: dy.update(shape=shape, dtype=dtype))


def _refuse_gradient(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(NO_GRADIENT)


mlir.register_lowering(no_gradient_p, _refuse_gradient)
