"""Log-probabilities of given tokens, without logits of every position."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jmoe.gpt_oss.log_probs import CHUNK, log_probs_of_logits
from jmoe.gpt_oss.model import GptOss
from jmoe.text import check_vocabulary


class Span(NamedTuple):
    """A sequence of input tokens, and the tokens that its last len(targets) positions should predict."""

    tokens: Sequence[int]
    targets: Sequence[int]


class Score(NamedTuple):
    """The sum of the targets' log-probabilities in nats, and whether each of them is the likeliest token."""

    log_probability: float
    greedy: bool


def score(model: GptOss, spans: Sequence[Span], adapter_ids: Sequence[int] | None, rows: int) -> list[Score]:
    """Each span's score, of spans with at most `rows` different inputs.

    Spans with the same tokens and adapter are one row of the batch: answers of one token cost one sequence a question.
    Numbers of rows, tokens and positions are rounded up to few sizes, so that few programs are compiled.

    Args:
      adapter_ids: each span's adapter, -1 for none; None for a model without adapters.

    Raises:
      ValueError: a token past the vocabulary; a log-probability that is not finite.
    """
    check_vocabulary(max(max((*span.tokens, *span.targets)) for span in spans), model.config.vocab_size)
    adapters = [-1] * len(spans) if adapter_ids is None else adapter_ids
    inputs = [(tuple(span.tokens), adapter) for span, adapter in zip(spans, adapters, strict=True)]
    different = list(dict.fromkeys(inputs))
    height = min(rows, power_of_two(len(different)))
    width = static_width(max(len(tokens) for tokens, _ in different))
    tokens = np.zeros((height, width), np.int32)
    for row, (own, _) in zip(tokens, different, strict=False):
        row[: len(own)] = own
    ids = None
    if adapter_ids is not None:
        ids = np.full(height, -1, np.int32)
        ids[: len(different)] = [adapter for _, adapter in different if adapter is not None]
    row_of = {key: row for row, key in enumerate(different)}
    lengths = [len(span.targets) for span in spans]
    places = np.zeros(
        (3, power_of_two(sum(lengths))), np.int32
    )  # row, position and target; what is past them is unused
    places[:, : sum(lengths)] = np.concatenate(
        [
            [
                np.full(len(span.targets), row_of[key]),
                np.arange(len(span.tokens) - len(span.targets), len(span.tokens)),
                span.targets,
            ]
            for span, key in zip(spans, inputs, strict=True)
        ],
        axis=1,
    )
    found, likeliest = (np.asarray(array) for array in score_places(model, tokens, places, ids))
    ends = np.cumsum(lengths)
    if not np.isfinite(found[: ends[-1]]).all():
        raise ValueError("log-probabilities must be finite: the model's or the adapter's numbers are not, or overflow")
    return [
        Score(float(found[end - length : end].sum(dtype=np.float64)), bool(likeliest[end - length : end].all()))
        for length, end in zip(lengths, ends, strict=True)
    ]


def power_of_two(least: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (least - 1).bit_length()


def static_width(length: int) -> int:
    """The length rounded up to a multiple of 64, and of a quarter of the power of two below it."""
    step = max(64, power_of_two(length) // 8)
    return -(-length // step) * step


def _score_places(
    model: GptOss, tokens: Int32[Array, "B T"], places: Int32[Array, "3 P"], adapter_ids: Int32[Array, " B"] | None
) -> tuple[Float[Array, " P"], Bool[Array, " P"]]:
    """(the log-probability of each place's target, whether it is the likeliest token), some places at a time."""
    rows, positions, targets = places
    hidden = model.hidden(tokens, adapter_ids=adapter_ids)[rows, positions]

    def of_chunk(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = chunk
        logits = model.logits(hidden[None])[0]
        found, _ = log_probs_of_logits(logits, targets)
        return found, jnp.argmax(logits, axis=-1) == targets

    size = min(CHUNK, targets.shape[0])
    chunks = hidden.reshape(-1, size, hidden.shape[-1]), targets.reshape(-1, size)
    return jax.tree.map(jnp.ravel, lax.map(of_chunk, chunks))


# By jax.jit: nnx.jit returns every variable from the program, for which XLA copies the whole model at each call.
score_places: Callable[..., tuple[Array, Array]] = jax.jit(_score_places)
