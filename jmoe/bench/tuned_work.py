"""What `jmoe tune` times: a layer's forward pass and gradient, and the decode operations, as a model calls them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmoe.bench.case import Case, Size
from jmoe.bench.jax_timing import unrolled
from jmoe.bench.weights import Weights, random_input
from jmoe.gpt_oss.paged import PAGE_SIZE
from jmoe.ops.decode.cached_attention import cached_attention
from jmoe.ops.decode.linear import decode_linear
from jmoe.ops.decode.norm_linear import Narrow, norm_linear
from jmoe.ops.experts import Experts, Lora
from jmoe.ops.lora.by_row import StackedFactors, lora_by_row
from jmoe.ops.moe import moe
from jmoe.ops.mxfp4 import BLOCK
from jmoe.ops.paged.decode_attention import paged_decode_attention
from jmoe.ops.paged.prefill_attention import paged_prefill_attention
from jmoe.ops.target import Target

PROMPT = 256
"""Tokens of a prompt in a chunk."""

ADAPTERS = 8
"""Loaded beside each other; each prompt of a chunk has the next."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model's sizes; defaults are those of gpt-oss-20b."""

    experts: int = 32
    hidden: int = 2880
    intermediate: int = 2880
    top_k: int = 4
    rank: int = 16
    heads: int = 64
    key_heads: int = 8
    head_dim: int = 64
    context: int = 4096

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate"):
            if getattr(self, name) % BLOCK:
                raise ValueError(f"{name} must be a multiple of {BLOCK}, MXFP4's block, got {getattr(self, name)}")
        if self.top_k > self.experts:
            raise ValueError(f"top_k must be at most the {self.experts} experts, got {self.top_k}")

    @property
    def layer(self) -> Size:
        """Of its layers."""
        return Size(self.hidden, self.intermediate, self.top_k)


class Work(NamedTuple):
    """Something to time in a loop.

    call: its results for a Target, from a carry, one of `draws` and `arrays`.
    carry: the carry of the next call from the results of this one.
    """

    call: Callable[[Target, Any, jax.Array, Any], Any]
    carry: Callable[[Any, Any], Any]
    start: Any
    draws: jax.Array
    arrays: Any


