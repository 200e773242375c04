"""A layer's forward and backward pass: jmoe's, and PyTorch's grouped products on dequantised weights."""

import functools

import jax
import jax.numpy as jnp

from jmoe.bench.case import FULL, SMALL, Case, Matrix, calls_for, steps_for
from jmoe.bench.grouped_mm import grouped_layer, products
from jmoe.bench.implementation import Figures, Implementation, Measure, without_lora
from jmoe.bench.jax_timing import scan_microseconds, unrolled
from jmoe.bench.ours import PACKED
from jmoe.bench.torch_timing import graph_microseconds
from jmoe.bench.weights import Weights, random_input
from jmoe.ops.experts import Experts, Lora
from jmoe.ops.moe import moe

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
    dense = products(weights)
    import torch

    from jmoe.interop.dlpack import to_torch

    def measure(case: Case) -> Figures:
        calls = max(2, calls_for(case.tokens) // 5)
        x, logits = (to_torch(array) for array in random_input(case, weights.size, calls))
        dy = torch.randn_like(x)

        def call(i: int) -> torch.Tensor:
            leaf = x.detach().requires_grad_()
            y = grouped_layer(leaf, logits[i], dense, weights.size)
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


IMPLEMENTATIONS = (
    Implementation((PACKED, MEMORY.format(PACKED)), lambda case: True, functools.partial(layer, PACKED, False)),
    Implementation(
        (RECOMPUTED, MEMORY.format(RECOMPUTED)), lambda case: True, functools.partial(layer, RECOMPUTED, True)
    ),
    Implementation((GROUPED_MM, MEMORY.format(GROUPED_MM)), without_lora, grouped_mm),
)
