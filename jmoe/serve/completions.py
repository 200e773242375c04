"""POST /v1/completions: texts that follow prompts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jmoe.serve.answering import Answer
from jmoe.serve.completion_choice import CompletionChoice, choice
from jmoe.serve.engine import Event, Finished, PromptLogprobs, Request, Token
from jmoe.serve.errors import ApiError
from jmoe.serve.protocol.completions import DEFAULT_MAX_TOKENS, CompletionRequest
from jmoe.serve.sampling import check_choices, check_limits, check_logprobs, own_stop_tokens, room, sampling_of
from jmoe.serve.service import ModelFacts, Service
from jmoe.serve.settings import Limits
from jmoe.text import encode


class Prompt(NamedTuple):
    """A prompt's tokens, and its text if it was given as one."""

    tokens: Sequence[int]
    text: str | None


async def completion(asked: CompletionRequest, service: Service, limits: Limits) -> Answer:
    """The answer to a request, before any of it is there.

    Raises:
      ApiError: the request cannot be taken.
    """
    adapter = service.adapter(asked.model)
    _check(asked, limits, service.model)
    n = check_choices(asked, len(asked.prompts), limits)
    prompts = await service.with_tokenizer(asked, lambda tokenizer: _tokens(asked.prompts, tokenizer, service.model))
    return CompletionAnswer(asked, prompts, n, adapter, service)


def _check(asked: CompletionRequest, limits: Limits, model: ModelFacts) -> None:
    check_limits(asked, limits, model.vocab_size)
    check_logprobs("logprobs", asked.logprobs, limits)
    if asked.suffix:
        raise ApiError.invalid("suffix", "suffix: this model cannot fill in text before a suffix")
    if asked.best_of not in (None, asked.n or 1):
        raise ApiError.invalid("best_of", "best_of: the best of more answers than n are not chosen here")
    if asked.max_tokens == 0 and not asked.echo:
        raise ApiError.invalid("max_tokens", "max_tokens: 0 needs echo=true, else there is nothing to answer with")
    if not asked.prompts:
        raise ApiError.invalid("prompt", "prompt: at least one is needed, got none")


def _tokens(prompts: list[str] | list[list[int]], tokenizer: Any, model: ModelFacts) -> list[Prompt]:
    found = []
    for prompt in prompts:
        try:
            tokens = encode(tokenizer, prompt) if isinstance(prompt, str) else prompt
        except ValueError as error:
            raise ApiError.of_value("prompt", error) from None
        if not tokens:
            raise ApiError.invalid("prompt", "prompt: at least one token is needed, got an empty prompt")
        largest = int(np.asarray(tokens).max())
        if largest >= model.vocab_size:
            raise ApiError.invalid("prompt", f"prompt: token ids must be below {model.vocab_size}, got {largest}")
        found.append(Prompt(tokens, prompt if isinstance(prompt, str) else None))
    return found


class CompletionAnswer(Answer):
    """n choices for each prompt, in the prompts' order."""

    kinds = ("text_completion", "text_completion")

    def __init__(
        self, asked: CompletionRequest, prompts: Sequence[Prompt], n: int, adapter: str | None, service: Service
    ) -> None:
        """As asked, of prompts that are tokens already."""
        model = service.model
        super().__init__(
            "cmpl", asked.model or model.names[0], sum(len(each.tokens) for each in prompts), n, asked.include_usage
        )
        most = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
        # One token's log-probability is wanted whatever the token is, as clients that score texts ask for one.
        give_ends = most == 1 and asked.logprobs is not None
        self._echo = bool(asked.echo)
        prompt_logprobs = asked.logprobs if self._echo else None
        if most == 0 and prompt_logprobs is None:
            prompt_logprobs = 0  # without new tokens the engine is asked for the prompt's
        own_ends = own_stop_tokens(asked, service.tokenizer)
        ends = own_ends if asked.ignore_eos else (*model.stop_tokens, *own_ends)
        self._prompts = [prompt for prompt in prompts for _ in range(n)]
        self._choices: list[CompletionChoice] = []
        self._held: dict[int, tuple[str, Any]] = {}
        for i, prompt in enumerate(self._prompts):
            sampling = sampling_of(
                asked,
                model,
                service.tokenizer,
                max_tokens=room(model, prompt.tokens, most, "prompt"),
                sample=i % n,
                logprobs=asked.logprobs,
                prompt_logprobs=prompt_logprobs,
                give_ends=give_ends,
            )
            self.requests.append(Request(id=f"{self.id}-{i}", prompt=prompt.tokens, adapter=adapter, sampling=sampling))
            self._choices.append(
                CompletionChoice(
                    service.tokenizer,
                    service.token_texts,
                    stop_strings=asked.stop_strings,
                    show_special=asked.skip_special_tokens is False,
                    logprobs=asked.logprobs is not None,
                    ends=ends if give_ends else (),
                    own_ends=own_ends,
                )
            )

    @property
    def choices(self) -> Sequence[CompletionChoice]:
        """The choices."""
        return self._choices

    def add(self, index: int, event: Event) -> list[dict[str, Any]]:
        """Adds an event; the last token's piece says too that it is the last."""
        own = self._choices[index]
        match event:
            case PromptLogprobs():
                return self._begin(index, event)
            case Token():
                pieces = self._begin(index, None)
                text, logprobs = own.token(event)
                if own.finish_reason is None and own.new_tokens == self.requests[index].sampling.max_tokens:
                    self._held[index] = text, logprobs
                    return pieces
                return [*pieces, choice(index, text, logprobs, own.finish_reason, own.stop_reason)]
            case Finished():
                pieces = self._begin(index, None)
                text, logprobs = self._held.pop(index, ("", None))
                text += own.finish(event)
                return [*pieces, choice(index, text, logprobs, own.finish_reason, own.stop_reason)]
        raise TypeError(f"an event of an engine is expected, got {event!r}")

    def _begin(self, index: int, logprobs: PromptLogprobs | None) -> list[dict[str, Any]]:
        """The piece that has the prompt, if it is asked for and not there yet."""
        own = self._choices[index]
        if not self._echo or own.echoed:
            return []
        own.echo(*self._prompts[index], logprobs)
        return [choice(index, own.text, own.logprobs and {k: list(v) for k, v in own.logprobs.items()}, None, None)]

    def whole(self, index: int) -> dict[str, Any]:
        """The choice."""
        return self._choices[index].body(index)
