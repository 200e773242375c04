"""vLLM's fused_moe_lora: adapters on the experts, as additions to a layer that another kernel computes.

Not installed by jmoe. Measured where vLLM, or its file vllm/lora/ops/triton_ops/fused_moe_lora_op.py, can be imported.
"""

from collections.abc import Callable
from typing import Any

import torch

from jmoe.bench.peers.vllm_blocks import in_blocks
from jmoe.interop.moe import LoraLike

NAIVE_TOKENS = 16
"""Up to so many tokens vLLM gives each pair a block of its own instead of sorting pairs by expert."""


def missing() -> str | None:
    """Why the peer cannot run here, or None if it can."""
    if not torch.cuda.is_available():
        return "no GPU"
    try:
        kernels()
    except ImportError as error:
        return "not installed" if (error.name or "").split(".")[0] == "vllm" else f"import: {error}"
    return None


def kernels() -> Any:
    """The function that launches them."""
    from vllm.lora.ops.triton_ops.fused_moe_lora_op import _fused_moe_lora

    return _fused_moe_lora


def prepare(lora: LoraLike) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Callable[[], None]]:
    """Takes one adapter's A and B [1, E, ...] and returns: (x [T, H], experts [T, k], weights [T, k]) -> a call of both
    projections, gate_up on x and down on random activations, with adapter 0 for all tokens.

    Raises:
      ValueError: the adapter leaves a projection out.
    """
    fused_moe_lora = kernels()
    if lora.gate_up_a is None or lora.gate_up_b is None or lora.down_a is None or lora.down_b is None:
        raise ValueError("the peer is set up for adapters of both projections")
    rank, hidden = lora.gate_up_a.shape[2:]
    count, intermediate = lora.down_a.shape[1], lora.down_a.shape[3]
    gate_up_a = [lora.gate_up_a, lora.gate_up_a]
    gate_up_b = [lora.gate_up_b[:, :, half::2].contiguous() for half in (0, 1)]

    def on(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> Callable[[], None]:
        tokens, top_k = chosen.shape
        ints: dict[str, Any] = {"device": x.device, "dtype": torch.int32}
        floats: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
        block = 16 if tokens <= 256 else 64
        slots: tuple[Any, Any, Any] = (None, chosen.flatten().int(), None)
        if tokens > NAIVE_TOKENS:
            blocks = in_blocks(chosen, count, block)
            slots = (blocks.slots[None], blocks.experts[None], blocks.used)
        shared = (
            weights, *slots,
            torch.zeros(tokens, **ints), rank, top_k, torch.tensor([0, -1], **ints),
            torch.tensor([1], dtype=torch.int32), torch.ones(2, **ints),
        )  # fmt: skip
        sizes = launch_parameters(rank, block)
        activations = torch.randn(tokens * top_k, intermediate, **floats)
        gate_up = torch.zeros(tokens, top_k, 2 * intermediate, **floats)
        down = torch.zeros(tokens, top_k, hidden, **floats)

        def call() -> None:
            fused_moe_lora(gate_up, x, gate_up_a, gate_up_b, *shared, **sizes)
            fused_moe_lora(
                down, activations, [lora.down_a], [lora.down_b], *shared, mul_routed_weight=True, **sizes
            )  # fmt: skip

        return call

    return on


def launch_parameters(rank: int, block: int) -> dict[str, int]:
    """Tile sizes, as vLLM sets them where it has no tuned table."""
    both = {"block_size_m": block, "group_size_m": 8, "num_warps": 4, "num_stages": 3, "split_k": 1}
    parameters = {f"{part}_{name}": value for part in ("shrink", "expand") for name, value in both.items()}
    parameters |= {"shrink_block_size_n": min(64, rank), "shrink_block_size_k": 64}
    return parameters | {"expand_block_size_n": 64, "expand_block_size_k": 16}
