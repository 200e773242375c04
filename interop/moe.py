"""The mixture-of-experts layer on torch tensors, by the launches that the JAX side runs."""

from typing import Any, Protocol

import torch

from jmoe.interop.check import check_buffers
from jmoe.interop.gradient import DifferentiableMoe, Options, check_gradient, run
from jmoe.interop.launch import capability_of
from jmoe.triton_src.activation import SwiGLU, check_activation
from jmoe.triton_src.portable.grouped_matmul import grouped_matmul_kernel
from jmoe.triton_src.problem import Layout
from jmoe.triton_src.scoring import Scoring, not_a_scoring


class Mxfp4Like(Protocol):
    """MXFP4 bytes as torch tensors: blocks [E, N, K/32, 16] and scales [E, N, K/32]."""

    @property
    def blocks(self) -> torch.Tensor: ...
    @property
    def scales(self) -> torch.Tensor: ...


class PackedMxfp4Like(Protocol):
    """Packed MXFP4 bytes as torch tensors; see jmoe.PackedMxfp4."""

    @property
    def words(self) -> torch.Tensor: ...
    @property
    def scales(self) -> torch.Tensor: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...


class ExpertsLike(Protocol):
    """jmoe.Experts with torch tensors for leaves, or anything with its fields."""

    @property
    def gate_up(self) -> Mxfp4Like | torch.Tensor: ...
    @property
    def gate_up_bias(self) -> torch.Tensor | None: ...
    @property
    def down(self) -> Mxfp4Like | torch.Tensor: ...
    @property
    def down_bias(self) -> torch.Tensor | None: ...


class PackedExpertsLike(Protocol):
    """What jmoe.pack returns, with torch tensors for leaves."""

    @property
    def gate_up(self) -> PackedMxfp4Like: ...
    @property
    def gate_up_bias(self) -> torch.Tensor | None: ...
    @property
    def down(self) -> PackedMxfp4Like: ...
    @property
    def down_bias(self) -> torch.Tensor | None: ...


class LoraLike(Protocol):
    """jmoe.Lora with torch tensors for leaves, or anything with its fields."""

    @property
    def gate_up_a(self) -> torch.Tensor | None: ...
    @property
    def gate_up_b(self) -> torch.Tensor | None: ...
    @property
    def gate_up_scale(self) -> torch.Tensor | None: ...
    @property
    def down_a(self) -> torch.Tensor | None: ...
    @property
    def down_b(self) -> torch.Tensor | None: ...
    @property
    def down_scale(self) -> torch.Tensor | None: ...


class RoutingLike(Protocol):
    """jmoe.Routing with torch tensors: experts int32 [T, k], weights float32 [T, k]."""

    @property
    def experts(self) -> torch.Tensor: ...
    @property
    def weights(self) -> torch.Tensor: ...


