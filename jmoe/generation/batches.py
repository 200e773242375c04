"""Requests to replies, batch by batch."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jmoe.gpt_oss.generate import Generated, NotFiniteError, generate
from jmoe.gpt_oss.model import GptOss
from jmoe.text import check_vocabulary
from jmoe.text.channels import ChannelText
from jmoe.text.reply import Reply

CHUNK = 8
"""Steps between two pieces of streamed text."""


class Request(NamedTuple):
    """One text to be written: the prompt's number among all, which of its samples, its tokens, and its adapter's
    number, None for the model's only one."""

    prompt: int
    sample: int
    tokens: Sequence[int]
    adapter: int | None = None


class Answer(NamedTuple):
    """A reply that has ended.

    finish_reason: "stop" by a stop token or string, "length" by the limit of new tokens.
    stop: the token's text, or the string; None of "length".
    """

    request: Request
    reply: Reply
    finish_reason: Literal["stop", "length"]
    stop: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """How replies are generated.

    Attributes:
      stop_strings: a reply's text ends before the first of them; one that is a control token ends it as a token.
      whole: print all tokens, see jmoe.text.reply.Reply.
      seed: of all samples.
      own_seeds: whether each request has a seed of its own, made of it and the request's number, so that its samples
        are the same in any batch; else each batch has the seed.
      sampling: of jmoe.gpt_oss.generate: temperature, top_p and the like.
    """

    max_new_tokens: int
    batch_size: int
    stop_strings: Sequence[str] = ()
    whole: bool = False
    seed: int = 0
    own_seeds: bool = False
    prefill_chunk: int | None = None
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)


def own_seed(seed: int, number: int) -> int:
    """The seed of the request of this number; the first has the seed itself."""
    return seed if number == 0 else int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def answers(
    model: GptOss,
    tokenizer: Any,
    requests: Sequence[Request],
    how: Generation,
    *,
    on_text: Callable[[list[ChannelText]], None] | None = None,
) -> Iterator[tuple[list[Answer], Generated]]:
    """The answers of each batch of requests, in their order.

    Args:
      on_text: called with the new text of the first request as it comes.

    Raises:
      ValueError: as jmoe.gpt_oss.generate.
    """
    check_vocabulary(max(max(request.tokens) for request in requests), model.config.vocab_size)
    seeds = [own_seed(how.seed, i) for i in range(len(requests))]
    ends = stop_tokens(model, tokenizer, how.stop_strings)
    for start in range(0, len(requests), how.batch_size):
        batch = requests[start : start + how.batch_size]
        # Repeated to the size of the other batches, for which a program is compiled.
        rows = [*batch, *[batch[-1]] * (min(how.batch_size, len(requests)) - len(batch))]
        own = [seeds[min(start + i, len(seeds) - 1)] for i in range(len(rows))] if how.own_seeds else how.seed
        replies = [Reply(tokenizer, how.stop_strings, form="tokens" if how.whole else "channels") for _ in batch]
        growing = Growing(replies, on_text if start == 0 else None, len(rows))
        try:
            generated = generate(
                model,
                [request.tokens for request in rows],
                max_new_tokens=how.max_new_tokens,
                stop_tokens=ends,
                seed=own,
                adapter_ids=adapter_ids(rows),
                callback=growing.add,
                chunk=CHUNK,
                prefill_chunk=how.prefill_chunk,
                **how.sampling,
            )
        except NotFiniteError as error:
            raise ValueError(f"prompt {rows[error.sequence].prompt}: {error}") from error
        growing.finish()
        found = [answer(*each, generated, i, tokenizer) for i, each in enumerate(zip(batch, replies, strict=True))]
        yield found, generated


def adapter_ids(requests: Sequence[Request]) -> list[int] | None:
    """The adapter of each; None where they name none."""
    ids = [request.adapter for request in requests if request.adapter is not None]
    return ids or None


class Growing:
    """The replies of a batch as their tokens come."""

    def __init__(
        self, replies: Sequence[Reply], on_text: Callable[[list[ChannelText]], None] | None, rows: int
    ) -> None:
        self._replies = replies
        self._on_text = on_text or (lambda pieces: None)
        self._ended = np.ones(rows, bool)  # what is not a reply's row may end at once
        self._ended[: len(replies)] = False

    def add(self, tokens: np.ndarray, is_text: np.ndarray) -> np.ndarray:
        """Adds a chunk; returns which sequences have ended by a stop string."""
        for i, reply in enumerate(self._replies):
            if not self._ended[i]:
                new = reply.push(tokens[i][is_text[i]].tolist())
                self._ended[i] = reply.stop_string is not None
                if i == 0 and new:
                    self._on_text(new)
        return self._ended

    def finish(self) -> None:
        """Ends all replies."""
        rests = [reply.finish() for reply in self._replies]
        if rests[0]:
            self._on_text(rests[0])


def answer(request: Request, reply: Reply, generated: Generated, row: int, tokenizer: Any) -> Answer:
    """The reply with what has ended it."""
    if reply.stop_string is not None:
        return Answer(request, reply, "stop", reply.stop_string)
    length = int(generated.lengths[row])
    if length == generated.tokens.shape[1]:
        return Answer(request, reply, "length", None)
    return Answer(request, reply, "stop", tokenizer.decode([int(generated.tokens[row, length])]))


def stop_tokens(model: GptOss, tokenizer: Any, stop_strings: Sequence[str]) -> list[int]:
    """The model's stop tokens, and the control tokens among the strings, which are in no text."""
    control = tokenizer.get_added_vocab()
    return [*model.config.stop_tokens, *(control[string] for string in stop_strings if string in control)]
