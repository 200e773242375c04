"""The next token from logits."""

import math
import numbers
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key

LEAST_TEMPERATURE = 1e-30
"""Below it float32 would divide by zero, or nearly so."""


LARGEST_TOP_K = 2**31 - 1
"""What int32 holds; no vocabulary is as large, so that more tokens than this are all."""


class Sampling(NamedTuple):
    """How tokens are chosen; a pytree whose numbers may be traced, and what is None is not part of the program.

    The steps, their order and their meaning are those of transformers' logits processors: repetition_penalty,
    temperature, top_k, top_p, min_p.

    temperature: None takes the likeliest token, for which only repetition_penalty counts.
    """

    temperature: Float[Array, ""] | float | None = None
    top_p: Float[Array, ""] | float | None = None
    top_k: Int32[Array, ""] | int | None = None
    min_p: Float[Array, ""] | float | None = None
    repetition_penalty: Float[Array, ""] | float | None = None

    @classmethod
    def create(cls, temperature: float, top_p: float, top_k: int, min_p: float, repetition_penalty: float) -> Self:
        """The sampling of options as users write them, where 0, and of repetition_penalty 1, is without.

        Raises:
          ValueError: an option is out of range.
        """
        for name, value, good, wanted in (
            ("temperature", temperature, temperature >= 0, "0 or more"),
            ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
            ("top_k", top_k, isinstance(top_k, numbers.Integral) and top_k >= 0, "an integer, 0 for all or more"),
            ("min_p", min_p, 0 <= min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf, "positive and finite"),
        ):
            if not good:
                raise ValueError(f"{name} must be {wanted}, got {value}")
        penalty = None if repetition_penalty == 1 else repetition_penalty
        if temperature == 0:
            return cls(repetition_penalty=penalty)
        return cls(temperature, top_p, min(top_k, LARGEST_TOP_K) or None, min_p or None, penalty)


def choose(
    logits: Float[Array, "B V"], key: Key[Array, "..."], sampling: Sampling, seen: Bool[Array, "B V"] | None
) -> Int32[Array, " B"]:
    """The next token of each sequence.

    Args:
      key: one, or one for each sequence.
      seen: which tokens each sequence has already; None without a repetition penalty.
    """
    if sampling.repetition_penalty is not None and seen is not None:
        logits = penalized(logits, seen, sampling.repetition_penalty)
    if sampling.temperature is None:
        return greedy(logits)
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    return sample(logits, key, sampling.temperature, top_p, top_k=sampling.top_k, min_p=sampling.min_p)


def penalized(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""] | float
) -> Float[Array, "B V"]:
    """Logits in which tokens seen already are less likely: positive ones divided, others multiplied (CTRL,
    arXiv 1909.05858, in the form that transformers has)."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def sample(
    logits: Float[Array, "B V"],
    key: Key[Array, "..."],
    temperature: Float[Array, ""] | float,
    top_p: Float[Array, ""] | float,
    *,
    top_k: Int32[Array, ""] | int | None = None,
    min_p: Float[Array, ""] | float | None = None,
) -> Int32[Array, " B"]:
    """A token of softmax(logits / temperature), of those that top_k, top_p and min_p leave, in this order.

    The largest is always among them.

    Args:
      key: one, or one for each sequence.
      top_k: the tokens whose logits are at least the k-th largest; more than k where some are equal to it.
      top_p: of these the fewest whose probabilities sum to top_p or more.
      min_p: of these the ones at least min_p times as likely as the likeliest (arXiv 2407.01082).
    """
    # However small the temperature is, the largest stays 0 and no other becomes NaN.
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    ordered, tokens = jax.lax.top_k(below / jnp.maximum(temperature, LEAST_TEMPERATURE), logits.shape[-1])
    if top_k is not None:
        least = jnp.take(ordered, jnp.minimum(top_k, logits.shape[-1]) - 1, axis=-1)
        ordered = jnp.where(ordered >= least[:, None], ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = before < top_p
    if min_p is not None:
        kept &= ordered >= jnp.log(min_p)
    kept |= jnp.arange(logits.shape[-1]) == 0
    scores = jnp.where(kept, ordered, -jnp.inf)
    draw = jax.random.categorical if key.ndim == 0 else jax.vmap(jax.random.categorical)
    chosen = draw(key, scores)
    return jnp.take_along_axis(tokens, chosen[:, None], axis=1)[:, 0].astype(jnp.int32)


def greedy(logits: Float[Array, "B V"]) -> Int32[Array, " B"]:
    """The likeliest token; of equals the first."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
