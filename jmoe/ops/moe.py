"""The mixture-of-experts layer."""

import functools
import math
from typing import Literal

import jax
from jaxtyping import Array, Float, Int32

from jmoe.ops.buffers import Options, name_buffers
from jmoe.ops.check import check_backend, check_moe, one_layer
from jmoe.ops.experts import Experts, Lora
from jmoe.ops.gradient import moe_by_platform
from jmoe.ops.launch.layer import check_dtypes
from jmoe.ops.reference import adapter_count
from jmoe.ops.routing import Routing, as_int
from jmoe.ops.sharding import by_auto_axes, vary_alike
from jmoe.ops.target import Target
from jmoe.ops.xla.moe import moe_xla

type Backend = Literal["triton", "xla"] | Target | None


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
    layer: Int32[Array, ""] | int | None = None,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    recompute: bool = False,
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
        all. An id that no adapter has is an error when concrete, and makes its token NaN when traced, from which no
        gradient comes.
      routing: a choice of experts to use instead of the logits', which are then ignored and may be None.
      expert_offset: `experts` holds the experts from this one on, of more that the router knows; pairs of others add
        nothing, so that shards sum to the whole. May be traced, and have shape (1,).
      layer: the experts' arrays have a leading axis for layers, of which this is the one; lora's have it too or not.
        May be traced, and must then be one of them. In a lax.scan over layers the kernels read a stack in place, where
        slices would be copied.
      recompute: the gradient keeps x and the routing alone, and computes gate_up's results [tokens * top_k, 2I] in
        bfloat16 again, which it keeps otherwise.
      swiglu_alpha, swiglu_limit: of gpt-oss's activation; see jmoe.ops.reference.swiglu.
      backend: "triton", "xla", Target("sm_90") for Triton on a GPU that is not here, or None: Triton where this is
        lowered for CUDA, XLA elsewhere.

    Returns:
      y like x. Its gradient is in x, the router's logits or the routing's weights, LoRA's A and B, and biases; LoRA's
      scales are constants, and so are the experts' weights but for bf16 ones on the XLA backend.

    Raises:
      ValueError: the arguments do not fit together, or the user's tile table for this GPU (see `jmoe tune`) is none.
      NotImplementedError: the Triton backend, named or chosen, cannot do it: another platform than CUDA, a GPU older
        than 8.0 or none here and no Target, another dtype than bfloat16, a gradient in the experts' weights.
      ImportError: the Triton backend was lowered without Triton and jax-triton, or with too old ones.
    """
    one, one_lora = (experts, lora) if layer is None else one_layer(experts, lora, layer)
    top_k = as_int("top_k", top_k)
    check_moe(x, router_logits, one, top_k, one_lora, adapter_ids, routing, expert_offset)
    check_backend(backend)
    if one_lora is not None and adapter_count(one_lora) == 0:
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
        layer,
    )
    buffers = vary_alike(named)
    options = Options(
        one.down.shape[2],
        top_k,
        float(swiglu_alpha),
        float(swiglu_limit),
        capability=backend.capability if isinstance(backend, Target) else None,
        forced=backend is not None,
        recompute=recompute,
    )
    if options.forced and backend != "xla":
        check_dtypes(buffers)
    run = moe_xla if backend == "xla" else moe_by_platform
    return by_auto_axes(functools.partial(run, options), buffers).reshape(x.shape)


def flatten_tokens(array: jax.Array, axes: int) -> jax.Array:
    """Merges the first `axes` axes into one."""
    return array.reshape(math.prod(array.shape[:axes]), *array.shape[axes:])
