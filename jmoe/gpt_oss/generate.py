"""Text that follows prompts: batches of different lengths, sampled, stopped and streamed."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Key

from jmoe.gpt_oss.config import warn_past_positions
from jmoe.gpt_oss.decode import DecodeState, decode, prefill
from jmoe.gpt_oss.model import GptOss, check_tokens
from jmoe.gpt_oss.sample import Sampling, choose

LARGEST_INT32 = 2**31 - 1

type Callback = Callable[[Int32[np.ndarray, "B n"], Bool[np.ndarray, "B n"]], Bool[np.ndarray, " B"] | None]


class Seconds(NamedTuple):
    """How long a call took.

    prefill: until the prompts' logits were there, compilation included.
    steps: all steps, compilation included.
    step_rate: steps a second in chunks whose program had run before; None if there were none.
    """

    prefill: float
    steps: float
    step_rate: float | None


class Generated(NamedTuple):
    """tokens int32 [B, max_new_tokens]; lengths int32 [B]: how many of them are text, a stop token not counted."""

    tokens: Int32[np.ndarray, "B n"]
    lengths: Int32[np.ndarray, " B"]
    seconds: Seconds


class Progress(NamedTuple):
    """Between two chunks of steps; a pytree of static shapes.

    key: one for all sequences, or one for each.
    seen: the tokens of each sequence; None without a repetition penalty.
    """

    logits: Float[Array, "B V"]
    state: DecodeState
    done: Bool[Array, " B"]
    key: Key[Array, "..."]
    seen: Bool[Array, "B V"] | None = None


def generate(
    model: GptOss,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    adapter_ids: Sequence[int] | None = None,
    callback: Callback | None = None,
    chunk: int = 16,
    prefill_chunk: int | None = None,
) -> Generated:
    """The tokens that follow each prompt.

    The prompts are padded to a multiple of 64 tokens, so that few lengths are compiled. A step's programs are kept by
    jax.jit for the next call with the same sizes.

    Args:
      prompts: token ids of each sequence, at least one each.
      stop_tokens: a sequence ends with any of these; None: the configuration's stop_tokens.
      temperature: 0 takes the likeliest token; else one is drawn.
      top_p: draws from the fewest tokens whose probabilities sum to it; 1 from all.
      top_k: draws from so many of the likeliest tokens; 0 from all.
      min_p: draws from tokens at least so many times as likely as the likeliest; 0 from all.
      repetition_penalty: divides positive logits of tokens that the prompt or the text has already, and multiplies
        negative ones; 1 leaves them. With temperature 0 too. The order of all these is that of
        jmoe.gpt_oss.sample.Sampling.
      seed: of all sequences, or one for each: then a sequence's samples are those that it has alone by its seed.
      adapter_ids: each sequence's adapter, -1 for none.
      callback: called after each chunk with its tokens [B, n] and which of them are text; it may return which
        sequences [B] shall end here.
      chunk: steps between looks at what has stopped.
      prefill_chunk: as in jmoe.gpt_oss.decode.prefill.

    Raises:
      ValueError: a prompt is empty, or a number or an adapter is out of range.
      NotFiniteError: a ValueError: the model's logits are not finite, as those of weights with NaN or infinity are
        not; found within a chunk.
    """
    check_options(model, prompts, max_new_tokens, chunk)
    sampling = Sampling.create(temperature, top_p, top_k, min_p, repetition_penalty)
    key = keys(seed, len(prompts))
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    warn_past_positions(model.config, int(lengths.max()) + max_new_tokens)
    width = -(-int(lengths.max()) // 64) * 64
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    stop = np.array(model.config.stop_tokens if stop_tokens is None else stop_tokens, np.int32)
    if adapter_ids is not None and not np.issubdtype(np.asarray(adapter_ids).dtype, np.integer):
        raise ValueError(f"adapter_ids must be integers, got {adapter_ids}")
    ids = None if adapter_ids is None else jnp.asarray(adapter_ids, jnp.int32)
    check_tokens(jnp.asarray(tokens), ids, model.lora, model.config.vocab_size)
    capacity = width + -(-max_new_tokens // 64) * 64
    began = time.perf_counter()
    logits, state = jax.block_until_ready(start(model, tokens, lengths, ids, capacity, prefill_chunk))
    prefill_seconds = time.perf_counter() - began
    seen = None if sampling.repetition_penalty is None else jnp.asarray(tokens_of(prompts, model.config.vocab_size))
    progress = Progress(logits, state, jnp.zeros(len(prompts), bool), key, seen)
    found: list[np.ndarray] = []
    texts: list[np.ndarray] = []
    chunks: list[tuple[int, float]] = []
    while (before := sum(part.shape[1] for part in found)) < max_new_tokens:
        steps = min(chunk, max_new_tokens - before)
        began = time.perf_counter()
        new, text, finite, progress = advance(model, progress, stop, sampling, steps)
        check_finite(np.asarray(finite), before)
        found.append(np.asarray(new).T)
        texts.append(np.asarray(text).T)
        chunks.append((steps, time.perf_counter() - began))
        ended = None if callback is None else callback(found[-1], texts[-1])
        if ended is not None:
            progress = progress._replace(done=progress.done | ended)
        if bool(progress.done.all()):
            break
    everything, is_text = np.concatenate(found, axis=1), np.concatenate(texts, axis=1)
    padding = [(0, 0), (0, max_new_tokens - everything.shape[1])]
    return Generated(
        np.pad(everything, padding, constant_values=model.config.pad_token_id),
        is_text.sum(axis=1, dtype=np.int32),
        Seconds(prefill_seconds, sum(seconds for _, seconds in chunks), step_rate(chunks)),
    )


def step_rate(chunks: Sequence[tuple[int, float]]) -> float | None:
    """Steps a second of (steps, seconds), the first of each number of steps left out, as it may have compiled."""
    warm = [chunk for i, chunk in enumerate(chunks) if chunk[0] in [steps for steps, _ in chunks[:i]]]
    return sum(steps for steps, _ in warm) / sum(seconds for _, seconds in warm) if warm else None


def keys(seed: int | Sequence[int], count: int) -> Key[Array, "..."]:
    """The key of a seed, or the keys of one seed for each of so many sequences."""
    seeds = np.asarray(seed)
    if seeds.ndim == 0:
        return jax.random.key(seed if isinstance(seed, int) else int(seeds))
    if seeds.shape != (count,):
        raise ValueError(f"seed must be one, or one for each of the {count} prompts, got {seed}")
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def tokens_of(prompts: Sequence[Sequence[int]], vocabulary: int) -> Bool[np.ndarray, "B V"]:
    """Which tokens each prompt has."""
    seen = np.zeros((len(prompts), vocabulary), bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[list(prompt)] = True
    return seen


class NotFiniteError(ValueError):
    """The model's logits for this sequence of the batch are not finite."""

    def __init__(self, sequence: int, message: str) -> None:
        super().__init__(message)
        self.sequence = sequence


