"""The layer in plain torch: dequantise, then multiply. Independent of the kernels and of the JAX side.

The dtype says at what precision it runs: float64 is the reference that results are judged by, bfloat16 is what a
PyTorch user would compute, whose error is the yardstick.
"""

import torch

from jmoe.interop.moe import ExpertsLike, LoraLike, Mxfp4Like, RoutingLike
from jmoe.triton_src.activation import SwiGLU
from jmoe.triton_src.scoring import Scoring

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dequantize(weight: Mxfp4Like | torch.Tensor, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's [N, K], exact in every dtype for the scales that checkpoints hold.

    Values go through bfloat16, the kernels' operand type: scale byte 254 overflows to infinity there; byte 255 is NaN.
    """
    if isinstance(weight, torch.Tensor):
        return weight[expert].to(dtype)
    blocks, scales = weight.blocks[expert], weight.scales[expert]
    table = torch.tensor(_E2M1, dtype=torch.float64, device=blocks.device)
    values = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], dim=-1).flatten(-2)
    factor = torch.exp2(scales.to(torch.float64) - 127)
    factor = torch.where(scales == 255, torch.nan, factor)
    return (values * factor[..., None]).flatten(-2).to(torch.bfloat16).to(dtype)


def route(
    router_logits: torch.Tensor,
    top_k: int,
    scoring: Scoring = Scoring(),
    choice_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(experts int64 [T, k], weights [T, k]): the best scores, weights made of them; ties go to the lower expert."""
    scores = torch.softmax(router_logits, dim=1) if scoring.function == "softmax" else torch.sigmoid(router_logits)
    best = router_logits if choice_bias is None else scores + choice_bias.detach().to(scores.dtype)
    order = torch.argsort(best, dim=1, descending=True, stable=True)[:, :top_k]
    if scoring.of_chosen_logits and choice_bias is None:
        return order, torch.softmax(torch.gather(router_logits, 1, order), dim=1) * scoring.scale
    weights = torch.gather(scores, 1, order)
    if scoring.renormalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    return order, weights * scoring.scale


def swiglu(z: torch.Tensor, activation: SwiGLU) -> torch.Tensor:
    """[..., 2I] of gate and up -> [..., I]."""
    gate, up = (z[..., 0::2], z[..., 1::2]) if activation.interleaved else z.chunk(2, dim=-1)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.offset)


def project(
    x: torch.Tensor,
    expert: int,
    weight: Mxfp4Like | torch.Tensor,
    bias: torch.Tensor | None,
    lora: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    adapter_ids: torch.Tensor,
) -> torch.Tensor:
    """x [M, K] W[expert]^T + bias, plus LoRA (a, b, scale) for the rows whose adapter id is not -1."""
    z = x @ dequantize(weight, expert, x.dtype).T
    if bias is not None:
        z = z + bias[expert].to(x.dtype)
    if lora is not None:
        a, b, scale = lora
        for adapter in range(a.shape[0]):
            mine = adapter_ids == adapter
            delta = x[mine] @ a[adapter, expert].to(x.dtype).T @ b[adapter, expert].to(x.dtype).T
            z[mine] = z[mine] + delta * scale[adapter].to(x.dtype)
    return z


def moe(
    x: torch.Tensor,
    router_logits: torch.Tensor | None,
    experts: ExpertsLike,
    *,
    top_k: int,
    lora: LoraLike | None = None,
    adapter_ids: torch.Tensor | None = None,
    routing: RoutingLike | None = None,
    scoring: Scoring = Scoring(),
    choice_bias: torch.Tensor | None = None,
    activation: SwiGLU = SwiGLU(),
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """y [T, H] in `dtype`, expert by expert; arguments as in jmoe.interop.moe."""
    x = x.to(dtype)
    if routing is not None:
        chosen, weights = routing.experts.long(), routing.weights.to(dtype)
    elif router_logits is not None:
        chosen, weights = route(router_logits.to(dtype), top_k, scoring, choice_bias)
    else:
        raise ValueError("router_logits may be None only when routing is given")
    if adapter_ids is None:
        adapter_ids = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)

    def lora_of(projection: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        a, b, scale = (getattr(lora, f"{projection}_{part}", None) for part in ("a", "b", "scale"))
        return None if a is None or b is None or scale is None else (a, b, scale)

    y = torch.zeros_like(x)
    down = experts.down
    for expert in range((down if isinstance(down, torch.Tensor) else down.scales).shape[0]):
        token, choice = torch.nonzero(chosen == expert, as_tuple=True)
        if token.numel() == 0:
            continue
        ids = adapter_ids[token]
        z = project(x[token], expert, experts.gate_up, experts.gate_up_bias, lora_of("gate_up"), ids)
        h = swiglu(z, activation)
        out = project(h, expert, experts.down, experts.down_bias, lora_of("down"), ids)
        y.index_add_(0, token, out * weights[token, choice][:, None])
    return y
