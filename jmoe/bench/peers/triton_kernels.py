"""OpenAI's triton_kernels running the same layer: the peer that jmoe is compared with and measured beside.

Not installed by jmoe; `pip install --group peers` from a checkout gets it. PyPI's project of that name is another one.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from jmoe.interop.moe import ExpertsLike, Mxfp4Like, RoutingLike
from jmoe.triton_src.activation import SwiGLU


def missing() -> str | None:
    """Why the peer cannot run here, or None if it can."""
    if not torch.cuda.is_available():
        return "no GPU"
    if importlib.util.find_spec("triton_kernels") is None:
        return "not installed"
    if importlib.util.find_spec("triton_kernels.matmul_ogs") is None:
        return "another project of that name"
    return None


def prepare(
    experts: ExpertsLike, *, num_warps: int, activation: SwiGLU = SwiGLU()
) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    """Swizzles MXFP4 experts once and returns the block: (x, what `route` returned) -> y [T, H].

    num_warps is that of the kernels the weights are laid out for: 4 is best at few tokens, 8 at many.

    Raises:
      ValueError: an activation that the peer does not have, or experts that are not MXFP4.
    """
    if activation.offset != 1 or activation.limit is None or not activation.interleaved:
        raise ValueError(f"the peer has gpt-oss's activation with any alpha and limit, got {activation}")
    import triton_kernels.matmul_ogs_details.opt_flags as opt_flags
    import triton_kernels.swiglu as swiglu
    from triton_kernels.matmul_ogs import FlexCtx, FnSpecs, FusedActivation, PrecisionConfig, matmul_ogs
    from triton_kernels.numerics import InFlexData
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details import layout

    opt_flags.update_opt_flags_constraints({"split_k": 1})  # as vLLM sets it on Hopper

    def swizzle(weight: Mxfp4Like | torch.Tensor) -> tuple[Any, Any]:
        if isinstance(weight, torch.Tensor):
            raise ValueError(f"the peer is set up for MXFP4 experts, got {weight.dtype}")
        weight_layout, weight_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        scale_layout, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=num_warps)
        # On Hopper its kernel reads scales past K, and 255 there would be NaN: padding with zeros is the caller's part.
        scales = torch.nn.functional.pad(weight.scales, (0, -weight.scales.shape[-1] % 4)).transpose(-2, -1)
        blocks = wrap_torch_tensor(weight.blocks.flatten(-2).transpose(-2, -1), dtype=FP4)
        scales = convert_layout(wrap_torch_tensor(scales), scale_layout, **scale_options)
        precision = PrecisionConfig(weight_scale=scales, flex_ctx=FlexCtx(rhs_data=InFlexData()))
        return convert_layout(blocks, weight_layout, **weight_options), precision

    gate_up, gate_up_precision = swizzle(experts.gate_up)
    down, down_precision = swizzle(experts.down)
    biases = [None if b is None else b.float() for b in (experts.gate_up_bias, experts.down_bias)]
    fused = FusedActivation(
        FnSpecs("swiglu", swiglu.swiglu_fn, ("alpha", "limit")), (activation.alpha, activation.limit), 2
    )

    def block(x: torch.Tensor, routed: Any) -> torch.Tensor:
        data, gather, scatter = routed
        h = matmul_ogs(
            x, gate_up, biases[0], data,
            gather_indx=gather, precision_config=gate_up_precision, fused_activation=fused,
        )  # fmt: skip
        return matmul_ogs(
            h, down, biases[1], data,
            scatter_indx=scatter, precision_config=down_precision, gammas=data.gate_scal,
        )  # fmt: skip

    return block


def route(router_logits: torch.Tensor, top_k: int) -> Any:
    """The peer's routing of these logits."""
    from triton_kernels.routing import routing

    return routing(router_logits, top_k)


def route_as(routing: RoutingLike, router_logits: torch.Tensor) -> Any:
    """The peer's routing with the experts that `routing` chose, whichever way it breaks ties itself.

    Logits that were not chosen become -inf. (Its own argument for given experts, int16, is shifted past its last bit.)
    """
    chosen = routing.experts.long()
    only = torch.full_like(router_logits, -torch.inf, dtype=torch.float32)
    only.scatter_(1, chosen, torch.gather(router_logits.float(), 1, chosen))
    return route(only, chosen.shape[1])


@dataclasses.dataclass
class Weight:
    """MXFP4 bytes."""

    blocks: torch.Tensor
    scales: torch.Tensor


@dataclasses.dataclass
class Experts:
    """As jmoe.Experts."""

    gate_up: Weight
    gate_up_bias: torch.Tensor | None
    down: Weight
    down_bias: torch.Tensor | None


def layer(x: torch.Tensor, router_logits: torch.Tensor, *, top_k: int, **weights: Any) -> torch.Tensor:
    """The peer as a function of jmoe.interop.conformance.Contract."""
    gate_up, down = (Weight(weights[f"{name}_blocks"], weights[f"{name}_scales"]) for name in ("gate_up", "down"))
    experts = Experts(gate_up, weights["gate_up_bias"], down, weights["down_bias"])
    return prepare(experts, num_warps=4)(x, route(router_logits, top_k))
