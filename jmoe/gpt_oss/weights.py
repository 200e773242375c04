"""A model's arrays: those of all layers stacked, and LoRA on them."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.config import Config
from jmoe.ops.experts import Experts, Lora

ATTENTION = ("q", "k", "v", "o")
EXPERTS = ("gate_up", "down")
TARGETS = (*ATTENTION, *EXPERTS)
"""What LoRA can be on."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """y = x weight^T + bias."""

    weight: Float[Array, "... N K"]
    bias: Float[Array, "... N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One layer's weights, or all layers' with a leading axis; a pytree.

    Of qkv's rows q's come first, v's last; where a mesh splits heads, of each device's rows, see qkv_rows.
    """

    attention_norm: Float[Array, "... H"]
    qkv: Linear
    o: Linear
    sinks: Float[Array, "... N"]
    moe_norm: Float[Array, "... H"]
    router: Linear
    experts: Experts

    def layer(self, index: Int32[Array, ""] | int, whole: Collection[str]) -> Self:
        """One layer of several; the fields named in `whole` remain those of all."""
        taken = {
            field.name: jax.tree.map(functools.partial(take, index=index), getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in whole
        }
        return dataclasses.replace(self, **taken)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeights:
    """A adapters by what they are on (see TARGETS), each array with a leading axis for the layers; a pytree.

    a: [L, A, r, K], and [L, A, E, r, K] on experts; b: [L, A, N, r] or [L, A, E, N, r]; scale: float32 [L, A].
    """

    a: dict[str, Float[Array, "L A *E R K"]]
    b: dict[str, Float[Array, "L A *E N R"]]
    scale: dict[str, Float[Array, "L A"]]

    @property
    def on_experts(self) -> Lora | None:
        """What jmoe.moe takes."""
        parts = {
            f"{name}_{part}": getattr(self, field)[name]
            for name in EXPERTS
            if name in self.a
            for part, field in (("a", "a"), ("b", "b"), ("scale", "scale"))
        }
        return Lora(**parts) if parts else None


def sizes(config: Config) -> dict[str, tuple[int, int]]:
    """(N, K) of each of TARGETS."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def qkv_rows(config: Config, parts: int) -> Int32[np.ndarray, " N"]:
    """Where the rows of q, then k, then v go when heads are split in so many parts: each part's q, k and v together."""
    rows = np.arange(sum(sizes(config)[name][0] for name in ("q", "k", "v")))
    q, k, v = np.split(rows, np.cumsum([sizes(config)[name][0] for name in ("q", "k")]))
    return np.concatenate([own.reshape(parts, -1) for own in (q, k, v)], axis=1).reshape(-1)


def take(array: Array, index: Int32[Array, ""] | int) -> Array:
    """array[index], for an index in range."""
    return lax.dynamic_index_in_dim(array, index, keepdims=False)


def slice_layers[T](tree: T, groups: int) -> T:
    """[L, ...] -> [groups, L / groups, ...] of every array."""
    return jax.tree.map(lambda leaf: jnp.reshape(leaf, (groups, leaf.shape[0] // groups, *leaf.shape[1:])), tree)
