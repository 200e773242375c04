"""Text token by token: the prompt at once, then one step after another against the cache."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.attention import attend
from jmoe.gpt_oss.attention_lora import AttentionLora
from jmoe.gpt_oss.cache import Cache, attend_cached, empty_cache, fill
from jmoe.gpt_oss.chunked import attend_chunk
from jmoe.gpt_oss.layer import LayerAttention, Place
from jmoe.gpt_oss.model import GptOss, check_range, check_tokens, positions_in_segments
from jmoe.gpt_oss.rope import Heads
from jmoe.gpt_oss.run import Inputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Sequences so far; a pytree of static shapes.

    cache: see jmoe.gpt_oss.cache.
    lengths: int32 [B], tokens of each sequence in the cache.
    adapter_ids: int32 [B], or None.
    attention_lora: the model's, laid out for the steps.
    """

    cache: Cache
    lengths: Int32[Array, " B"]
    adapter_ids: Int32[Array, " B"] | None
    attention_lora: AttentionLora | None = None


class AttentionWithCache(LayerAttention[Array]):
    """Attention that keeps keys and values in a Cache."""

    def specs(self, batch: tuple[str, ...], heads: str | None) -> Self:
        """The split of each of its arrays."""
        named = {"start": P(), "sinks": P(None, heads)}
        return jax.tree.map_with_path(lambda path, _: named.get(path[0].name, P(batch or None)), self)

    def state_spec(self, batch: tuple[str, ...], heads: str | None) -> P:
        """The split of each array of the cache."""
        return P(None, batch or None, heads)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptAttention(AttentionWithCache):
    """Attention to tokens of whole prompts, which go into the cache."""

    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    lengths: Int32[Array, " B"]

    def attend(self, heads: Heads, sinks: Array, state: Array, place: Place) -> tuple[Array, Array]:
        """(each query's values, the cache's entries with the layer's)."""
        q, k, v = heads.rotated()
        attended = attend(q, k, v, sinks, window=self.windows[place.within])
        return attended, fill(state, place.group, k, v, self.lengths)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkAttention(AttentionWithCache):
    """Attention to the cache and to tokens of a chunk of prompts, which go into it."""

    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    start: Int32[Array, ""]
    lengths: Int32[Array, " B"]

    def attend(self, heads: Heads, sinks: Array, state: Array, place: Place) -> tuple[Array, Array]:
        """(each query's values, the cache's entries with the layer's)."""
        window = self.windows[place.within]
        return attend_chunk(*heads.rotated(), sinks, state, place.group, self.start, self.lengths, window=window)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachedAttention(AttentionWithCache):
    """Attention of each sequence's next token to the cache. Sinks are read in place from all layers'."""

    sinks: Float[Array, "layers N"]
    position: Int32[Array, " B"]

    def attend(self, heads: Heads, sinks: Array, state: Array, place: Place) -> tuple[Array, Array]:
        """(each query's values, the cache's entries with the token's)."""
        return attend_cached(heads, self.sinks, place.number, state, place.group, self.position)