def check_finite(finite: Bool[np.ndarray, "n B"], before: int) -> None:
    """Raises NotFiniteError of the first step whose logits were not finite; before: new tokens before these."""
    if not finite.all():
        step, sequence = np.argwhere(~finite)[0]
        raise NotFiniteError(
            int(sequence),
            f"the model's logits are not finite in sequence {sequence} at its new token {before + step + 1}: weights "
            "or an adapter hold NaN or infinity, or lead to it",
        )


def check_options(model: GptOss, prompts: Sequence[Sequence[int]], max_new_tokens: int, chunk: int) -> None:
    """Raises ValueError unless generate can go on from these."""
    if len(prompts) == 0 or not all(len(prompt) for prompt in prompts):
        raise ValueError(f"prompts must be at least one token each, got lengths {[len(prompt) for prompt in prompts]}")
    if not all(np.issubdtype(np.asarray(prompt).dtype, np.integer) for prompt in prompts):
        raise ValueError("prompts must be token ids, which are integers")
    largest, smallest = max(max(prompt) for prompt in prompts), min(min(prompt) for prompt in prompts)
    if smallest < 0 or largest >= model.config.vocab_size:
        raise ValueError(f"token ids must be in [0, {model.config.vocab_size}), got {smallest} to {largest}")
    for name, value in (("max_new_tokens", max_new_tokens), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if max(map(len, prompts)) + max_new_tokens > LARGEST_INT32:
        raise ValueError(f"prompt and new tokens must be at most {LARGEST_INT32} in all, got {max_new_tokens} new ones")


def _start(
    model: GptOss, tokens: Array, lengths: Array, adapter_ids: Array | None, capacity: int, prefill_chunk: int | None
) -> tuple[Float[Array, "B V"], DecodeState]:
    """prefill by positions of its arguments."""
    return prefill(model, tokens, lengths, capacity=capacity, adapter_ids=adapter_ids, prefill_chunk=prefill_chunk)


def _advance(
    model: GptOss, progress: Progress, stop: Array, sampling: Sampling, steps: int
) -> tuple[Int32[Array, "n B"], Bool[Array, "n B"], Bool[Array, "n B"], Progress]:
    """(tokens, which of them are text, whether the logits of a sequence that goes on were finite, what follows) of so
    many steps."""

    def step(progress: Progress, _: None) -> tuple[Progress, tuple[Array, Array, Array]]:
        split = jax.random.split if progress.key.ndim == 0 else jax.vmap(jax.random.split, out_axes=1)
        key, own = split(progress.key)
        finite = progress.done | jnp.isfinite(progress.logits).all(axis=-1)
        token = choose(progress.logits, own, sampling, progress.seen)
        token = jnp.where(progress.done, model.config.pad_token_id, token)
        done = progress.done | jnp.isin(token, stop)
        known = jnp.minimum(token, model.config.vocab_size - 1)
        seen = None if progress.seen is None else progress.seen.at[jnp.arange(len(known)), known].set(True)
        logits, state = decode(model, known, progress.state)
        return Progress(logits, state, done, key, seen), (token, ~done, finite)

    progress, (tokens, text, finite) = lax.scan(step, progress, None, length=steps)
    return tokens, text, finite, progress


# By jax.jit: nnx.jit returns every variable from the program, for which XLA copies the whole model at each call.
start: Callable[..., tuple[Array, DecodeState]] = jax.jit(_start, static_argnums=(4, 5))
advance: Callable[..., tuple[Array, Array, Array, Progress]] = jax.jit(_advance, static_argnums=4, donate_argnums=1)
