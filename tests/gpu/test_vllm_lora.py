"""vLLM's fused_moe_lora as a second opinion: its adapters on a plain torch layer against jmoe's layer."""

import pytest
import torch

from jmoe.triton_src.activation import SwiGLU
from tests import torch_layers
from tests.tolerances import BFLOAT16

pytestmark = pytest.mark.gpu

TOKENS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, RANK = 16, 8, 4, 2880, 2880, 16


def vllm_delta(
    x: torch.Tensor,
    slices: list[tuple[torch.Tensor, torch.Tensor]],
    chosen: torch.Tensor,
    weights: torch.Tensor,
    out: int,
    *,
    down: bool,
) -> torch.Tensor:
    """[T, k, out]: what fused_moe_lora adds for each pair; a slice is a [E, r, K] and b [E, N, r].

    gate_up takes a row a token; down takes a row a pair and multiplies by the routing weight.
    """
    op = pytest.importorskip("vllm.lora.ops.triton_ops.fused_moe_lora_op", reason="vLLM's kernels are not here")
    ints = {"device": x.device, "dtype": torch.int32}
    blocks = {"block_size_m": 16, "group_size_m": 8, "num_warps": 4, "num_stages": 3, "split_k": 1}
    config = {f"{part}_{name}": value for part in ("shrink", "expand") for name, value in blocks.items()}
    config |= {"shrink_block_size_n": RANK, "shrink_block_size_k": 64}
    config |= {"expand_block_size_n": 64, "expand_block_size_k": 16}
    delta = torch.zeros(chosen.shape[0], TOP_K, out, device=x.device, dtype=x.dtype)
    op._fused_moe_lora(
        delta, x, [a[None] for a, _ in slices], [b[None] for _, b in slices], weights,
        None, chosen.flatten().int(), None,
        torch.zeros(chosen.shape[0], **ints), RANK, TOP_K, torch.tensor([0, -1], **ints),
        torch.tensor([1], dtype=torch.int32), torch.ones(2, **ints), mul_routed_weight=down, **config,
    )  # fmt: skip
    return delta


def test_a_layer_with_vllms_adapters_agrees() -> None:
    from jmoe.interop import reference
    from jmoe.interop.moe import moe

    layer = torch_layers.random_layer(
        tokens=TOKENS, hidden=HIDDEN, intermediate=INTERMEDIATE, experts=EXPERTS, top_k=TOP_K,
        adapters=1, gate_up_rank=RANK, down_rank=RANK,
    )  # fmt: skip
    layer = torch_layers.transform(layer, lambda tensor: tensor.cuda())
    lora = layer.lora
    lora.gate_up_scale[:], lora.down_scale[:] = 1, 1  # vLLM folds the scale into B
    chosen, weights = reference.route(layer.router_logits.float(), TOP_K)

    a, b = lora.gate_up_a[0].contiguous(), lora.gate_up_b[0]
    halves = [(a, b[:, 0::2].contiguous()), (a, b[:, 1::2].contiguous())]
    gate, up = (
        vllm_delta(layer.x, halves, chosen, weights, 2 * INTERMEDIATE, down=False).float().split(INTERMEDIATE, dim=-1)
    )
    first = torch.stack([gate, up], dim=-1).flatten(-2)
    ids = torch.full((1,), -1, dtype=torch.int32, device="cuda")
    hidden = torch.empty(TOKENS, TOP_K, INTERMEDIATE, device="cuda", dtype=torch.bfloat16)
    x = layer.x.float()
    for t in range(TOKENS):
        for j in range(TOP_K):
            expert = int(chosen[t, j])
            z = reference.project(x[t : t + 1], expert, layer.experts.gate_up, layer.experts.gate_up_bias, None, ids)
            hidden[t, j] = reference.swiglu(z + first[t, j], SwiGLU())[0]
    slices = [(lora.down_a[0].contiguous(), lora.down_b[0].contiguous())]
    second = vllm_delta(hidden.view(-1, INTERMEDIATE), slices, chosen, weights, HIDDEN, down=True).float()
    y = torch.zeros(TOKENS, HIDDEN, device="cuda")
    for t in range(TOKENS):
        for j in range(TOP_K):
            h, expert = hidden[t, j].float()[None], int(chosen[t, j])
            out = reference.project(h, expert, layer.experts.down, layer.experts.down_bias, None, ids)[0]
            y[t] += weights[t, j] * out + second[t, j]

    exact = reference.moe(layer.x, layer.router_logits, layer.experts, **layer.options)
    ours = moe(layer.x, layer.router_logits, layer.experts, **layer.options)
    assert torch_layers.relative_error(y, exact) <= 1e-2  # theirs rounds each delta to bf16
    assert torch_layers.relative_error(ours, exact) <= BFLOAT16.relative
    assert torch_layers.relative_error(ours, y.double()) <= 1e-2
