"""POST /v1/chat/completions: answers in conversations."""

from collections.abc import Sequence
from typing import Any

from jmoe.serve.answering import Answer
from jmoe.serve.chat_choice import ChatChoice, Delta
from jmoe.serve.chat_prompt import conversation_tokens, tools_to_render
from jmoe.serve.engine import Event, Finished, PromptLogprobs, Request, Token
from jmoe.serve.errors import ApiError
from jmoe.serve.protocol.chat import ChatRequest
from jmoe.serve.sampling import check_choices, check_limits, check_logprobs, room, sampling_of
from jmoe.serve.service import Service
from jmoe.serve.settings import Limits


async def chat_completion(asked: ChatRequest, service: Service, limits: Limits) -> Answer:
    """The answer to a request, before any of it is there.

    Raises:
      ApiError: the request cannot be taken.
    """
    adapter = service.adapter(asked.model)
    check_limits(asked, limits, service.model.vocab_size)
    check_logprobs("top_logprobs", asked.top_logprobs, limits)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError.invalid("top_logprobs", "top_logprobs: they need logprobs=true")
    if asked.response_format is not None and asked.response_format.type != "text":
        raise ApiError.invalid(
            "response_format", 'response_format: only {"type": "text"} is known, as no other form can be enforced'
        )
    n = check_choices(asked, 1, limits)
    tools = tools_to_render(asked.tools, asked.tool_choice)
    prompt = await service.with_tokenizer(
        asked, lambda tokenizer: conversation_tokens(tokenizer, asked.messages, tools, asked.reasoning_effort)
    )
    return ChatAnswer(asked, prompt, n, adapter, service)


class ChatAnswer(Answer):
    """n answers to one conversation."""

    kinds = ("chat.completion", "chat.completion.chunk")

    def __init__(
        self, asked: ChatRequest, prompt: Sequence[int], n: int, adapter: str | None, service: Service
    ) -> None:
        """As asked, of a prompt that is tokens already."""
        model = service.model
        super().__init__("chatcmpl", asked.model or model.names[0], len(prompt), n, asked.include_usage)
        most = room(model, prompt, asked.most_tokens, "messages")
        self._choices: list[ChatChoice] = []
        self._held: dict[int, tuple[Delta, Any]] = {}
        self._begun: set[int] = set()
        for i in range(n):
            sampling = sampling_of(
                asked,
                model,
                service.tokenizer,
                max_tokens=most,
                sample=i,
                logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            )
            self.requests.append(Request(id=f"{self.id}-{i}", prompt=prompt, adapter=adapter, sampling=sampling))
            self._choices.append(
                ChatChoice(
                    service.tokenizer,
                    service.token_texts,
                    stop_strings=asked.stop_strings,
                    logprobs=bool(asked.logprobs),
                    own_ends=sampling.stop_tokens,
                    ends_with_final=not asked.ignore_eos,
                )
            )

    @property
    def choices(self) -> Sequence[ChatChoice]:
        """The choices."""
        return self._choices

    def add(self, index: int, event: Event) -> list[dict[str, Any]]:
        """Adds an event; the last token's piece says too that it is the last."""
        own = self._choices[index]
        match event:
            case Token():
                delta, logprobs = own.token(event)
                if own.finish_reason is None and own.new_tokens == self.requests[index].sampling.max_tokens:
                    self._held[index] = delta, logprobs
                    return []
                return [self._piece(index, delta, logprobs)]
            case Finished():
                delta, logprobs = self._held.pop(index, ({}, None))
                return [self._piece(index, own.joined(delta, own.finish(event)), logprobs)]
            case PromptLogprobs():
                return []
        raise TypeError(f"an event of an engine is expected, got {event!r}")

    def _piece(self, index: int, delta: Delta, logprobs: Any) -> dict[str, Any]:
        own = self._choices[index]
        if index not in self._begun:
            self._begun.add(index)
            delta = {"role": "assistant", **delta}
        return {
            "index": index,
            "delta": delta,
            "logprobs": logprobs and {"content": logprobs, "refusal": None},
            "finish_reason": own.finish_reason,
            "stop_reason": own.stop_reason,
        }

    def whole(self, index: int) -> dict[str, Any]:
        """The choice."""
        own = self._choices[index]
        return {
            "index": index,
            "message": own.message(),
            "logprobs": None if own.logprobs is None else {"content": own.logprobs, "refusal": None},
            "finish_reason": own.finish_reason,
            "stop_reason": own.stop_reason,
        }
