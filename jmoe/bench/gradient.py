"""A layer's forward and backward pass: jmoe's, and PyTorch's grouped products on dequantised weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jmoe.bench.case import FULL, SMALL, Case, Matrix, Size, calls_for, steps_for
from jmoe.bench.implementation import Figures, Implementation, Measure, UnavailableError, without_lora
from jmoe.bench.jax_timing import scan_microseconds, unrolled
from jmoe.bench.ours import PACKED
from jmoe.bench.torch_timing import graph_microseconds
from jmoe.bench.weights import Weights, random_input
from jmoe.ops.experts import Experts, Lora
from jmoe.ops.moe import moe
from jmoe.triton_src.activation import SwiGLU

RECOMPUTED = f"{PACKED}, recomputed"
GROUPED_MM = "torch._grouped_mm"
MEMORY = "{}, MiB"
"""The name of what an implementation holds at most beside weights and adapters, in mebibytes."""

type Carry = tuple[jax.Array, jax.Array]
type Arrays = tuple[Experts, Lora | None]


def gradient_matrix() -> Matrix:
    """Training's numbers of tokens on a GPU; elsewhere what a CPU can do."""
    if jax.default_backend() == "gpu":
        return Matrix(FULL.size, (256, 1024, 4096, 16384), (32,), (0, 16))
    return Matrix(SMALL.size, (16,), (8,), (0, 4))


def layer(name: str, recompute: bool, weights: Weights) -> Measure:
    """y and the gradients in x, the router's logits and LoRA; the next step's input is this one's result."""
    experts, top_k = weights.packed, weights.size.top_k

    def step(carry: Carry, logits: jax.Array, arrays: Arrays) -> Carry:
        x, dy = carry

        def forward(x: jax.Array, logits: jax.Array, lora: Lora | None) -> jax.Array:
            return moe(x, logits, arrays[0], top_k=top_k, lora=lora, recompute=recompute)

        y, pullback = jax.vjp(forward, x, logits, arrays[1])
        dx, *others = pullback(dy)
        # What nothing reads XLA would leave out.
        one_of_each = sum(leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in jax.tree.leaves(others))
        return y, dx.at[0, 0].add(one_of_each.astype(dx.dtype))

    def measure(case: Case) -> Figures:
        x, logits = random_input(case, weights.size, unrolled())
        arrays = experts, weights.lora(case.rank, case.adapters)
        memory = jax.jit(step).lower((x, x), logits[0], arrays).compile().memory_analysis()
        assert memory is not None
        held = memory.temp_size_in_bytes + memory.output_size_in_bytes
        return {
            name: scan_microseconds(step, (x, x), logits, arrays, steps_for(case.tokens)),
            MEMORY.format(name): held / 2**20,
        }

    return measure


def grouped_mm(weights: Weights) -> Measure:
    """y and the gradient in x by PyTorch's autograd on bfloat16 weights, in CUDA graphs."""
    if jax.default_backend() != "gpu":
        raise UnavailableError("GPU only")
    import torch

    from jmoe.interop.dlpack import to_torch
    from jmoe.interop.reference import dequantize

    def dense(weight: Any) -> torch.Tensor:
        return torch.stack([dequantize(weight, expert, torch.bfloat16) for expert in range(weights.count)])

    experts = weights.torch_experts
    products = [(dense(experts.gate_up), experts.gate_up_bias), (dense(experts.down), experts.down_bias)]

    def measure(case: Case) -> Figures:
        calls = max(2, calls_for(case.tokens) // 5)
        x, logits = (to_torch(array) for array in random_input(case, weights.size, calls))
        dy = torch.randn_like(x)

        def call(i: int) -> torch.Tensor:
            leaf = x.detach().requires_grad_()
            y = grouped_layer(leaf, logits[i], products, weights.size)
            return torch.autograd.grad(y, leaf, dy)[0]

        call(0)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(0)
        torch.cuda.synchronize()
        held = torch.cuda.max_memory_allocated() - before
        return {GROUPED_MM: graph_microseconds(call, calls), MEMORY.format(GROUPED_MM): held / 2**20}

    return measure


def grouped_layer(x: Any, logits: Any, products: list[tuple[Any, Any]], size: Size) -> Any:
    """The layer as PyTorch users write it: rows sorted by expert, two grouped products, weights, sum."""
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


IMPLEMENTATIONS = (
    Implementation((PACKED, MEMORY.format(PACKED)), lambda case: True, functools.partial(layer, PACKED, False)),
    Implementation(
        (RECOMPUTED, MEMORY.format(RECOMPUTED)), lambda case: True, functools.partial(layer, RECOMPUTED, True)
    ),
    Implementation((GROUPED_MM, MEMORY.format(GROUPED_MM)), without_lora, grouped_mm),
)
