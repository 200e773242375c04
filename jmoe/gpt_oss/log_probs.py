"""Log-probabilities of a sequence's own tokens, without the logits of all positions at once."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from jmoe.gpt_oss.model import GptOss, check_range

CHUNK = 256
"""Positions whose float32 logits are held at a time: 206 MB of gpt-oss's vocabulary."""


def log_probs(
    model: GptOss,
    tokens: Int32[Array, "B T"],
    *,
    targets: Int32[Array, "B T"] | None = None,
    positions: Int32[Array, "B T"] | None = None,
    segment_ids: Int32[Array, "B T"] | None = None,
    adapter_ids: Int32[Array, " B"] | Int32[Array, "B T"] | None = None,
    chunk: int = CHUNK,
) -> Float[Array, "B S"]:
    """Natural logarithms of the probabilities that the model gives each token after those before it.

    They are what log_softmax of the model's logits holds at these tokens. The logits of `chunk` positions are held at a
    time, when differentiated too: the backward pass computes them again. jax.jit takes the model as an argument, and
    nnx.grad, or jax.grad after nnx.split, differentiates in its LoRA factors.

    Args:
      tokens: [B, T], what the model reads.
      targets: the token to score after each position, in place of the one that follows in `tokens`. NaN follows from a
        traced one that is outside the vocabulary.
      positions: as in GptOss.hidden.
      segment_ids: as in GptOss.hidden. Without targets a token that begins a segment has nothing before it: its entry
        is 0, and has no gradient.
      adapter_ids: as in GptOss.hidden.
      chunk: positions at a time; it changes memory and time, and results by no more than float32's rounding.

    Returns:
      float32, nats. Without targets [B, T-1]: entry [b, t] is log p(tokens[b, t+1] | tokens[b, :t+1]). With targets
      [B, T]: log p(targets[b, t] | tokens[b, :t+1]).

    Raises:
      ValueError: chunk is below 1; targets are not integers like tokens, or not in the vocabulary; and as GptOss.hidden
        does.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if targets is not None:
        if targets.shape != tokens.shape or not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(
                f"targets must be integers like tokens {tokens.shape}, got {targets.dtype} with shape {targets.shape}"
            )
        check_range("targets", targets, 0, model.config.vocab_size)
    hidden = model.hidden(tokens, positions=positions, segment_ids=segment_ids, adapter_ids=adapter_ids)
    if targets is not None:
        return log_probs_of_hidden(model, hidden, jnp.asarray(targets), chunk)
    found = log_probs_of_hidden(model, hidden[:, :-1], jnp.asarray(tokens)[:, 1:], chunk)
    if segment_ids is None:
        return found
    return jnp.where(segment_ids[:, 1:] == segment_ids[:, :-1], found, 0)


def log_probs_of_hidden(
    model: GptOss, hidden: Float[Array, "B S H"], targets: Int32[Array, "B S"], chunk: int
) -> Float[Array, "B S"]:
    """The log-probability of a token after each of what GptOss.hidden returns, some positions at a time."""
    if not targets.size:
        return jnp.zeros(targets.shape, jnp.float32)
    count = targets.size
    rows = in_chunks(hidden.reshape(count, -1), min(chunk, count)), in_chunks(targets.reshape(-1), min(chunk, count))

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a loop's steps are apart as it is
    def of_chunk(rows: tuple[Array, Array]) -> Array:
        hidden, targets = rows
        found, _ = log_probs_of_logits(model.logits(hidden[None])[0], targets)
        return jnp.where((targets >= 0) & (targets < model.config.vocab_size), found, jnp.nan)

    return lax.map(of_chunk, rows).reshape(-1)[:count].reshape(targets.shape)


def in_chunks(rows: Shaped[Array, "P ..."], chunk: int) -> Shaped[Array, "C chunk ..."]:
    """The rows in as many chunks as they need, with zeros behind the last."""
    padded = jnp.pad(rows, [(0, -rows.shape[0] % chunk)] + [(0, 0)] * (rows.ndim - 1))
    return padded.reshape(-1, chunk, *rows.shape[1:])


def log_probs_of_logits(
    logits: Float[Array, "P V"], targets: Int32[Array, " P"]
) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
    """(log softmax(logits)[target], the logarithm of the softmax's sum), of float32 logits."""
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    return jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0] - normalizer, normalizer
