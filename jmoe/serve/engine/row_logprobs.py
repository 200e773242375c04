"""Log-probabilities of tokens and of the likeliest ones, by logits as the model gives them."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.log_probs import in_chunks, log_probs_of_logits
from jmoe.gpt_oss.products import product
from jmoe.serve.engine.request import MOST_LOGPROBS

BLOCK = 512
"""Logits of which the largest is found first."""

ROWS = 256
"""Of prompts, whose logits are held at a time."""


def logprob_rows(logits: Float[Array, "B V"], tokens: Int32[Array, " B"]) -> Int32[Array, "B W"]:
    """The tokens' log-probabilities and the likeliest tokens with theirs, for RowLogprobs.unpack."""
    logprob, normalizer = log_probs_of_logits(logits, tokens)
    largest, values = largest_of(logits, min(MOST_LOGPROBS, logits.shape[1]))
    floats = jnp.concatenate([logprob[:, None], values - normalizer[:, None]], axis=1)
    return jnp.concatenate([lax.bitcast_convert_type(floats, jnp.int32), largest], axis=1)


def prompt_logprob_rows(
    hidden: Float[Array, "T H"], head: Float[Array, "V H"], targets: Int32[Array, " T"]
) -> Int32[Array, "T W"]:
    """logprob_rows of a chunk's tokens, from what GptOss.hidden returns; some rows' logits at a time."""

    def some(rows: tuple[Array, Array]) -> Array:
        hidden, targets = rows
        return logprob_rows(product("th,vh->tv", hidden, head), targets)

    count = len(targets)
    parts = in_chunks(hidden, min(ROWS, count)), in_chunks(targets, min(ROWS, count))
    found = lax.map(some, parts)
    return found.reshape(-1, found.shape[-1])[:count]


class RowLogprobs(NamedTuple):
    """Of each row a token's log-probability, and the likeliest tokens with theirs, the likeliest first."""

    logprob: Float[np.ndarray, " B"]
    top: Float[np.ndarray, "B K"]
    tokens: Int32[np.ndarray, "B K"]

    @classmethod
    def unpack(cls, rows: Int32[np.ndarray, "B W"]) -> "RowLogprobs":
        """What logprob_rows has packed."""
        top = (rows.shape[1] - 1) // 2
        floats = np.ascontiguousarray(rows[:, : top + 1]).view(np.float32)
        return cls(floats[:, 0], floats[:, 1:], rows[:, top + 1 :])

    def row(self, index: int, most: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        """(the log-probability, the `most` likeliest) of a row."""
        pairs = zip(self.tokens[index, :most].tolist(), self.top[index, :most].tolist(), strict=True)
        return float(self.logprob[index]), tuple(pairs)


def largest_of(values: Float[Array, "B V"], count: int) -> tuple[Int32[Array, "B K"], Float[Array, "B K"]]:
    """(where the largest are, the largest first; what they are); of equals the first.

    By the largest of blocks: the largest of all lie in as many blocks as they are, those whose own largest are largest.
    """
    rows, vocabulary = values.shape
    padded = jnp.pad(values, [(0, 0), (0, -vocabulary % BLOCK)], constant_values=-jnp.inf)
    blocks = padded.reshape(rows, -1, BLOCK)
    if blocks.shape[1] <= count:
        return largest_one_by_one(values, count)
    best, _ = largest_one_by_one(blocks.max(axis=2), count)
    best = jnp.sort(best, axis=1)
    candidates = jnp.take_along_axis(blocks, best[:, :, None], axis=1).reshape(rows, -1)
    places, found = largest_one_by_one(candidates, count)
    return jnp.take_along_axis(best, places // BLOCK, axis=1) * BLOCK + places % BLOCK, found


def largest_one_by_one(values: Float[Array, "B N"], count: int) -> tuple[Int32[Array, "B K"], Float[Array, "B K"]]:
    """largest_of, for few values."""

    def step(left: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        place = jnp.argmax(left, axis=1).astype(jnp.int32)
        found = jnp.take_along_axis(left, place[:, None], axis=1)[:, 0]
        taken = jnp.arange(left.shape[1]) == place[:, None]
        return jnp.where(taken, -jnp.inf, left), (place, found)

    _, (places, found) = lax.scan(step, values, None, length=count)
    return places.T, found.T
