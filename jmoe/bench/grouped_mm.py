"""The layer as PyTorch users write it: rows sorted by expert, torch._grouped_mm on bfloat16 weights, weights, sum."""

from typing import Any

import jax

from jmoe.bench.case import Case, Size, calls_for
from jmoe.bench.implementation import Figures, Implementation, Measure, UnavailableError, without_lora
from jmoe.bench.weights import Weights, random_input
from jmoe.triton_src.activation import SwiGLU

NAME = "torch._grouped_mm bf16"

type Products = list[tuple[Any, Any]]
"""Weight [E, N, K] and bias [E, N] of gate_up and of down, as torch tensors."""


def products(weights: Weights) -> Products:
    """Dequantised weights and biases, over JAX's memory.

    Raises:
      UnavailableError: there is no GPU, or no torch.
    """
    if jax.default_backend() != "gpu":
        raise UnavailableError("GPU only")
    from jmoe.interop.dlpack import to_torch

    experts = jax.tree.map(to_torch, weights.dense)
    return [(experts.gate_up, experts.gate_up_bias), (experts.down, experts.down_bias)]


def prepare(weights: Weights) -> Measure:
    """The layer in CUDA graphs, routing included."""
    dense = products(weights)

    def measure(case: Case) -> Figures:
        import torch

        from jmoe.bench.torch_timing import graph_microseconds
        from jmoe.interop.dlpack import to_torch

        calls = calls_for(case.tokens)
        x, logits = (to_torch(array) for array in random_input(case, weights.size, min(calls, 8)))

        @torch.no_grad()
        def call(i: int) -> torch.Tensor:
            return grouped_layer(x, logits[i % len(logits)], dense, weights.size)

        return {NAME: graph_microseconds(call, calls)}

    return measure


def grouped_layer(x: Any, logits: Any, products: Products, size: Size) -> Any:
    """y like x."""
    import torch

    from jmoe.interop.reference import swiglu

    chosen, experts = torch.topk(logits.float(), size.top_k)
    order = torch.argsort(experts.flatten(), stable=True)
    rows = experts.flatten()[order]
    counts = torch.zeros(logits.shape[1], device=x.device, dtype=torch.int32)
    ends = counts.index_add(0, rows, torch.ones_like(rows, dtype=torch.int32)).cumsum(0).int()
    (gate_up, gate_up_bias), (down, down_bias) = products
    z = torch._grouped_mm(x[order // size.top_k], gate_up.transpose(1, 2), offs=ends) + gate_up_bias[rows]
    out = torch._grouped_mm(swiglu(z, SwiGLU()), down.transpose(1, 2), offs=ends) + down_bias[rows]
    out = out * torch.softmax(chosen, dim=1).flatten()[order, None].to(out.dtype)
    return torch.zeros_like(x).index_add(0, order // size.top_k, out)


IMPLEMENTATIONS = (Implementation((NAME,), lambda case: without_lora(case) and case.experts <= 32, prepare),)
