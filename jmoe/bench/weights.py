"""The arrays that all implementations of one number of experts share, each made once, when first asked for."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jmoe.bench.case import Case, Size
from jmoe.ops.experts import Experts, Lora
from jmoe.ops.mxfp4 import Mxfp4, dequantize
from jmoe.ops.packed import pack
from jmoe.ops.random_layer import LayerShape, random_layer


class Weights:
    """Random MXFP4 experts of one size and number; dropped as a whole."""

    def __init__(self, size: Size, experts: int) -> None:
        self.size = size
        self.count = experts
        self.shape = LayerShape(1, size.hidden, size.intermediate, experts, size.top_k)
        self.latest_lora: tuple[tuple[int, int], Lora | None] = ((0, 0), None)

    @functools.cached_property
    def experts(self) -> Experts:
        """In the checkpoint's layout."""
        return jax.jit(lambda: random_layer(self.shape).experts)()

    @functools.cached_property
    def packed(self) -> Experts:
        """As jmoe.pack lays them out."""
        return pack(self.experts)

    @functools.cached_property
    def dense(self) -> Experts:
        """Dequantised to bfloat16."""
        experts = self.experts
        assert isinstance(experts.gate_up, Mxfp4)
        assert isinstance(experts.down, Mxfp4)
        return dataclasses.replace(experts, gate_up=dequantize(experts.gate_up), down=dequantize(experts.down))

    @functools.cached_property
    def torch_experts(self) -> Any:
        """`experts` as torch tensors over the same memory."""
        from jmoe.interop.dlpack import to_torch

        return jax.tree.map(to_torch, self.experts)

    def lora(self, rank: int, adapters: int) -> Lora | None:
        """Adapters for all experts, or None at rank 0. The latest are kept: rows of one rank follow each other."""
        if self.latest_lora[0] != (rank, adapters):
            self.latest_lora = ((0, 0), None)  # freed before the next are made
            shape = dataclasses.replace(self.shape, rank=rank, adapters=adapters)
            lora = jax.jit(lambda: random_layer(shape).lora)() if rank else None
            self.latest_lora = ((rank, adapters), lora)
        return self.latest_lora[1]


def random_input(case: Case, size: Size, draws: int) -> tuple[jax.Array, jax.Array]:
    """x [T, H] and router logits [draws, T, E], normal bfloat16."""
    x = jax.random.normal(jax.random.key(1), (case.tokens, size.hidden), jnp.bfloat16)
    return x, jax.random.normal(jax.random.key(2), (draws, case.tokens, case.experts), jnp.bfloat16)


def random_adapter_ids(case: Case) -> jax.Array | None:
    """int32 [T], -1 for none; None where one adapter, or no adapter, is every token's."""
    if case.adapters <= 1:
        return None
    return jax.random.randint(jax.random.key(3), (case.tokens,), -1, case.adapters, jnp.int32)