def prefill(
    model: GptOss,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
    *,
    capacity: int,
    adapter_ids: Int32[Array, " B"] | None = None,
    prefill_chunk: int | None = None,
) -> tuple[Float[Array, "B V"], DecodeState]:
    """(float32 logits of each prompt's last token, what decode goes on from).

    Args:
      tokens: prompts, padded at their ends with any tokens of the vocabulary.
      lengths: tokens of each prompt, at least 1.
      capacity: tokens that a sequence may come to have, the prompt's among them.
      prefill_chunk: tokens of each prompt at once, which bounds the memory of activations; None: all.

    Raises:
      ValueError: the prompts are empty or longer than the capacity, lengths are not theirs, or prefill_chunk is not
        positive; and as GptOss.hidden.
    """
    check_tokens(tokens, adapter_ids, model.lora, model.config.vocab_size)
    if not tokens.size:
        raise ValueError(f"prompts must be at least one token each, got tokens {tokens.shape}")
    if tokens.shape[1] > capacity:
        raise ValueError(f"prompts of {tokens.shape[1]} tokens do not fit a capacity of {capacity}")
    check_range("lengths", lengths, 1, tokens.shape[1] + 1)
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
    ids = None if adapter_ids is None else jnp.broadcast_to(adapter_ids[:, None], tokens.shape)
    attention_lora = model.attention_lora()
    cache = empty_cache(model.config, model.period, tokens.shape[0], capacity, model.dtype)
    if prefill_chunk is None or prefill_chunk >= tokens.shape[1]:
        last, cache = at_once(model, tokens, lengths, ids, cache, attention_lora)
    else:
        last, cache = in_chunks(model, tokens, lengths, ids, cache, attention_lora, prefill_chunk)
    return model.logits(last[:, None])[:, 0], DecodeState(cache, lengths, adapter_ids, attention_lora)


def at_once(
    model: GptOss,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
    adapter_ids: Int32[Array, "B T"] | None,
    cache: Cache,
    attention_lora: AttentionLora | None,
) -> tuple[Float[Array, "B H"], Cache]:
    """(what `hidden` has at each prompt's last token, the cache of the prompts)."""
    inputs = Inputs(tokens, positions_in_segments(tokens.shape, None), adapter_ids)
    attention = PromptAttention(model.config.windows, lengths)
    hidden, cache = model.run_layers_in_place(inputs, attention, cache, attention_lora)
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0], cache


def in_chunks(
    model: GptOss,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
    adapter_ids: Int32[Array, "B T"] | None,
    cache: Cache,
    attention_lora: AttentionLora | None,
    chunk: int,
) -> tuple[Float[Array, "B H"], Cache]:
    """at_once, so many tokens of each prompt after the other."""
    batch, length = tokens.shape
    chunks = -(-length // chunk)

    def split(array: Array, padding: int) -> Array:
        """[B, T] -> [chunks, B, chunk], padded at the end."""
        padded = jnp.pad(array, [(0, 0), (0, chunks * chunk - length)], constant_values=padding)
        return jnp.swapaxes(padded.reshape(batch, chunks, chunk), 0, 1)

    def step(carry: tuple[Array, Cache], inputs: tuple[Array, Array, Array | None]) -> tuple[tuple[Array, Cache], None]:
        last, cache = carry
        start, tokens, ids = inputs
        positions = jnp.broadcast_to(start + jnp.arange(chunk), tokens.shape)
        attention = ChunkAttention(model.config.windows, start, lengths)
        hidden, cache = model.run_layers_in_place(Inputs(tokens, positions, ids), attention, cache, attention_lora)
        place = lengths - 1 - start
        here = jnp.take_along_axis(hidden, jnp.clip(place, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
        return (jnp.where(((place >= 0) & (place < chunk))[:, None], here, last), cache), None

    nothing = jnp.zeros((batch, model.config.hidden_size), model.dtype)
    inputs = jnp.arange(chunks) * chunk, split(tokens, 0), None if adapter_ids is None else split(adapter_ids, -1)
    return lax.scan(step, (nothing, cache), inputs)[0]


def decode(model: GptOss, tokens: Int32[Array, " B"], state: DecodeState) -> tuple[Float[Array, "B V"], DecodeState]:
    """(float32 logits after each sequence's next token, the sequences with it).

    A sequence may not come to have more tokens than the capacity that prefill was given: the first would be lost.
    """
    ids = None if state.adapter_ids is None else state.adapter_ids[:, None]
    attention = CachedAttention(model.stack.sinks, state.lengths)
    inputs = Inputs(tokens[:, None], state.lengths[:, None], ids)
    hidden, cache = model.run_layers_in_place(inputs, attention, state.cache, state.attention_lora)
    return model.logits(hidden)[:, 0], dataclasses.replace(state, cache=cache, lengths=state.lengths + 1)
