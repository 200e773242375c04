"""The next token of each row by the row's own options; what a row draws does not depend on the others.

The steps and their order are those of transformers' logits processors: logit_bias, penalties, temperature,
top_k, top_p, min_p. Thresholds are found by bisection, so that no vocabulary is sorted.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Key, UInt32

from jmoe.gpt_oss.sample import LEAST_TEMPERATURE, greedy
from jmoe.serve.engine.row_options import RowOptions

LEAST_WEIGHT = float(jnp.finfo(jnp.float32).tiny)
"""Of the tokens that are kept: at a top_p that float32 rounds to 0 the likeliest stay."""


def adjust(
    logits: Float[Array, "B V"],
    options: RowOptions,
    counts: Int32[Array, "B V"],
    bias_tokens: Int32[Array, "B N"],
    biases: Float[Array, "B N"],
) -> Float[Array, "B V"]:
    """Logits with logit_bias and penalties; those of rows that have none keep their bits.

    Args:
      counts: twice how often the new text has each token, and one more of tokens that the prompt has.
      bias_tokens, biases: of which as many count as the options say, each token once; the others may be an earlier
        sequence's.
    """
    rows, numbers = jnp.arange(len(logits))[:, None], jnp.arange(biases.shape[1])
    nowhere = logits.shape[1] + numbers
    bias_tokens = jnp.where(numbers < options.biases[:, None], bias_tokens, nowhere)
    logits = logits.at[rows, bias_tokens].add(biases, mode="drop", unique_indices=True)
    penalty = options.repetition_penalty[:, None]
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    logits = jnp.where(counts > 0, penalized, logits)
    often = (counts // 2).astype(jnp.float32)
    present = jnp.where(often > 0, options.presence_penalty[:, None], 0)
    return logits - present - options.frequency_penalty[:, None] * often


def choose_rows(
    logits: Float[Array, "B V"], options: RowOptions, positions: Int32[Array, " B"], *, truncates: bool
) -> Int32[Array, " B"]:
    """The next token of each row: the likeliest where its temperature is 0, else drawn.

    Args:
      positions: where the tokens will stand in their sequences, which with a row's seed determines its draw.
      truncates: whether top_k, top_p and min_p count; where all are without effect the tokens are the same.
    """
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = below / jnp.maximum(options.temperature, LEAST_TEMPERATURE)[:, None]
    if truncates:
        scaled = jnp.where(kept(scaled, options), scaled, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(row_keys(options.seed, positions), scaled).astype(jnp.int32)
    return jnp.where(options.temperature == 0, greedy(logits), drawn)


def row_keys(seeds: UInt32[Array, "B 2"], positions: Int32[Array, " B"]) -> Key[Array, " B"]:
    """The key of each row's next draw."""

    def one(seed: Array, position: Array) -> Array:
        return jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)

    return jax.vmap(one)(seeds, positions)


def kept(scaled: Float[Array, "B V"], options: RowOptions) -> Bool[Array, "B V"]:
    """Which tokens top_k, top_p and min_p leave, in this order; those as likely as the last that is left stay too.

    scaled: logits by temperature, the largest of a row 0.
    """
    ordered = order_bits(scaled)
    vocabulary = scaled.shape[1]
    most = jnp.where(options.top_k == 0, vocabulary, jnp.minimum(options.top_k, vocabulary))
    among = ordered >= largest_with(lambda least: jnp.sum(ordered >= least, axis=1, dtype=jnp.int32) >= most, ordered)
    weights = jnp.where(among, jnp.exp(scaled), 0)
    wanted = jnp.maximum(options.top_p * jnp.sum(weights, axis=1), LEAST_WEIGHT)
    least = largest_with(lambda least: jnp.sum(jnp.where(ordered >= least, weights, 0), axis=1) >= wanted, ordered)
    among &= (options.top_p >= 1)[:, None] | (ordered >= least)
    return among & (scaled >= jnp.log(options.min_p)[:, None])


def order_bits(values: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Integers in the order of these float32."""
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def largest_with(
    enough: Callable[[UInt32[Array, "B 1"]], Bool[Array, " B"]], ordered: UInt32[Array, "B V"]
) -> UInt32[Array, "B 1"]:
    """For each row the largest integer that is enough, where all smaller ones are too; 0 if none is."""

    def set_bit(number: Array, least: Array) -> Array:
        with_bit = least | jnp.left_shift(jnp.uint32(1), (31 - number).astype(jnp.uint32))
        return jnp.where(enough(with_bit)[:, None], with_bit, least)

    return lax.fori_loop(0, 32, set_bit, jnp.zeros_like(ordered[:, :1]))
