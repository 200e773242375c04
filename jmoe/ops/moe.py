"""The mixture-of-experts layer."""

import dataclasses
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int32

from jmoe.ops.call import Call, Options, Tokens
from jmoe.ops.check import check_experts, check_lora, check_options, check_tokens, one_layer
from jmoe.ops.experts import Experts, Lora
from jmoe.ops.gradient import moe_by_platform
from jmoe.ops.launch.layer import check_triton_takes
from jmoe.ops.mesh_axes import MeshAxes
from jmoe.ops.routing import Routing
from jmoe.ops.sharding import on_mesh
from jmoe.ops.target import Target
from jmoe.ops.xla.moe import moe_xla
from jmoe.triton_src.activation import SwiGLU
from jmoe.triton_src.scoring import Scoring

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
    scoring: Scoring = Scoring(),
    choice_bias: Float[Array, " E"] | None = None,
    activation: SwiGLU = SwiGLU(),
    recompute: bool = False,
    mesh_axes: MeshAxes | None = None,
    backend: Backend = None,
) -> Float[Array, "... H"]:
    """y = sum over a token's top_k experts of weight * (down @ activation(gate_up @ x + bias) + bias), LoRA included.

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
      scoring: how weights are made of the router's logits, gpt-oss's unless another is given; see jmoe.Scoring.
      choice_bias: bfloat16 or float32 [E], added to the router's scores for the choice alone; without a gradient.
      activation: what comes between the two products, gpt-oss's unless another is given; see jmoe.SwiGLU.
      recompute: the gradient keeps x and the routing alone, and computes gate_up's results [tokens * top_k, 2I] in
        bfloat16 again, which it keeps otherwise.
      mesh_axes: the axes of a mesh that split experts and tokens, where these are Auto; see docs/mesh.md.
      backend: "triton", "xla", Target("sm_90") for Triton on a GPU that is not here, or None: Triton where this is
        lowered for CUDA, XLA elsewhere.

    Returns:
      y like x. Its gradient is in x, the router's logits or the routing's weights, LoRA's A and B, and biases; LoRA's
      scales are constants, and so are the experts' weights but for bf16 ones on the XLA backend.

    Raises:
      ValueError: the arguments do not fit together, or the user's tile table for this GPU (see `jmoe tune`) is invalid.
      NotImplementedError: the Triton backend, named or chosen, cannot do it: another platform than CUDA, a GPU older
        than 8.0 or none here and no Target, another dtype than bfloat16, a gradient in the experts' weights.
      ImportError: the Triton backend was lowered without Triton and jax-triton, or with too old ones.
    """
    one, one_lora = (experts, lora) if layer is None else one_layer(experts, lora, layer)
    tokens = Tokens(x, None if routing is not None else router_logits, routing, adapter_ids)
    count, hidden, intermediate = check_experts(one)
    adapters = check_lora(one_lora, count, hidden, intermediate)
    top_k = check_tokens(tokens, top_k, count, hidden, adapters)
    columns, choice_bias = (0, None) if tokens.router_logits is None else (tokens.router_logits.shape[-1], choice_bias)
    check_options(one, activation, backend, expert_offset, scoring=scoring, choice_bias=choice_bias, columns=columns)
    target = backend if isinstance(backend, Target) else None
    options = Options(intermediate, top_k, activation, target, backend is not None, recompute, scoring)
    run = _Run(options, backend == "xla")
    return on_mesh(run, tokens, experts, lora if adapters else None, expert_offset, layer, choice_bias, mesh_axes)


@dataclasses.dataclass(frozen=True)
class _Run:
    """y of arguments as they are on one device; equal if what is static about them is."""

    options: Options
    xla: bool

    def __call__(
        self, tokens: Tokens, experts: Experts, lora: Lora | None, expert_offset: Any, layer: Any, choice_bias: Any
    ) -> jax.Array:
        call = Call.of_arguments(tokens, experts, lora, expert_offset, layer, choice_bias)
        if self.options.forced and not self.xla:
            check_triton_takes(call)
        return (moe_xla if self.xla else moe_by_platform)(self.options, call).reshape(tokens.x.shape)
