"""The model's attention to keys and values in pages, for sequences that come and go."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.layer import LayerAttention, Place
from jmoe.gpt_oss.rope import Heads
from jmoe.ops.paged.decode_attention import paged_decode_attention
from jmoe.ops.paged.prefill_attention import paged_prefill_attention

PAGE_SIZE = 64
"""Tokens of a page."""

type PagedCache = tuple[Float[Array, "L pages M page 2D"], ...]
"""For each layer of a group the pages of all groups: of each token a key, rotated, and its value behind it.

Page 0 is nobody's.
"""


def empty_paged_cache(config: Config, pages: Sequence[int], dtype: DTypeLike) -> PagedCache:
    """Zeros for each layer of a group, which has so many pages in each group; page 0 counts."""
    groups = config.num_hidden_layers // len(pages)
    rest = config.num_key_value_heads, PAGE_SIZE, 2 * config.head_dim
    return tuple(jnp.zeros((groups, count, *rest), dtype) for count in pages)


def page_bytes(config: Config, period: int, dtype: DTypeLike) -> int:
    """Bytes of one more page for one layer of a group, in all groups."""
    groups = config.num_hidden_layers // period
    return groups * config.num_key_value_heads * PAGE_SIZE * 2 * config.head_dim * jnp.dtype(dtype).itemsize


class AttentionWithPages(LayerAttention[Array]):
    """Attention to pages, which are all sequences' together: devices can split heads alone."""

    splits_batch: ClassVar[bool] = False

    def specs(self, batch: tuple[str, ...], heads: str | None) -> Self:
        """The split of each of its arrays."""
        return jax.tree.map_with_path(lambda path, _: P(None, heads) if path[0].name == "sinks" else P(), self)

    def state_spec(self, batch: tuple[str, ...], heads: str | None) -> P:
        """The split of each array of the PagedCache."""
        return P(None, None, heads)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedDecodeAttention(AttentionWithPages):
    """Attention of each sequence's next token, of tokens [B, 1]; the state is the PagedCache.

    windows: of each layer.
    sinks: of all layers, of which a layer reads its own in place.
    position: of the tokens; -1: a row without a sequence.
    pages: for each layer of a group, see paged_decode_attention.
    """

    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    sinks: Float[Array, "layers N"]
    position: Int32[Array, " B"]
    pages: tuple[Int32[Array, "B P"], ...]

    def attend(self, heads: Heads, sinks: Array, state: Array, place: Place) -> tuple[Array, Array]:
        """(each query's values, the layer's pages with the token's)."""
        qkv, cosine, sine = (array[:, 0] for array in (heads.qkv, heads.cosine, heads.sine))
        attended, state = paged_decode_attention(
            qkv,
            cosine,
            sine,
            state,
            place.group,
            self.position,
            self.pages[place.within],
            self.sinks,
            place.number,
            window=self.windows[place.within],
        )
        return attended[:, None], state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedPrefillAttention(AttentionWithPages):
    """Attention of a chunk of prompts, of tokens [1, T]; the state is the PagedCache.

    windows, sinks: as in PagedDecodeAttention.
    offsets, first_positions: where each sequence's tokens lie in the chunk, see paged_prefill_attention.
    pages: for each layer of a group.
    """

    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    sinks: Float[Array, "layers N"]
    offsets: Int32[Array, " S+1"]
    first_positions: Int32[Array, " S"]
    pages: tuple[Int32[Array, "S P"], ...]

    def attend(self, heads: Heads, sinks: Array, state: Array, place: Place) -> tuple[Array, Array]:
        """(each query's values, the layer's pages with the tokens')."""
        qkv, cosine, sine = (array[0] for array in (heads.qkv, heads.cosine, heads.sine))
        attended, state = paged_prefill_attention(
            qkv,
            cosine,
            sine,
            state,
            place.group,
            self.offsets,
            self.first_positions,
            self.pages[place.within],
            self.sinks,
            place.number,
            window=self.windows[place.within],
        )
        return attended[None], state