def moe(
    x: torch.Tensor,
    router_logits: torch.Tensor | None,
    experts: ExpertsLike | PackedExpertsLike,
    *,
    top_k: int,
    lora: LoraLike | None = None,
    adapter_ids: torch.Tensor | None = None,
    routing: RoutingLike | None = None,
    expert_offset: torch.Tensor | None = None,
    scoring: Scoring = Scoring(),
    choice_bias: torch.Tensor | None = None,
    activation: SwiGLU = SwiGLU(),
    recompute: bool = False,
) -> torch.Tensor:
    """y [T, H] like x; arguments as in jmoe.moe, with torch tensors for leaves and two-dimensional x.

    x bf16 [T, H] on a CUDA device, or on the CPU in Triton's interpreter. No tensor is copied or converted. Adapter ids
    are not read on the host: an id that no adapter has makes its token NaN. autograd differentiates x, router_logits or
    the routing's weights, LoRA's A and B, and biases; choice_bias has no gradient.

    Raises:
      ValueError: an argument is not a tensor, or its shape or dtype does not fit the others'; it is on another device
        than x, not contiguous or not aligned to 16 bytes; adapters and adapter_ids do not go together; packed weights
        with an activation of halves; or the user's tile table for this GPU (see `jmoe tune`) is invalid.
      NotImplementedError: no GPU and no interpreter, packed weights where no kernel reads them, a gradient in the
        experts' weights, or a second derivative.
    """
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim != 2 or x.dtype != torch.bfloat16:
        raise ValueError(f"x must be bfloat16 [T, H], got {x.dtype} with shape {tuple(x.shape)}")
    if routing is None and router_logits is None:
        raise ValueError("router_logits may be None only when routing is given")
    if not isinstance(scoring, Scoring):
        raise ValueError(not_a_scoring(scoring))
    buffers = tensors_by_name(x, router_logits, experts, lora, adapter_ids, routing, expert_offset)
    if choice_bias is not None and routing is None:
        buffers["choice_bias"] = choice_bias.detach() if isinstance(choice_bias, torch.Tensor) else choice_bias
    layouts = {"gate_up": layout_of(experts.gate_up), "down": layout_of(experts.down)}
    packed = layouts["gate_up"] is Layout.PACKED
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise ValueError(f"top_k must be an int, got {top_k!r}")
    intermediate = intermediate_size(experts.gate_up)
    check_buffers(buffers, layouts, top_k, intermediate)
    check_activation(activation, packed)
    options = Options(intermediate, layouts, top_k, activation, recompute, scoring)
    capability_of(x.device, grouped_matmul_kernel)
    if x.numel() == 0:
        return torch.zeros_like(x) + 0 * sum(tensor.sum() for tensor in buffers.values() if tensor.requires_grad)
    if packed and x.device.type == "cpu":
        raise NotImplementedError("packed weights are read on a GPU alone: Triton's interpreter takes no Gluon kernels")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in buffers.values()):
        check_gradient(buffers)
        return DifferentiableMoe.apply(options, tuple(buffers), *buffers.values())
    return run(options, buffers)["y"]


def tensors_by_name(
    x: torch.Tensor,
    router_logits: torch.Tensor | None,
    experts: ExpertsLike | PackedExpertsLike,
    lora: LoraLike | None,
    adapter_ids: torch.Tensor | None,
    routing: RoutingLike | None,
    expert_offset: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """A call's tensors by the names that launch plans use; the logits are left out where a routing is given.

    Raises:
      ValueError: a projection has a part of LoRA and lacks another.
    """
    named: dict[str, Any] = {"x": x}
    if routing is None:
        named["router_logits"] = router_logits
    else:
        named |= {"experts": routing.experts, "weights": routing.weights}
    named |= {"expert_offset": expert_offset, "adapter_ids": adapter_ids}
    for projection in ("gate_up", "down"):
        weight: Any = getattr(experts, projection)
        match layout_of(weight):
            case Layout.DENSE:
                named[projection] = weight
            case Layout.MXFP4:
                named |= {projection: weight.blocks, f"{projection}_scales": weight.scales}
            case Layout.PACKED:
                named |= {projection: weight.words, f"{projection}_scales": weight.scales}
        named[f"{projection}_bias"] = getattr(experts, f"{projection}_bias")
        parts = {f"{projection}_{part}": getattr(lora, f"{projection}_{part}", None) for part in ("a", "b", "scale")}
        given = [name for name, tensor in parts.items() if tensor is not None]
        if 0 < len(given) < len(parts):
            raise ValueError(f"{projection}_a, _b and _scale must be given together or not at all, got {given}")
        named |= parts
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def layout_of(weight: Mxfp4Like | PackedMxfp4Like | torch.Tensor) -> Layout:
    """Which layout of the plans a weight is in."""
    if isinstance(weight, torch.Tensor):
        return Layout.DENSE
    return Layout.PACKED if hasattr(weight, "words") else Layout.MXFP4


def intermediate_size(gate_up: Mxfp4Like | PackedMxfp4Like | torch.Tensor) -> int:
    """I of a layer by its gate_up weight [E, 2I, H]."""
    return (gate_up.scales.shape[1] if not hasattr(gate_up, "shape") else gate_up.shape[1]) // 2