class Works:
    """The work of a model of some sizes, on random weights, which are made when first asked for."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.weights = Weights(sizes.layer, sizes.experts)

    def of(self, name: str, tokens: int, *, packed: bool) -> Work:
        """The work called "forward", "lora", "gradient", or by an operation's name, for so many tokens."""
        if name in ("forward", "lora", "gradient"):
            return self.layer(tokens, packed, lora=name != "forward", gradient=name == "gradient")
        return {
            "decode_linear": self.decode_linear,
            "norm_linear": self.norm_linear,
            "cached_attention": self.cached_attention,
            "paged_decode_attention": self.paged_decode_attention,
            "paged_prefill_attention": self.paged_prefill_attention,
            "lora_by_row": self.lora_by_row,
        }[name](tokens)

    def layer(self, tokens: int, packed: bool, *, lora: bool, gradient: bool) -> Work:
        """A layer on packed experts or those of a checkpoint, with one adapter or without."""
        s = self.sizes
        experts = self.weights.packed if packed else self.weights.experts
        arrays = experts, self.weights.lora(s.rank, 1) if lora else None
        x, logits = random_input(Case(s.experts, tokens), s.layer, unrolled())
        forward = functools.partial(moe, top_k=s.top_k)

        def call(target: Target, x: jax.Array, logits: jax.Array, arrays: tuple[Experts, Lora | None]) -> Any:
            experts, lora = arrays
            if not gradient:
                return forward(x, logits, experts, lora=lora, backend=target)

            def differentiated(x: jax.Array, logits: jax.Array, lora: Lora | None, biases: tuple[Any, Any]) -> Any:
                whole = dataclasses.replace(experts, gate_up_bias=biases[0], down_bias=biases[1])
                return forward(x, logits, whole, lora=lora, backend=target)

            y, pullback = jax.vjp(differentiated, x, logits, lora, (experts.gate_up_bias, experts.down_bias))
            return y, pullback(x)

        def carry(x: jax.Array, results: Any) -> jax.Array:
            first, *others = jax.tree.leaves(results)
            # What nothing reads XLA would leave out.
            return first.at[0, 0].add(sum(leaf[(0,) * leaf.ndim].astype(first.dtype) for leaf in others))

        return Work(call, carry, x, logits, arrays)

    def decode_linear(self, tokens: int) -> Work:
        """The product of q, k and v."""
        s = self.sizes
        columns = (s.heads + 2 * s.key_heads) * s.head_dim
        layers = jnp.arange(unrolled(), dtype=jnp.int32)
        arrays = normal(1, len(layers), columns, s.hidden), normal(2, len(layers), columns)

        def call(target: Target, x: jax.Array, layer: jax.Array, arrays: Any) -> jax.Array:
            weight, bias = arrays
            return decode_linear(x, weight, bias, layer, target=target)

        return Work(call, lambda x, y: x.at[:, 0].set(y[:, 0]), normal(3, tokens, s.hidden), layers, arrays)

    def norm_linear(self, tokens: int) -> Work:
        """The norm before the experts with the sum before it and the router behind it."""
        s = self.sizes
        layers = jnp.arange(unrolled(), dtype=jnp.int32)
        count = len(layers)
        arrays = normal(1, count, s.hidden), normal(2, count, s.experts, s.hidden), normal(3, count, s.experts)

        def call(target: Target, x: jax.Array, layer: jax.Array, arrays: Any) -> Any:
            norm, weight, bias = arrays
            narrow = Narrow(weight, s.experts, bias=bias)
            return norm_linear(x, layer, addend=x, norm=norm, eps=1e-5, narrow=narrow, target=target)

        return Work(call, lambda x, results: results.normal, normal(4, tokens, s.hidden), layers, arrays)

    def lora_by_row(self, tokens: int) -> Work:
        """LoRA on the product of q, k and v, of prompts of PROMPT tokens each with an adapter."""
        s = self.sizes
        columns, rank = (s.heads + 2 * s.key_heads) * s.head_dim, 3 * s.rank
        layers = jnp.arange(unrolled(), dtype=jnp.int32)
        scale = jnp.ones((len(layers), ADAPTERS, rank), jnp.float32)
        a, b = normal(1, *scale.shape, s.hidden), normal(2, *scale.shape[:2], columns, rank)
        product, bias = jnp.zeros((tokens, columns), jnp.float32), normal(3, columns)
        ids = jnp.arange(tokens, dtype=jnp.int32) // PROMPT % ADAPTERS

        def call(target: Target, x: jax.Array, layer: jax.Array, arrays: Any) -> jax.Array:
            product, bias, ids, factors = arrays
            return lora_by_row(x, product, bias, ids, layer, factors, target=target)

        arrays = product, bias, ids, StackedFactors(a, scale, b)
        return Work(call, lambda x, y: x.at[:, 0].set(y[:, 0]), normal(4, tokens, s.hidden), layers, arrays)

    def cached_attention(self, tokens: int) -> Work:
        """Attention of so many sequences to a cache that is full."""
        s = self.sizes
        layers = jnp.arange(unrolled(), dtype=jnp.int32) % 2
        heads = normal(1, tokens, s.heads + 2 * s.key_heads, s.head_dim)
        cache = normal(2, 2, tokens, s.key_heads, s.context, 2 * s.head_dim)
        angles = jnp.ones((tokens, s.head_dim // 2), jnp.float32)
        position = jnp.full(tokens, s.context - 1, jnp.int32)

        def call(target: Target, carry: tuple[jax.Array, jax.Array], layer: jax.Array, arrays: Any) -> Any:
            heads, cache = carry
            angles, position, sinks = arrays
            return cached_attention(heads, angles, angles, cache, layer, position, sinks, layer, target=target)

        def carry(before: tuple[jax.Array, jax.Array], results: tuple[jax.Array, jax.Array]) -> Any:
            attended, cache = results
            return before[0].at[:, : s.heads].set(attended), cache

        return Work(call, carry, (heads, cache), layers, (angles, position, normal(3, 2, s.heads)))

    def paged_decode_attention(self, tokens: int) -> Work:
        """Attention of so many sequences to pages that are full."""
        s = self.sizes
        position = jnp.full(tokens, s.context - 1, jnp.int32)
        return self.paged(functools.partial(paged_decode_attention, window=None), tokens, tokens, (position,))

    def paged_prefill_attention(self, tokens: int) -> Work:
        """Attention of a chunk of prompts, none before it, of PROMPT tokens each, or of one that is shorter."""
        sequences = -(-tokens // PROMPT)
        offsets = jnp.minimum(jnp.arange(sequences + 1, dtype=jnp.int32) * PROMPT, tokens)
        by_sequence = offsets, jnp.zeros(sequences, jnp.int32)
        return self.paged(functools.partial(paged_prefill_attention, window=None), tokens, sequences, by_sequence)

    def paged(
        self, attend: Callable[..., Any], tokens: int, sequences: int, by_sequence: tuple[jax.Array, ...]
    ) -> Work:
        """Attention to pages in any order, of which each sequence has as many as the context."""
        s = self.sizes
        layers = jnp.arange(unrolled(), dtype=jnp.int32) % 2
        heads = normal(1, tokens, s.heads + 2 * s.key_heads, s.head_dim)
        columns = -(-max(s.context, PROMPT) // PAGE_SIZE)
        count = 1 + sequences * columns
        cache = normal(2, 2, count, s.key_heads, PAGE_SIZE, 2 * s.head_dim)
        pages = 1 + jax.random.permutation(jax.random.key(4), count - 1).astype(jnp.int32).reshape(sequences, columns)
        angles = jnp.ones((tokens, s.head_dim // 2), jnp.float32)

        def call(target: Target, carry: tuple[jax.Array, ...], layer: jax.Array, arrays: Any) -> Any:
            heads, cache, _ = carry
            angles, by_sequence, pages, sinks = arrays
            return attend(heads, angles, angles, cache, layer, *by_sequence, pages, sinks, layer, target=target)

        def carry(before: tuple[jax.Array, ...], results: tuple[jax.Array, jax.Array]) -> Any:
            # The cache makes a call wait for the one before. A chunk's results are not copied, which would take time.
            attended, cache = results
            return before[0], cache, attended

        return Work(
            call,
            carry,
            (heads, cache, heads[:, : s.heads]),
            layers,
            (angles, by_sequence, pages, normal(3, 2, s.heads)),
        )


def normal(seed: int, *shape: int) -> jax.Array:
    """Normal bfloat16 numbers, about as large as a layer's products keep them."""
    return (jax.random.normal(jax.random.key(seed), shape) / shape[-1] ** 0.5).astype(jnp.bfloat16)
