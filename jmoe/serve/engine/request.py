"""What is asked of the engine, and the events that answer it."""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

MOST_LOGPROBS = 20
"""Likeliest tokens that may be asked for beside the chosen one."""

MOST_BIASES = 300
"""Tokens that one request's logit_bias may name, as OpenAI has it."""


MOST_FLOAT, LEAST_FLOAT = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
"""What the device computes with is neither infinite nor 0 between them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen, and what ends them.

    The order is that of transformers: logit_bias, penalties, temperature, top_k, top_p, min_p.

    Attributes:
      max_tokens: new tokens at most; 0 is for prompt_logprobs alone.
      temperature: 0 takes the likeliest token.
      top_p: draws from the fewest tokens whose probabilities sum to it; 1 from all.
      top_k: draws from so many of the likeliest tokens; 0 from all.
      min_p: draws from tokens at least so many times as likely as the likeliest; 0 from all.
      repetition_penalty: of tokens that the prompt or the text has, as in jmoe.gpt_oss.sample.penalized; 1 is none.
      presence_penalty: taken from the logits of tokens that the new text has.
      frequency_penalty: likewise, times how often.
      seed: the draws are a function of it and of a token's position, whatever else runs; None: one that nobody knows.
      logit_bias: added to the logits of these tokens, MOST_BIASES at most.
      stop_tokens: any of these ends the text, beside the model's own.
      ignore_eos: the model's own stop tokens are tokens like others.
      logprobs: give each new token's log-probability by the model's unchanged logits, and so many of the likeliest
        tokens with theirs, MOST_LOGPROBS at most; None: none of it.
      prompt_logprobs: likewise for the prompt's tokens.

    Raises:
      ValueError: a value is out of range; the message begins with its name.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        least = 0 if self.prompt_logprobs is not None else 1
        wanted = f"a whole number, {least} or more"
        checks = [
            ("max_tokens", is_whole(self.max_tokens) and self.max_tokens >= least, wanted),
            ("temperature", 0 <= self.temperature <= MOST_FLOAT, "finite in float32, 0 or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", is_whole(self.top_k) and self.top_k >= 0, "a whole number, 0 for all or more"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            (
                "repetition_penalty",
                LEAST_FLOAT <= self.repetition_penalty <= MOST_FLOAT,
                "positive and finite in float32",
            ),
            ("presence_penalty", math.isfinite(self.presence_penalty), "finite"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "finite"),
            ("seed", self.seed is None or is_whole(self.seed), "a whole number"),
            ("logit_bias", len(self.logit_bias) <= MOST_BIASES, f"of at most {MOST_BIASES} tokens"),
            ("logit_bias", all(map(math.isfinite, self.logit_bias.values())), "finite"),
        ]
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            good = value is None or (is_whole(value) and 0 <= value <= MOST_LOGPROBS)
            checks.append((name, good, f"a whole number from 0 to {MOST_LOGPROBS}"))
        for name, good, wanted in checks:
            if not good:
                value = getattr(self, name)
                raise ValueError(f"{name} must be {wanted}, got {len(value) if isinstance(value, Mapping) else value}")

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits are changed before the likeliest is looked for."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return bool(self.logit_bias) or penalties != (1, 0, 0)

    @property
    def counts_tokens(self) -> bool:
        """Whether penalties need to know the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def is_whole(value: object) -> bool:
    """Whether it is an integer and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One text to be written.

    Attributes:
      id: of no other request that has not ended.
      prompt: token ids, one at least.
      adapter: the name of a loaded adapter; None: the model alone.
    """

    id: str
    prompt: Sequence[int]
    adapter: str | None
    sampling: SamplingParams


@dataclasses.dataclass(frozen=True)
class Token:
    """A new token.

    logprob: its log-probability; None if not asked for.
    top: (token, log-probability) of the likeliest, as many as were asked for, the likeliest first.
    cached_tokens: as in Finished, which does not come to a text that is ended by who reads it.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    cached_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class PromptToken:
    """A prompt's token after those before it; fields as in Token."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """Comes once, before the first new token: an entry for each of the prompt's tokens, None for the first."""

    entries: tuple[PromptToken | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """The text has ended.

    Attributes:
      reason: "stop" by a stop token, "length" by max_tokens.
      stop_token: which; it is no Token. None of "length".
      cached_tokens: of the prompt's, those that had been computed before.
      new_tokens: Tokens given; a stop token is none of them.
    """

    reason: Literal["stop", "length"]
    stop_token: int | None
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Failed:
    """The request ended by an error."""

    message: str


@dataclasses.dataclass(frozen=True)
class Cancelled:
    """The request ended by Engine.cancel; its memory is free again."""


type Event = Token | PromptLogprobs | Finished | Failed | Cancelled
"""A request gets any number of Token and at most one PromptLogprobs, then exactly one of the others, its last."""


class QueueFullError(Exception):
    """As many requests wait as may; a later try may find room."""


class TooLongError(ValueError):
    """The prompt with its new tokens is longer than the engine takes."""


class UnknownAdapterError(ValueError):
    """No adapter of that name is loaded."""


class NameTakenError(ValueError):
    """An adapter of this name is loaded already."""


class NoPlaceError(Exception):
    """All places for adapters are taken."""


class LoadFailedError(Exception):
    """The device has not taken an adapter; the engine goes on without it."""


class EngineStoppedError(Exception):
    """The engine takes no more requests: it drains, has stopped or has failed."""


def checked_prompt(request: Request, vocabulary: int, longest: int) -> list[int]:
    """The prompt's tokens.

    longest: tokens of a prompt and its new ones at most.

    Raises:
      ValueError: there are none, or it or logit_bias has tokens that are not below `vocabulary`.
      TooLongError: the prompt with max_tokens is longer than `longest`.
    """
    params = request.sampling
    prompt = np.asarray(request.prompt)
    if not prompt.size or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError("prompt must be token ids, one at least")
    named = [*params.logit_bias, int(prompt.min()), int(prompt.max())]
    if min(named) < 0 or max(named) >= vocabulary:
        raise ValueError(f"token ids must be in [0, {vocabulary}), got {min(named)} to {max(named)}")
    if len(prompt) + params.max_tokens > longest:
        raise TooLongError(
            f"prompt and new tokens must be at most {longest}, got {len(prompt)} and {params.max_tokens}"
        )
    return prompt.tolist()
